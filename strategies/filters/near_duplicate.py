"""Drops drafts that nearly repeat an earlier synthetic instruction or an earlier one of the same batch.

Two measures, either of which is enough: ROUGE-L F1 and sentence BLEU (the draft against the other text), both over
the words of `fl_app.text`, which know every script. First come, first kept. Compared with synthetic text only:
comparing with private text would be a query of it.

Exact and fast: an inverted index gives, for a draft and all texts before it at once, upper bounds of both measures.

    ROUGE-L F1 <= 2 * m1 / (own + other)             a common subsequence is a common multiset of words
    BLEU <= BP * (p1 * p2 * q3 * q4)^(1/4)           q_n = m2 / (own - n + 1): every common n-gram, n >= 2, starts with
                                                     a different common bigram, so there are at most m2 of them

m1, m2: common words and bigrams with multiplicity; half a match stands for none, as BLEU's smoothing has it. Only
texts whose bound passes a threshold are measured, so no duplicate is missed.

Source: Self-Instruct (2212.10560), ROUGE-L 0.7; KnowledgeSG (2410.05725) filters by BLEU with no published threshold.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from fl_app import text
from fl_app.config import Section
from fl_app.types import Screened

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from fl_app.types import Draft
    from strategies.lab import ServerModels
    from strategies.stages import Filter

    Counts = npt.NDArray[np.int64]
    Bounds = npt.NDArray[np.float64]
    Flags = npt.NDArray[np.bool_]

SLACK = 1e-9
"""Bounds and measures are rounded differently; a bound this close below a threshold is measured all the same."""


class NearDuplicate(Section):
    """[[server.filters]] kind = "near_duplicate": a draft above either threshold (0 to 1) is dropped.

    `max_bleu` 0.6 is an assumption, not studied; `max_rouge_l` 0.7 is Self-Instruct's.
    """

    kind: Literal["near_duplicate"]
    max_rouge_l: Annotated[float, Field(ge=0, le=1)] = 0.7
    max_bleu: Annotated[float, Field(ge=0, le=1)] = 0.6

    def build(self, lab: ServerModels) -> Filter:
        """Return the stage; it asks nothing of the lab."""
        del lab
        return NearDuplicateFilter(section=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicateFilter:
    """A `Filter` that compares every draft with all kept texts before it."""

    section: NearDuplicate

    def __call__(self, drafts: Sequence[Draft], earlier: Sequence[Draft]) -> Screened:
        """Return the drafts that are new; a reason names the text repeated most closely and how closely."""
        everything = (*earlier, *drafts)
        index = _Index([text.words(draft.instruction) for draft in everything])
        ids = [draft.id for draft in everything]
        alive = np.zeros(len(everything), dtype=bool)
        alive[: len(earlier)] = True
        kept: list[Draft] = []
        dropped: dict[str, str] = {}
        for own, draft in enumerate(drafts, start=len(earlier)):
            found = self._closest(index, own, alive)
            if found is None:
                alive[own] = True
                kept.append(draft)
            else:
                dropped[draft.id] = f"near_duplicate: {found.measure} {found.value:.2f} with {ids[found.other][:64]}"
        return Screened(kept=tuple(kept), dropped=dropped)

    def _closest(self, index: _Index, own: int, alive: Flags) -> _Match | None:
        """Return the kept text that `own` repeats most closely, or None when it is new."""
        same = next((other for other in index.same_words(own) if alive[other]), None)
        if same is not None:
            return _Match(measure="same words", value=1.0, other=same)
        words, bigrams = index.words.common(own), index.bigrams.common(own)
        bound = _rouge_l_bound(words, index.lengths, own)
        found = _best(bound, alive, self.section.max_rouge_l, lambda other: index.rouge_l(own, other))
        if found is not None:
            return _Match(measure="rouge_l", value=found[1], other=found[0])
        bound = _bleu_bound(words, bigrams, index.lengths, own)
        found = _best(bound, alive, self.section.max_bleu, lambda other: index.bleu(own, other))
        return None if found is None else _Match(measure="bleu", value=found[1], other=found[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Match:
    measure: str
    value: float
    other: int


def _best(bound: Bounds, alive: Flags, threshold: float, measure: Callable[[int], float]) -> tuple[int, float] | None:
    """Return the text of the largest measure above `threshold` and that measure; the earliest of equals."""
    candidates = np.flatnonzero(alive & (bound > threshold - SLACK))
    best: tuple[int, float] | None = None
    for other in candidates[np.argsort(-bound[candidates], kind="stable")].tolist():
        if best is not None and bound[other] < best[1] - SLACK:
            break
        value = measure(other)
        if value > threshold and (best is None or (value, -other) > (best[1], -best[0])):
            best = (other, value)
    return best


def _rouge_l_bound(words: Counts, lengths: Counts, own: int) -> Bounds:
    """Return an upper bound of ROUGE-L F1 with every text. Shapes: words, lengths, result (texts,)."""
    return 2 * words / np.maximum(lengths + lengths[own], 1)


def _bleu_bound(words: Counts, bigrams: Counts, lengths: Counts, own: int) -> Bounds:
    """Return an upper bound of sentence BLEU with every text. Shapes: as above; `own` is the hypothesis."""
    size = int(lengths[own])
    if size == 0:
        return np.zeros(len(lengths))
    orders = min(size, 4)
    product = np.maximum(words, 0.5) / size
    for order in range(2, orders + 1):
        product = product * np.minimum(np.maximum(bigrams, 0.5) / (size - order + 1), 1.0)
    brevity = np.exp(np.minimum(0.0, 1 - lengths / size))
    return np.where(words > 0, brevity * product ** (1 / orders), 0.0)


class _Index:
    """All texts of one call, by word and by bigram."""

    def __init__(self, texts: Sequence[list[str]]) -> None:
        self.texts = texts
        self.lengths: Counts = np.array([len(tokens) for tokens in texts], dtype=np.int64)
        self.words = _Postings([text.ngrams(tokens, 1) for tokens in texts])
        self.bigrams = _Postings([text.ngrams(tokens, 2) for tokens in texts])
        self._same: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, tokens in enumerate(texts):
            self._same[tuple(tokens)].append(number)

    def same_words(self, own: int) -> Sequence[int]:
        """Return the texts with exactly the words of `own`, in order, itself among them."""
        return self._same[tuple(self.texts[own])]

    def rouge_l(self, own: int, other: int) -> float:
        """Return ROUGE-L F1 of two texts."""
        left, right = self.texts[own], self.texts[other]
        return 2 * text.common_subsequence(left, right) / max(1, len(left) + len(right))

    def bleu(self, own: int, other: int) -> float:
        """Return sentence BLEU of `own` against `other`, 0 to 1."""
        from sacrebleu import sentence_bleu

        left, right = " ".join(self.texts[own]), " ".join(self.texts[other])
        return sentence_bleu(left, [right], tokenize="none").score / 100


class _Postings:
    """n-gram -> the texts that hold it, and how often."""

    def __init__(self, grams: Sequence[Sequence[tuple[str, ...]]]) -> None:
        self._counts = [Counter(own) for own in grams]
        lists: defaultdict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, counts in enumerate(self._counts):
            for gram, count in counts.items():
                lists[gram].append((number, count))
        self._holders: dict[tuple[str, ...], Counts] = {
            gram: np.array(pairs, dtype=np.int64).T for gram, pairs in lists.items() if len(pairs) > 1
        }

    def common(self, own: int) -> Counts:
        """Return how many n-grams `own` shares with every text, with multiplicity. Shapes: result (texts,)."""
        total = np.zeros(len(self._counts), dtype=np.int64)
        for gram, count in self._counts[own].items():
            if gram in self._holders:
                holders, counts = self._holders[gram]
                total[holders] += np.minimum(counts, count)
        return total
