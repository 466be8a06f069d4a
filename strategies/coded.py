"""Text under public control codes: what every synthesizer shares, whatever its sites send.

Codes from a file, an even choice among them, the model that writes, a draft with its provenance. Methods build on
this and never on one another.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from fl_app import journal, peft_files
from fl_app.config import Section
from fl_app.errors import ConfigInvalid, RoundFailed
from fl_app.types import CodedText, ControlCode, Draft, Origin
from strategies.selection import apportion

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_app.types import Adapter, VectorRelease
    from strategies.lab import Lab, TextModel

CODE_SLOT = "{code}"

DESCRIBED = "Write one message that fits this description. Reply with the message alone.\n\nDescription: {code}"
"""How a bare model is asked for a text of a code, if the configuration does not say it better."""


class SamplingSection(Section):
    """How a model is sampled: keys that the sections of writing methods share."""

    max_new_tokens: Annotated[int, Field(ge=4, le=4096)] = 64
    temperature: Annotated[float, Field(gt=0, le=5)] = 0.9
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95

    def sample(self, model: TextModel, prompts: Sequence[str], rng: np.random.Generator) -> list[str]:
        """Return one text per prompt, in order, without blanks around it."""
        texts = model.generate(
            prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, rng=rng
        )
        return [text.strip() for text in texts]


def read_codes(path: Path) -> tuple[ControlCode, ...]:
    """Return the public control codes of a JSON-lines file with `id` and `text`.

    Raises: ConfigInvalid when the file is missing, holds no code, one without id or text, or one id twice.
    """
    if not path.is_file():
        raise ConfigInvalid(f"server.synthesizer.codes: no file at {path!s}; expected JSON lines with id and text")
    codes: dict[str, ControlCode] = {}
    for number, row in journal.numbered_lines(path):
        name, text = row.get("id"), row.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            raise ConfigInvalid(
                f"{path}:{number}: a control code needs id and text; found keys {', '.join(sorted(row))}"
            )
        if name in codes:
            raise ConfigInvalid(f"{path}:{number}: control code {name!r} is there already; give every code its own id")
        codes[name] = ControlCode(id=name, text=text)
    if not codes:
        raise ConfigInvalid(f"server.synthesizer.codes: {path} holds no control code")
    return tuple(codes.values())


def read_coded_texts(path: Path, key: str) -> tuple[CodedText, ...]:
    """Return the public texts of a JSON-lines file with `code` and `text`; `key` names it in the configuration.

    Raises: ConfigInvalid when the file is missing, or a row lacks one of the two or has a blank text.
    """
    if not path.is_file():
        raise ConfigInvalid(f"{key}: no file at {path!s}; expected JSON lines with code and text")
    texts: list[CodedText] = []
    for number, row in journal.numbered_lines(path):
        code, text = row.get("code"), row.get("text")
        if not isinstance(code, str) or not isinstance(text, str) or not text.strip():
            raise ConfigInvalid(f"{path}:{number}: a row needs code and text; found keys {', '.join(sorted(row))}")
        texts.append(CodedText(code=code, text=text))
    return tuple(texts)


def evenly(codes: Sequence[ControlCode], count: int, rng: np.random.Generator) -> list[ControlCode]:
    """Return `count` codes in random order, every code equally often, give or take one."""
    order: list[int] = []
    while len(order) < count:
        order += [int(i) for i in rng.permutation(len(codes))]
    return [codes[i] for i in order[:count]]


def by_counts(
    codes: Sequence[ControlCode], surveys: Mapping[str, VectorRelease], count: int, rng: np.random.Generator
) -> list[ControlCode]:
    """Return `count` codes in random order, as often as the sites' noisy counts of their rows say.

    The sum over sites, in the order of the codes' ids; what noise made negative counts as none. Post-processing.
    Raises: RoundFailed when no site has sent counts of these codes.
    """
    names = sorted(code.id for code in codes)
    counts = [one.vectors["codes"].astype(np.float64) for one in surveys.values() if "codes" in one.vectors]
    if not counts or any(len(one) != len(names) for one in counts):
        raise RoundFailed(
            'server.synthesizer.quota = "survey", and no site has counted its codes; add [client.survey], or write '
            'quota = "even"'
        )
    shares = apportion([float(share) for share in np.sum(counts, axis=0)], count, [count] * len(names))
    by_name = {code.id: code for code in codes}
    chosen = [by_name[name] for name, share in zip(names, shares, strict=True) for _ in range(share)]
    return [chosen[int(i)] for i in rng.permutation(len(chosen))]


def fixed_adapter(lab: Lab, directory: str) -> Adapter | None:
    """Return the adapter of a PEFT directory that the configuration names as writer; None when it names none.

    Raises: ConfigInvalid when there is no adapter; AdapterMismatch when it is for another base model.
    """
    if not directory:
        return None
    folder = Path(directory)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigInvalid(
            f"server.synthesizer.writer: no PEFT adapter in {folder}; give a folder such as runs/<id>/rounds/1/merged, "
            "or leave it empty"
        )
    return peft_files.load(folder, base=lab.local.resolved.sha256)


def asked_for(model: TextModel, code: ControlCode, template: str, shots: Sequence[str] = ()) -> str:
    """Return the chat prompt that asks a bare model for a text of a code; `shots` are public examples."""
    examples = "".join(f"\n\nExample: {shot}" for shot in shots)
    return model.chat(template.replace(CODE_SLOT, code.text.strip()) + examples)


def unquoted(text: str) -> str:
    """Return a text without blanks and the pair of quotes around it, which chat models like to add."""
    bare = text.strip()
    for left, right in (('"', '"'), ("\u201c", "\u201d"), ("'", "'")):
        inner = bare[1:-1]
        if len(bare) > 1 and bare.startswith(left) and bare.endswith(right) and not {left, right} & set(inner):
            return inner.strip()
    return bare


def drafted(
    texts: Sequence[str],
    codes: Sequence[ControlCode],
    *,
    method: str,
    round_number: int,
    voices: Sequence[str] | None = None,
) -> tuple[Draft, ...]:
    """Return a draft per text, under its code, in the order of the texts; `voices` are the sites that wrote them.

    The provenance's prompt is the code's text, whatever the model was asked: under it the target rehearses.
    """
    return tuple(
        draft(
            text,
            Origin(
                round=round_number,
                method=method,
                code=code.id,
                stream=str(place),
                prompt=code.text,
                voice=voice,
            ),
        )
        for place, (code, text, voice) in enumerate(zip(codes, texts, voices or [""] * len(texts), strict=True))
    )


def draft(text: str, origin: Origin) -> Draft:
    """Return a draft without an answer; its id is a hash of origin and text."""
    # Without a voice the key is what it was before there were voices: ids of merged drafts stay.
    named = f"\x1f{origin.voice}" if origin.voice else ""
    key = f"{origin.round}\x1f{origin.method}\x1f{origin.code}\x1f{origin.stream}{named}\x1f{text}"
    return Draft(id=hashlib.sha256(key.encode()).hexdigest()[:16], instruction=text, response="", origin=origin)
