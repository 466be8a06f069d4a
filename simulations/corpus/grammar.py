"""A small text grammar: `{name}` is a bound value or a drawn word, `<a|b|>` an alternative drawn in place.

Alternatives nest; an empty one drops the phrase. Out of scope: meaning. A name that is neither bound nor in the
lexicon is a mistake in the content and raises.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

from fl_app.errors import RowsInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

T = TypeVar("T")

_ALTERNATIVE = re.compile(r"<([^<>]*)>")
_SLOT = re.compile(r"\[(?:name|phone|place)\]")
_NAME = re.compile(r"\{(\w+)\}")
_SENTENCE_START = re.compile(r"(^|[.!?]\s+)([a-z])")
_GAPS = ((re.compile(r"\s+"), " "), (re.compile(r" ([,.;:!?])"), r"\1"))


def draw(options: Sequence[T], rng: np.random.Generator) -> T:
    """Return one of `options`, uniformly."""
    return options[int(rng.integers(len(options)))]


def expand(
    template: str, lexicon: Mapping[str, Sequence[str]], bound: Mapping[str, str], rng: np.random.Generator
) -> str:
    """Return `template` with all alternatives and names drawn; blanks are tidied, letter case is kept.

    Raises:
        RowsInvalid: a name is neither in `bound` nor in `lexicon`.
    """

    def name(match: re.Match[str]) -> str:
        key = match.group(1)
        if key in bound:
            return bound[key]
        if key not in lexicon:
            raise RowsInvalid(f"template name {key!r} is neither bound nor in the lexicon: {template!r}")
        return expand(draw(lexicon[key], rng), lexicon, bound, rng)

    text = template
    while _ALTERNATIVE.search(text):
        text = _ALTERNATIVE.sub(lambda match: draw(match.group(1).split("|"), rng), text)
    return tidy(_NAME.sub(name, text))


def tidy(text: str) -> str:
    """Return `text` with single blanks and none before punctuation."""
    for pattern, replacement in _GAPS:
        text = pattern.sub(replacement, text)
    return text.strip()


def lower(text: str) -> str:
    """Return `text` in lower case, personal slots as they are."""
    return _SLOT.sub(lambda match: match.group().upper(), text.lower())


def sentence_case(text: str) -> str:
    """Return `text` with a capital at the start of every sentence."""
    return _SENTENCE_START.sub(lambda match: match.group(1) + match.group(2).upper(), text)
