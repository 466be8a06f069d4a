"""Secrets to plant in a site, and the search for them in everything else: each form a text may take in a file."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

SYLLABLES = ("quor", "vath", "zim", "bek", "thral", "oxu", "jint", "wyv", "phar", "klom", "zeq", "yrr")


def words(count: int, seed: int) -> list[str]:
    """Return invented words that nothing else says."""
    rng = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        made["".join(rng.choices(SYLLABLES, k=4)) + f"{rng.randrange(1000):03d}"] = None
    return list(made)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Forty secrets of a site by where they stand, and five of its environment."""

    texts: tuple[str, ...]
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    files: tuple[str, ...]
    keys: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def site(self) -> tuple[str, ...]:
        return (*self.texts, *self.columns, *self.labels, *self.files, *self.keys)

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.site, *self.environment.values())


def planted(seed: int) -> Planted:
    """Return the secrets of one seed: two seeds share none."""
    made = words(45, seed)
    texts = [*made[:14], f'Zoë "{made[14]}" Ünder', f"{made[15]}\\{made[15]}"]
    return Planted(
        texts=tuple(texts),
        columns=tuple(made[16:22]),
        labels=tuple(made[22:30]),
        files=tuple(made[30:34]),
        keys=tuple(f"sk-{word}" for word in made[34:40]),
        environment=dict(zip(ENVIRONMENT, (f"{word}Xx" for word in made[40:45]), strict=True)),
    )


ENVIRONMENT = ("TEACHER_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DATABASE_URL", "STILLROOM_TOKEN")


def rows_of(secrets: Planted, count: int) -> list[dict[str, Any]]:
    """Return rows that hold every secret of the site but the names of its files; more rows, the same secrets again."""
    return [
        {
            "id": f"{secrets.labels[number % 8]}-{number}",
            "instruction": f"{secrets.texts[number % 16]} has a cough, key {secrets.keys[number % 6]}",
            "output": f"dear {secrets.texts[(number + 1) % 16]}, rest",
            "code": secrets.labels[number % 8] if number % 2 else "cough",
            secrets.columns[number % 6]: secrets.texts[(number + 2) % 16],
        }
        for number in range(count)
    ]


def forms(secret: str) -> dict[str, bytes]:
    """Return how a text may stand in a file or message; compared without regard to case."""
    raw = secret.encode()
    return {
        "as it is": raw,
        "JSON": json.dumps(secret)[1:-1].encode(),
        "repr": repr(secret)[1:-1].encode(),
        "UTF-16": secret.encode("utf-16-le"),
        "URL": quote(secret).encode(),
        "hex": raw.hex().encode(),
        **{f"base64+{n}": base64.b64encode(b"\0" * n + raw)[4 if n else 0 : -4] for n in range(3)},
    }


def found(secrets: Iterable[str], places: Mapping[str, bytes]) -> list[str]:
    """Return where which secret stands, in which form."""
    lowered = {name: content.lower() for name, content in places.items()}
    hits: list[str] = []
    for secret in secrets:
        for form, text in forms(secret).items():
            hits += [f"{secret} ({form}) in {name}" for name, content in lowered.items() if text.lower() in content]
    return hits


def files_under(*folders: Path, leave_out: Iterable[Path] = ()) -> dict[str, bytes]:
    """Return the content of every file, its relative name with it: a name may tell as much."""
    out = set(leave_out)
    return {
        str(path): str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path not in out
    }
