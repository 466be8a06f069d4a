"""Long runs of words that a draft shares with other texts: how many drafts, how long the runs, never the words.

A run is a sequence of words, as `fl_app.text` cuts them, that stands in a draft and in one row of a corpus. Runs below
`SHORTEST` words are in any two texts of one field and are not looked at. What also stands in a public text is no sign
of memory, so each figure is given twice: for all runs, and for those that no public row contains. Without public texts
the two are the same.

Against the sites' own rows this is a query of private data, and nothing here adds noise: the figures are for the data
holder's eyes, and belong into no card, page or dataset that is released.

Source: longest exact overlap as the measure of memorised text: Carlini et al. 2023 (2202.07646), section 3, 50 tokens;
13-grams as a mark of contamination: Brown et al. 2020 (2005.14165), appendix C; 8-grams: Chowdhery et al. 2022
(2204.02311), section 8. Ours counts words, not tokens of a model.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from fl_app import text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from simulations.curation.evidence import Written

SHORTEST = 5
MARKS = (8, 13, 50)
FIRST = 20
"""How many drafts are named, the longest runs first: as many as a person looks at."""

Runs: TypeAlias = "set[tuple[int, int]]"
"""Where runs of one draft stand: from word, to word (exclusive); none is inside another run of the same row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """A draft by its id, and its longest run; `beyond_public` is the longest that no public row contains."""

    draft: str
    words: int
    longest: int
    beyond_public: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """What a corpus and the drafts share. `at_least` maps a length to how many drafts have such a run.

    `overlap` is the share of the drafts' n-grams of `SHORTEST` words that stand in the corpus, None when there are
    none; `whole` counts drafts that are one run from end to end.
    """

    drafts: int
    rows: int
    longest: int
    beyond_public: int
    at_least: Mapping[str, int]
    at_least_beyond_public: Mapping[str, int]
    overlap: float | None
    whole: int
    nearest: tuple[Near, ...]


def scan(drafts: Sequence[Written], corpus: Sequence[str], public: Sequence[str] = ()) -> Copies:
    """Return what drafts share with a corpus; `public` texts excuse the runs that they contain.

    Guarantee: no word of the corpus is in what is returned.
    """
    words = [text.words(draft.text) for draft in drafts]
    here, there = _runs(words, corpus), _runs(words, public)
    near: list[Near] = []
    shared = grams = 0
    for draft, own, found, known in zip(drafts, words, here, there, strict=True):
        fresh = [run for run in found if not any(low <= run[0] and run[1] <= high for low, high in known)]
        near.append(Near(draft=draft.id, words=len(own), longest=_longest(found), beyond_public=_longest(fresh)))
        covered = {place for low, high in found for place in range(low, high - SHORTEST + 1)}
        shared, grams = shared + len(covered), grams + max(0, len(own) - SHORTEST + 1)
    order = sorted(near, key=lambda one: (-one.beyond_public, -one.longest, one.draft))
    return Copies(
        drafts=len(drafts),
        rows=len(corpus),
        longest=max((one.longest for one in near), default=0),
        beyond_public=max((one.beyond_public for one in near), default=0),
        at_least={str(mark): sum(one.longest >= mark for one in near) for mark in MARKS},
        at_least_beyond_public={str(mark): sum(one.beyond_public >= mark for one in near) for mark in MARKS},
        overlap=shared / grams if grams else None,
        whole=sum(one.longest == one.words >= SHORTEST for one in near),
        nearest=tuple(one for one in order if one.longest)[:FIRST],
    )


def _longest(runs: Iterable[tuple[int, int]]) -> int:
    return max((high - low for low, high in runs), default=0)


def _runs(drafts: Sequence[Sequence[str]], corpus: Sequence[str]) -> list[Runs]:
    """Return where each draft shares runs of at least `SHORTEST` words with rows of the corpus.

    Only n-grams of drafts are kept in memory; the corpus is read once, row by row.
    """
    places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for number, own in enumerate(drafts):
        for begin, gram in enumerate(text.ngrams(own, SHORTEST)):
            places[gram].append((number, begin))
    found: list[Runs] = [set() for _ in drafts]
    for row in dict.fromkeys(corpus):
        words = text.words(row)
        for there, gram in enumerate(text.ngrams(words, SHORTEST)):
            for number, begin in places.get(gram, ()):
                own = drafts[number]
                if begin and there and own[begin - 1] == words[there - 1]:
                    continue  # the run began earlier and has been followed from there
                length = SHORTEST
                limit = min(len(own) - begin, len(words) - there)
                while length < limit and own[begin + length] == words[there + length]:
                    length += 1
                found[number].add((begin, begin + length))
    return found
