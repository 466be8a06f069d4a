"""Every filter keeps the promises of `strategies.stages.Filter`."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fl_app import models
from fl_app.types import Draft, Origin, VectorRelease
from strategies.filters import AnyFilter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.models import FrozenModel
    from strategies.stages import Filter

MAX_REASON = 120
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "length": [{}, {"min_words": 2, "require_question": True, "require_end": True, "echoes": ["letter to"]}],
    "near_duplicate": [{}, {"max_rouge_l": 0.3, "max_bleu": 0.1}, {"max_rouge_l": 1.0, "max_bleu": 1.0}],
    "domain": [{"question": "Is it medical? {text}"}, {"question": "{text}", "threshold": 1.5}],
    "pii": [{}, {"names": "mask"}],
    "site_share": [{}, {"max_share": 1.0}, {"max_share": 1.2, "min_voices": 3}],
    "kernel_density": [
        {"embedder": {"kind": "local"}, "dim": 8, "keep": 2},
        {"embedder": {"kind": "local"}, "dim": 8, "keep": 3, "by": "all"},
    ],
}
CASES = [(kind, options) for kind, rows in SETTINGS.items() for options in rows]
PIECES = [
    *["my name is", "Anna", "Bob Quill", "Dear", "Dr", "of Harbour", "tincture", "the", "fever", "helps", "please"],
    *["anna@b.cd", "555-123-4567", "http://x.y", "?", ".", "\n", ",", "<name>", "(", "123-45-6789", "Yours,", "van"],
    *["4111 1111 1111 1111", "I am", "\u200b", "### ", "Ärztin", "'", "-", "<|im_end|>"],
]
PASSAGES = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=14).map(" ".join),
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.text(max_size=30),
)


@dataclass(frozen=True)
class _FakeLikelihood:
    log_prob: float
    tokens: int = 1
    bytes: int = 3


class _FakeModel:
    """Odds are a hash of the prompt, so they depend on nothing else."""

    name = "fake"

    def chat(self, user: str) -> str:
        return f"<user>{user}<assistant>"

    def option_likelihood(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]]
    ) -> list[list[_FakeLikelihood]]:
        def score(text: str) -> float:
            return -hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] / 32

        return [[_FakeLikelihood(score(p + o)) for o in row] for p, row in zip(prompts, options, strict=True)]


class _FakeLab:
    professional = _FakeModel()
    public_words = frozenset({"tincture", "fever", "the", "harbour"})
    surveys: ClassVar[dict[str, VectorRelease]] = {
        "abbey": VectorRelease(vectors={"kernel": np.linspace(-3, 5, 8, dtype=np.float32)})
    }

    @property
    def local(self) -> FrozenModel:
        return models.load("tiny-random", "float32")


def voice_of(text: str) -> str:
    """Return one of four voices by the text: some write much, some not at all."""
    return "abcd"[hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % 4]


def drafts_of(texts: list[tuple[str, str]], *, round_number: int) -> tuple[Draft, ...]:
    origin = [
        Origin(round=round_number, method="m", code="farm/cough/dose", stream=str(i), voice=voice_of(text))
        for i, (text, _) in enumerate(texts)
    ]
    return tuple(
        Draft(id=f"{round_number}-{i}", instruction=a, response=b, origin=origin[i]) for i, (a, b) in enumerate(texts)
    )


def build(kind: str, options: dict[str, Any]) -> Filter:
    section: Any = TypeAdapter(AnyFilter).validate_python({"kind": kind, **options})
    return section.build(_FakeLab())


def test_every_member_of_the_union_is_tested() -> None:
    members = get_args(get_args(AnyFilter)[0])
    assert {get_args(member.model_fields["kind"].annotation)[0] for member in members} == set(SETTINGS)


@pytest.mark.parametrize(("kind", "options"), CASES)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.lists(st.tuples(PASSAGES, st.one_of(st.just(""), PASSAGES)), max_size=6),
    before=st.lists(st.tuples(PASSAGES, st.just("")), max_size=4),
)
def test_filter_contract(
    kind: str, options: dict[str, Any], batch: list[tuple[str, str]], before: list[tuple[str, str]]
) -> None:
    stage = build(kind, options)
    drafts, earlier = drafts_of(batch, round_number=2), drafts_of(before, round_number=1)
    copies = copy.deepcopy((drafts, earlier))
    result = stage(drafts, earlier)

    assert (drafts, earlier) == copies, "inputs are not changed"
    kept = [draft.id for draft in result.kept]
    assert kept == [draft.id for draft in drafts if draft.id not in result.dropped], "kept is a subsequence"
    assert len(kept) + len(result.dropped) == len(drafts), "every draft has a fate"
    assert set(result.dropped) <= {draft.id for draft in drafts}
    if options.get("names") != "mask":
        assert set(result.kept) <= set(drafts), "kept drafts are the drafts themselves"
    for reason in result.dropped.values():
        assert reason
        assert len(reason) <= MAX_REASON
        assert reason.isprintable()
    assert build(kind, options)(drafts, earlier) == result, "deterministic"
    again = stage(result.kept, earlier)
    assert again.kept == result.kept, "idempotent"
    assert not again.dropped


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_nothing_in_nothing_out(kind: str, options: dict[str, Any]) -> None:
    result = build(kind, options)((), ())
    assert result.kept == ()
    assert not result.dropped
