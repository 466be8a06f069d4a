"""Drops drafts that hold personal data: addresses, numbers and links by pattern, names by pattern or by presidio.

A second line behind differential privacy, not a guarantee: what a pattern does not know passes. Both `instruction`
and `response` are read. A reason names the kind of data, never the data.

| kind  | what counts                                                                                        |
| ----- | -------------------------------------------------------------------------------------------------- |
| email | x@y.z                                                                                              |
| url   | whatever `fl_app.text.holds_link` takes for a link                                                 |
| iban  | two letters, two digits, 11 to 30 more, and a right check sum (mod 97)                             |
| card  | 13 to 19 digits with a right Luhn digit                                                            |
| ssn   | 3-2-4 digits with hyphens                                                                          |
| phone | 9 to 15 digits in groups, 8 after a +, 7 as 555-0142 with no unit behind or after a word as "call" |
| name  | capitalised words after a cue ("my name is", "Dear", "Dr", "Yours,"), "X Y of Place", strangers    |

Names, by pattern: 1 to 5 capitalised words after a cue, at least one of which is not a public word
(`lab.public_words`); a cue that is weak ("I am", "this is") asks for two. And, where there are public words, 2 or more
capitalised words side by side that are all strangers to them. Cues are English; names in lower case, and single names
without a cue, pass. `engine = "presidio"` adds presidio's PERSON to the same rules; the configuration says which
engine judges, so that a run does not depend on what happens to be installed.

Measured on 4,000 letters of the embedded corpus, slots filled by hand-made names, the rules made with them in view:
cues alone found 26 % of the letters with a name or number, all rules every one; of 2,260 letters without any, none
was dropped, and of 396 with a place alone those whose place was two unknown words. Elsewhere expect less.

Out of scope: dates, places, rare diseases (quasi-identifiers): those are the ledger's business.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fl_app import text
from fl_app.config import Section
from fl_app.errors import ConfigInvalid
from fl_app.types import Screened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fl_app.types import Draft
    from strategies.lab import ServerModels
    from strategies.stages import Filter

MASK = "<name>"
PERSON_SCORE = 0.5
"""Least score at which presidio's PERSON counts; its spaCy recogniser always says 0.85. Assumption."""

NATIONAL_DIGITS = 9
"""Fewer digits without a + are more often a dose, a year range or an order number. Assumption."""

NAME_WORDS = 5
"""Longest name taken whole after a cue."""

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")
_CARD = re.compile(r"(?<![\w+])\d(?:[ -]?\d){12,18}(?!\w)")
_SSN = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
_PHONE = re.compile(r"(?<![\w.])(?:\+|\(|00)?\d(?:[ ().\-/]{0,2}\d){7,14}(?!\w)")
_CUED_PHONE = re.compile(
    r"\b(?:call|phone|telephone|tel|mobile|cell|fax|ring|number|line|text|dial|reach)\b\D{0,20}\d{3}[ .\-]?\d{4}\b",
    re.IGNORECASE,
)
_SHORT_PHONE = re.compile(
    r"(?<![\w.-])[2-9]\d\d-\d{4}(?![\w-])(?! ?(?:mg|mcg|ml|g|kg|iu|units?|kcal|calories|times|steps|words)\b)",
    re.IGNORECASE,
)
_DATE = re.compile(r"^\D*(?:\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4})\b")

_STRONG_CUE = re.compile(
    r"\b(?:(?:my|his|her|the patient's) (?:full )?name(?: is|:)|(?:name|patient|signed|from|attn):|name['\u2019]s|"
    r"signed,|dear|"
    r"(?:mr|mrs|ms|miss|dr|prof|doctor|professor)\b\.?|"
    r"(?:yours(?: \w+)?|\w+ yours|sincerely|regards|wishes|thanks|cheers|love)\s*,)\s*",
    re.IGNORECASE,
)
_WEAK_CUE = re.compile(
    r"\b(?:i am|i'm|i\u2019m|this is|it is|we are|called|named|thank you|thanks)\s*,?\s+", re.IGNORECASE
)
_NAME_WORD = re.compile(r"[^\W\d_](?:\.|[^\W\d_]*(?:['\u2019-][^\W\d_]+)*)")
_GAP = re.compile(r"[ \t]+")
_PARTICLES = frozenset({"van", "von", "der", "den", "de", "del", "della", "di", "da", "la", "le", "al", "el", "bin"})
_TITLES = frozenset({"mr", "mrs", "ms", "miss", "dr", "prof", "doctor", "professor"})
_NOT_NAMES = frozenset(
    {"sir", "madam", "team", "all", "everyone", "friend", "friends", "colleague", "colleagues", "customer", "patient"}
    | {"doctor", "nurse", "pharmacist", "professor", "i", "the", "a", "an", "my", "we", "please", "what", "how", "is"}
    | {
        "dear",
        "hello",
        "hi",
        "hey",
        "good",
        "yours",
        "sincerely",
        "kind",
        "best",
        "regards",
        "wishes",
        "thanks",
        "love",
    }
    | _TITLES
)


class Pii(Section):
    """[[server.filters]] kind = "pii".

    `names` = "mask" keeps a draft whose only fault is a name and puts <name> in its place; its id stays. Every other
    kind of personal data drops the draft. `spacy_model` is read by engine "presidio" only.
    """

    kind: Literal["pii"]
    names: Literal["drop", "mask"] = "drop"
    engine: Literal["regex", "presidio"] = "regex"
    spacy_model: str = "en_core_web_lg"

    def build(self, lab: ServerModels) -> Filter:
        """Return the stage over the lab's public words.

        Raises: ConfigInvalid when engine "presidio" is asked for and it or its spaCy model is not installed.
        """
        analyzer = _presidio(self.spacy_model) if self.engine == "presidio" else None
        return PiiFilter(section=self, public_words=lab.public_words, analyzer=analyzer)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PiiFilter:
    """A `Filter` that looks at one draft at a time. `analyzer` is a presidio AnalyzerEngine or None.

    Without public words only cues find names: every word would be a stranger.
    """

    section: Pii
    public_words: frozenset[str]
    analyzer: Any = None

    def __call__(self, drafts: Sequence[Draft], earlier: Sequence[Draft]) -> Screened:
        """Return the drafts without personal data, names masked if the section says so."""
        del earlier
        kept: list[Draft] = []
        dropped: dict[str, str] = {}
        for draft in drafts:
            named = bool(self._names(draft.instruction) or self._names(draft.response))
            masked = self._masked(draft) if named else draft
            kind = _number_or_address(draft.instruction, draft.response, masked.instruction, masked.response)
            if kind or (named and self.section.names == "drop"):
                dropped[draft.id] = f"pii: {kind or 'name'}"
            else:
                kept.append(masked)
        return Screened(kept=tuple(kept), dropped=dropped)

    def _names(self, passage: str) -> list[_Span]:
        """Return where personal names stand, in order, without overlaps."""
        spans = [*_names_by_cue(passage, self.public_words | _NOT_NAMES)]
        if self.public_words:
            spans += _strangers(passage, self.public_words | _NOT_NAMES)
        if self.analyzer is not None:
            found = self.analyzer.analyze(text=passage, language="en", entities=["PERSON"])
            spans += [_Span(start=hit.start, end=hit.end) for hit in found if hit.score >= PERSON_SCORE]
        return _joined(spans, passage)

    def _masked(self, draft: Draft) -> Draft:
        """Return the draft with <name> for every name; every pass leaves fewer letters outside the masks."""
        passages = [draft.instruction, draft.response]
        for number, passage in enumerate(passages):
            clean = passage
            while spans := self._names(clean):
                for span in reversed(spans):
                    clean = clean[: span.start] + MASK + clean[span.end :]
            passages[number] = clean
        return replace(draft, instruction=passages[0], response=passages[1])


def _joined(spans: Sequence[_Span], passage: str) -> list[_Span]:
    """Return the spans in order, overlaps joined; a mask is taken whole, and left alone when nothing else is in it."""
    masks = [_Span(start=match.start(), end=match.end()) for match in re.finditer(re.escape(MASK), passage)]
    merged: list[_Span] = []
    for span in sorted((*spans, *masks), key=lambda one: (one.start, one.end)):
        if merged and span.start < merged[-1].end:
            merged[-1] = _Span(start=merged[-1].start, end=max(span.end, merged[-1].end))
        else:
            merged.append(span)
    return [span for span in merged if text.words(passage[span.start : span.end].replace(MASK, ""))]


def _holds_email(passage: str) -> bool:
    return bool(_EMAIL.search(passage))


def _holds_iban(passage: str) -> bool:
    return any(_iban_checks(match.group()) for match in _IBAN.finditer(passage))


def _holds_card(passage: str) -> bool:
    return any(_luhn_checks(match.group()) for match in _CARD.finditer(passage))


def _holds_ssn(passage: str) -> bool:
    return bool(_SSN.search(passage))


def _holds_phone(passage: str) -> bool:
    short = _CUED_PHONE.search(passage) or _SHORT_PHONE.search(passage)
    return bool(short) or any(_is_phone(match.group()) for match in _PHONE.finditer(passage))


def _is_phone(candidate: str) -> bool:
    digits = sum(mark.isdigit() for mark in candidate)
    return not _DATE.match(candidate) and (digits >= NATIONAL_DIGITS or candidate.startswith("+"))


def _luhn_checks(candidate: str) -> bool:
    digits = [int(mark) for mark in candidate if mark.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _iban_checks(candidate: str) -> bool:
    """Return whether some prefix of at least 15 characters has a right check sum; words may follow the number."""
    compact = candidate.replace(" ", "")
    values = [str(int(mark, 36)) for mark in compact]
    return any(int("".join((*values[4:end], *values[:4]))) % 97 == 1 for end in range(15, len(values) + 1))


KINDS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("email", _holds_email),
    ("url", text.holds_link),
    ("iban", _holds_iban),
    ("card", _holds_card),
    ("ssn", _holds_ssn),
    ("phone", _holds_phone),
)
"""In order of naming: a card's digits also look like a phone's."""


def _number_or_address(*passages: str) -> str:
    """Return the first kind of personal data other than a name, or nothing."""
    return next((kind for kind, holds in KINDS for passage in passages if holds(passage)), "")


def _names_by_cue(passage: str, public: frozenset[str]) -> Iterator[_Span]:
    for match in _STRONG_CUE.finditer(passage):
        if span := _name_at(passage, match.end(), public, least=1):
            yield span
    for match in _WEAK_CUE.finditer(passage):
        if span := _name_at(passage, match.end(), public, least=2):
            yield span
    for match in re.finditer(r"(?<=\s)of\s+(?=[^\W\d_a-z])", passage):
        if span := _name_before(passage, match.start(), public):
            yield span


def _strangers(passage: str, public: frozenset[str]) -> Iterator[_Span]:
    """Yield runs of two or more capitalised words on one line, none of which holds a public word."""
    run: list[re.Match[str]] = []
    for word in (*_NAME_WORD.finditer(passage), None):
        strange = word is not None and _is_stranger(word.group(), public)
        if run and not (strange and word and _GAP.fullmatch(passage, run[-1].end(), word.start())):
            if len(run) > 1:
                yield _Span(start=run[0].start(), end=run[-1].end())
            run = []
        if strange and word:
            run.append(word)


def _name_at(passage: str, start: int, public: frozenset[str], *, least: int) -> _Span | None:
    """Return the capitalised words at `start` when there are `least` of them and one is not public."""
    while (title := _NAME_WORD.match(passage, start)) and title.group().lower().rstrip(".") in _TITLES:
        start = title.end()
        while passage[start : start + 1] in {".", " "}:
            start += 1
    names: list[str] = []
    position = end = start
    while len(names) < NAME_WORDS and (word := _NAME_WORD.match(passage, position)):
        if word.group()[0].isupper():
            names.append(word.group())
            end = word.end()
        elif word.group() not in _PARTICLES or not names:
            break
        gap = _GAP.match(passage, word.end())
        if gap is None:
            break
        position = gap.end()
    return _Span(start=start, end=end) if len(names) >= least and _unknown(names, public) else None


def _name_before(passage: str, end: int, public: frozenset[str]) -> _Span | None:
    """Return the two capitalised words that end at `end`, blanks aside, when one is not public."""
    match = re.search(r"(\b[^\W\d_a-z][\w'\u2019-]*)\s+([^\W\d_a-z][\w'\u2019-]*)\s+$", passage[:end])
    if match is None or not all(word[0].isupper() for word in match.groups()) or not _unknown(match.groups(), public):
        return None
    return _Span(start=match.start(1), end=match.end(2))


def _unknown(names: Sequence[str], public: frozenset[str]) -> bool:
    """Return whether some word of more than a letter is not public."""
    return any(len(word) > 1 and word not in public for name in names for word in text.words(name))


def _is_stranger(name: str, public: frozenset[str]) -> bool:
    """Return whether a capitalised word has no public part of more than a letter; "I've" and its kin are no names."""
    parts = text.words(name)
    long = [part for part in parts if len(part) > 1]
    return name[0].isupper() and parts[:1] != ["i"] and bool(long) and public.isdisjoint(long)


def _presidio(spacy_model: str) -> Any:
    """Return presidio's engine over a spaCy model that is already on this machine; it would download one otherwise."""
    for package in ("presidio_analyzer", spacy_model):
        if importlib.util.find_spec(package) is None:
            raise ConfigInvalid(f'pii: engine "presidio" needs {package}, which is not installed; or engine = "regex"')
    presidio = importlib.import_module("presidio_analyzer")
    provider = importlib.import_module("presidio_analyzer.nlp_engine").NlpEngineProvider
    models = {"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": spacy_model}]}
    return presidio.AnalyzerEngine(nlp_engine=provider(nlp_configuration=models).create_engine())
