"""Public control codes, public texts under them, and drafts that are written after them: what synthesizers share."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from fl_app import journal
from fl_app.errors import ConfigInvalid
from fl_app.types import CodedText, ControlCode, Draft

if TYPE_CHECKING:
    from pathlib import Path

    from fl_app.types import Origin


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


def draft(text: str, origin: Origin) -> Draft:
    """Return a draft without an answer; its id is a hash of origin and text."""
    # Without a voice the key is what it was before there were voices: ids of merged drafts stay.
    named = f"\x1f{origin.voice}" if origin.voice else ""
    key = f"{origin.round}\x1f{origin.method}\x1f{origin.code}\x1f{origin.stream}{named}\x1f{text}"
    return Draft(id=hashlib.sha256(key.encode()).hexdigest()[:16], instruction=text, response="", origin=origin)
