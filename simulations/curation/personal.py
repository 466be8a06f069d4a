"""The pii filter's engine over everything that would be released, answers included: how many texts, of which kind.

The filter judged drafts before a professional answered; answers have been seen by nobody. Out of scope: what the
patterns do not know (`strategies.filters.pii` says what that is).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fl_app import text
from fl_app.types import Draft, Origin
from strategies.filters.pii import Pii

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NOWHERE = Origin(round=0, method="curation", code="", stream="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Personal:
    """Texts read, and how many hold personal data, by kind. `flagged` are their places among the texts read."""

    texts: int
    by_kind: Mapping[str, int]
    flagged: tuple[int, ...]
    public_words: int


def scan(texts: Sequence[str], public: Sequence[str] = ()) -> Personal:
    """Return how many texts hold personal data; words of `public` texts are nobody's name.

    Without public words only names after a cue are found, as in the filter.
    """
    known = frozenset(word for one in public for word in text.words(one))
    lab: Any = SimpleNamespace(public_words=known)
    judge = Pii(kind="pii").build(lab)
    drafts = [Draft(id=str(place), instruction=one, response="", origin=_NOWHERE) for place, one in enumerate(texts)]
    dropped = judge(drafts, ()).dropped
    kinds = Counter(reason.removeprefix("pii: ") for reason in dropped.values())
    return Personal(
        texts=len(texts),
        by_kind=dict(sorted(kinds.items())),
        flagged=tuple(sorted(int(place) for place in dropped)),
        public_words=len(known),
    )
