"""Small facts about text that several methods ask for: words, n-grams, sentence ends, markup, one safe line.

Language: words are runs of letters or digits of any script; sentence ends are the marks of western and Chinese text.
Out of scope: tokenizers of models (`fl_app.models`), and judging text (`strategies.filters`).
"""

from __future__ import annotations

import html
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")
_CLOSERS = "\"'\u2019\u201d\u00bb)]*_"  # quotes and brackets that may follow a mark, and Markdown emphasis
_END = re.compile(rf"(?:[.!?\u2026]+[{re.escape(_CLOSERS)}]*(?=\s|$)|[\u3002\uff01\uff1f][{re.escape(_CLOSERS)}]*)")
_NOT_AN_END = re.compile(r"(?:(?:^|\n)\s*\d{1,2}|(?:^|\s)(?:dr|mr|mrs|ms|prof|vs|e\.g|i\.e))\.$", re.IGNORECASE)
_LINK = re.compile(
    r"(?:\b[a-z][a-z0-9+.-]*://|\bwww\.|\bmailto:|!\[[^\]]*\]|\]\(|<\s*(?:a|img|script|iframe)\b)", re.IGNORECASE
)

_HIDDEN = re.compile("[\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")
"""Zero-width spaces, turned directions and tag characters; joiners that scripts and emoji need are left alone."""

_ADDRESS = re.compile(
    r"://|\b(?:javascript|data):\S|\b(?:[a-z0-9-]+\.)+(?:com|org|net|info|biz|io|ru|cn|xyz|example|test)\b",
    re.IGNORECASE,
)
_ROLE = re.compile(
    r"^\W{0,4}(?:system|assistant|user|human|developer)\W{0,3}:|^\s*#{2,}\s*(?:instruction|input|response|system)\b",
    re.IGNORECASE | re.MULTILINE,
)
_TOOL = re.compile(
    r"[\"'](?:tool_calls?|tool_use|function_call|arguments)[\"']\s*:|<\s*/?\s*(?:tool|function|invoke|parameter)|"
    r"\[\s*tool|```\s*tool|^\s*action(?: input)?\s*:",
    re.IGNORECASE | re.MULTILINE,
)
_ENCODED = re.compile(
    r"(?=[A-Za-z+/]*[0-9])(?=[a-z0-9+/]*[A-Z])(?=[A-Z0-9+/]*[a-z])[A-Za-z0-9+/]{32,}|\b[0-9a-f]{32,}\b|[A-Za-z0-9+/]{12,}={1,2}(?!\w)"
)

TEMPLATE_MARKS = (
    *("<|", "[inst", "[/inst", "<<sys", "<s>", "</s>"),
    *("<start_of_turn>", "<end_of_turn>", "<tool_call", "<function"),
)
"""Lower-case beginnings, of the model families that we have met; a new family adds its own."""


def words(text: str) -> list[str]:
    """Return the lower-case words of a text, in order, without punctuation."""
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Return the runs of `size` tokens, in order; none when there are fewer tokens."""
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


def common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two word lists.

    One machine operation per word of `right` on integers of len(left) bits, hence some hundred times faster than
    `rouge_score`'s table, to which a test holds it.
    Source: Hyyroe 2004, Bit-parallel LCS-length computation revisited; the zero bits of `row` are the matches.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(left)) - 1
    row = full
    for word in right:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(left) - row.bit_count()


def one_line(text: str, limit: int = 200) -> str:
    """Return the first `limit` characters of a text from elsewhere, with a question mark for each that does not print.

    Guarantee: no line ends, control characters, terminal escapes, or marks that turn the direction of writing, so no
    log line, table or terminal shows something other than what it holds.
    """
    return "".join(one if one.isprintable() else "?" for one in text[:limit])


def ends_sentence(text: str) -> bool:
    """Return whether the last thing in the text is a sentence mark, quotes and brackets aside."""
    return bool(text.strip()) and cut_at_last_sentence(text) == text.rstrip()


def cut_at_last_sentence(text: str) -> str:
    r"""Return the text up to its last sentence end; empty when it holds none.

    | text                     | result  |
    | ------------------------ | ------- |
    | "Rest. Drink wat"        | "Rest." |
    | "Rest.\n2. Drink wat"    | "Rest." |  a list's number is no sentence
    | "See Dr. Wh"             | ""      |  nor is a title or a common abbreviation
    | "positive"               | ""      |
    """
    ends = [match.end() for match in _END.finditer(text)]
    for end in reversed(ends):
        if not _NOT_AN_END.search(text[:end]):
            return text[:end].rstrip()
    return ""


def holds_link(text: str) -> bool:
    """Return whether the text holds a URL, a Markdown link or image, or an HTML tag that loads or links something."""
    return bool(_LINK.search(text))


def holds_template_mark(text: str) -> bool:
    """Return whether the text holds a mark of a chat template or of a tool call, which no plain message does."""
    lowered = text.lower()
    return any(mark in lowered for mark in TEMPLATE_MARKS)


def markup(text: str) -> str:
    """Return which markup a text holds that no plain question or answer does; empty when it holds none.

    Seen through entities, full-width letters and characters without width. "link" also stands for a bare address;
    "encoded text" for 32 characters and more without a blank, digits among them.
    Out of scope: asking for something forbidden in plain words, which has no form to be recognised by.
    """
    plain = unicodedata.normalize("NFKC", html.unescape(_HIDDEN.sub("", text)))
    found = (
        (bool(_HIDDEN.search(text)), "hidden characters"),
        (holds_link(plain) or bool(_ADDRESS.search(plain)), "link"),
        (holds_template_mark(plain), "template mark"),
        (bool(_ROLE.search(plain)), "role mark"),
        (bool(_TOOL.search(plain)), "tool call"),
        (bool(_ENCODED.search(plain)), "encoded text"),
    )
    return next((name for holds, name in found if holds), "")
