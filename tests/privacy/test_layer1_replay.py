"""Layer 1 of the proof: two neighbouring data sets, one record of noise, and nothing that tells them apart but the sum.

Every private learner runs on D with all noise and all decisions written down, then on D' = D with one more unit under
the same record. What it asks of the noise source must be the same; the sums must differ by the clip norm at most, and
by nothing when the unit was not drawn; a row must contribute the same bits in every company.

A check is a function here, so that each can be shown to fail: the twins break the engine on purpose.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from clients import per_example
from clients.per_example import clipped_sum
from fl_app import lora, models, sequences
from fl_app.errors import LedgerRefusal
from fl_app.privacy import gaussian
from fl_app.sequences import TokenSequence
from tests.privacy.replay import (
    CLIP,
    EXPECTED,
    FACTORS,
    Observed,
    Recording,
    active,
    begin,
    build,
    observe,
    private_kinds,
    rows_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

    Make = Callable[[int], Adapter]

KINDS = private_kinds()
UNITS = {"record": 1, "patient": 3}
STEPS = 14
REL = 1e-5
STILL = 1e-30
"""A learning rate that moves no float32 factor, so that every step is a first step."""
NAN_ROW, INF_ROW, STEEP_ROW = "poison n", "poison i", "poison s"


def pool(rng: np.random.Generator, unit: str) -> list[list[str]]:
    """Return ten units of random texts: one row each, or one to three."""
    sizes = rng.integers(1, UNITS[unit] + 1, 10)
    return [[some_text(rng) for _ in range(size)] for size in sizes]


def some_text(rng: np.random.Generator) -> str:
    return "".join(map(chr, rng.integers(33, 127, int(rng.integers(1, 30)))))


def extras(rng: np.random.Generator, unit: str, shared: list[list[str]]) -> dict[str, list[str]]:
    """Return the units that D' has and D has not."""
    most = UNITS[unit]
    return {
        "plain": [some_text(rng) for _ in range(most)],
        "without text": [""] * most,
        "one token": ["a"] * most,
        "of the largest length": ["x" * (24 - len("A cough:"))] * most,
        "over-long": ["y" * 500] * most,
        "not ascii": ["\u200b\U0001f600 ü"] * most,
        "somebody who is there already": (shared[0] * most)[:most],
        "not a number": [NAN_ROW] + [some_text(rng)] * (most - 1),
        "infinite": [INF_ROW] * most,
        "as steep as can be": [STEEP_ROW] * most,
    }


@pytest.fixture
def poisoned(frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the losses of three texts be NaN, infinite, or steeper than any model's, whatever kind of loss it is."""
    plain = sequences.Scored.means
    ids = {t: tuple(frozen.tokenizer(t)["input_ids"]) for t in (NAN_ROW, INF_ROW, STEEP_ROW)}
    factors = {NAN_ROW: float("nan"), INF_ROW: float("inf"), STEEP_ROW: 1e6}

    def means(self: Any, losses_N: Any, batch: Any) -> Any:
        import torch

        scale = torch.ones(batch.ids_BT.shape[0])
        for row, key in enumerate(batch.keys):
            for text, tokens in ids.items():
                if tokens == key.ids[key.loss_from : key.loss_from + len(tokens)]:
                    scale[row] = factors[text]
        return plain(self, losses_N, batch) * scale

    monkeypatch.setattr(sequences.Scored, "means", means)


def neighbours(
    kind: str, unit: str, seed: int, frozen: FrozenModel, start: Adapter, only: Sequence[str] = ()
) -> list[tuple[str, Observed, Observed, np.ndarray]]:
    """Return (what D' has more, run on D, run on D', whether the extra unit was drawn in each step)."""
    rng = np.random.default_rng(seed)
    learner = build(kind, steps=STEPS, clip_norm=CLIP, learning_rate=STILL, micro_batch_tokens=64)
    start = begin(start, kind)
    run = functools.partial(observe, learner, frozen=frozen, start=start, unit=unit, max_rows_per_unit=UNITS[unit])
    shared = pool(rng, unit)
    drawn = [rng.permutation(len(shared))[: rng.integers(0, 4)].tolist() for _ in range(STEPS)]
    drawn[0] = []  # an empty sample, and in D' the extra unit alone
    base = run(rows_of(shared), Recording(decisions=drawn, rng=rng))
    found = []
    for name, extra in extras(rng, unit, shared).items():
        if only and name not in only:
            continue
        place = int(rng.integers(0, len(shared) + 1))
        with_extra = rng.random(STEPS) < 0.92
        with_extra[0] = True
        moved = [
            [index + (index >= place) for index in indices] + ([place] if more else [])
            for indices, more in zip(drawn, with_extra, strict=True)
        ]
        more = run(rows_of([*shared[:place], extra, *shared[place:]]), base.noise.replay(moved))
        found.append((name, base, more, with_extra))
    return found


def check_alike(base: Observed, more: Observed) -> None:
    """The noise source was asked the same: kinds, rates and shapes of all calls, one sample and the active factors a
    step."""
    assert base.noise.calls == more.noise.calls
    assert [call for call, _ in base.noise.calls].count("sample") == STEPS == len(base.sums) == len(base.seen)
    assert sum(values.size for values in base.noise.normals) == base.coordinates
    assert len(more.noise.counts) == STEPS
    assert set(np.subtract(more.noise.counts, base.noise.counts)) == {1}


def check_sensitivity(base: Observed, more: Observed, drawn: np.ndarray) -> np.ndarray:
    """The extra unit moves a sum by the usable clip at most, what AdamW sees by the clip at most, and nothing if it was
    not drawn. Returns how far it moved each sum, as a share of the usable clip."""
    moved = np.linalg.norm(more.sums - base.sums, axis=1)
    assert np.isfinite(moved).all()
    assert (moved <= gaussian.usable_clip(CLIP) * (1 + REL)).all(), moved.max() / CLIP
    assert np.array_equal(more.sums[~drawn], base.sums[~drawn])
    seen = np.linalg.norm(more.seen - base.seen, axis=1)
    assert (seen <= CLIP * (1 + REL)).all(), seen.max() / CLIP
    assert np.array_equal(more.seen[~drawn], base.seen[~drawn])
    return moved[drawn] / gaussian.usable_clip(CLIP)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", [0, 1], ids=["pool", "second-pool"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_neighbour_moves_the_sum_by_the_clip_at_most(
    kind: str, unit: str, seed: int, frozen: FrozenModel, learned: Make
) -> None:
    """In each combination 10 extra units x 14 steps, nine tenths of them with the unit: 120 neighbours and more."""
    shares: dict[str, np.ndarray] = {}
    for name, base, more, drawn in neighbours(kind, unit, seed, frozen, learned(5)):
        check_alike(base, more)
        shares[name] = check_sensitivity(base, more, drawn)
    assert sum(map(len, shares.values())) >= 120
    # Not vacuous: the clip is reached, by a whole unit as by a row; a row that is not finite adds nothing at all.
    assert 0.99 < max(map(max, shares.values())) <= 1 + REL
    assert set(shares["infinite"]) == {0.0}
    assert max(shares["not a number"]) <= (UNITS[unit] - 1) / UNITS[unit] * (1 + REL)
    assert min(shares["as steep as can be"]) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_and_somebody_are_neighbours_too(kind: str, frozen: FrozenModel, learned: Make) -> None:
    learner = build(kind, steps=STEPS, clip_norm=CLIP, learning_rate=STILL)
    run = functools.partial(observe, learner, frozen=frozen, start=begin(learned(5), kind))
    base = run(rows_of([]), Recording(decisions=[], rng=np.random.default_rng(0)))
    more = run(rows_of([["somebody"]]), base.noise.replay([[0]] * STEPS))
    check_alike(base, more)
    check_sensitivity(base, more, np.ones(STEPS, bool))
    assert not base.sums.any()
    assert base.seen.any(axis=1).all()


def check_post_processing(found: Observed, start: Adapter, kind: str, **options: float) -> None:
    """The release is, to the bit, what AdamW makes of the start and of what was seen, and of nothing else."""
    import torch

    factors = named(start)
    turns = active(kind, len(found.seen))
    moving = {name: torch.nn.Parameter(torch.tensor(values)) for name, values in factors.items()}
    rate = options["learning_rate"]
    twice = 2 if kind == "dp_la_lora" else 1
    groups = [{"params": [one], "lr": rate * (twice if name.endswith(".b") else 1)} for name, one in moving.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    for seen, turn in zip(found.seen / EXPECTED, turns, strict=True):
        optimizer.zero_grad()
        place = 0
        for name, weight in moving.items():
            if name.rsplit(".", 1)[-1] in {FACTORS[letter] for letter in turn}:
                part = seen[place : place + weight.numel()]
                weight.grad = torch.from_numpy(part.astype(np.float32)).view_as(weight)
                place += weight.numel()
        optimizer.step()
    for name, values in named(found.release).items():
        layer, _, factor = name.rpartition(".")
        expected = moving[name].detach().numpy()
        if kind == "dp_fedsa_lora" and factor == "b":  # what moved is kept, and what is released did not move
            assert found.kept is not None
            assert np.array_equal(found.kept[layer], expected)
            expected = factors[name]
        assert np.array_equal(values, expected), name


def named(adapter: Adapter) -> dict[str, np.ndarray]:
    """Return an adapter's factors by name, in the order in which a learner sees them."""
    found: dict[str, np.ndarray] = {}
    for name, factors in sorted(adapter.layers.items()):
        found |= lora.named_factors(name, factors)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_release_is_made_of_noised_sums_alone(kind: str, frozen: FrozenModel, learned: Make) -> None:
    options = {"learning_rate": 1e-2}
    learner = build(kind, steps=5, clip_norm=CLIP, **options)
    noise = Recording(decisions=[[0, 1, 2]] * 5, rng=np.random.default_rng(0))
    start = begin(learned(5), kind)
    found = observe(learner, rows_of([["one"], ["two"], ["three"]]), noise, frozen=frozen, start=start)
    check_post_processing(found, start, kind, **options)
    with pytest.raises(AssertionError):  # the twin: another start, as if a sum had been added past the optimizer
        check_post_processing(found, begin(learned(6), kind), kind, **options)


def without_clip(total: np.ndarray, rows: Any, *_: Any) -> None:
    total += rows.sum(0).numpy()


def clipped_in_parts(total: np.ndarray, rows: Any, clip_norm: float) -> None:
    """Each run of 256 coordinates to C by itself, as if every factor had a clip of its own."""
    parts = rows.split(256, dim=1)
    total += np.concatenate([(p * (clip_norm / p.norm(dim=1)).clamp(max=1.0)[:, None]).sum(0).numpy() for p in parts])


@pytest.mark.parametrize("twin", [without_clip, clipped_in_parts])
def test_a_clip_that_is_none_is_caught(
    twin: Any, frozen: FrozenModel, learned: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_example, "_add_clipped", twin)
    ((_, base, more, drawn),) = neighbours("dp_lora", "record", 0, frozen, learned(5), ["plain"])
    with pytest.raises(AssertionError):
        check_sensitivity(base, more, drawn)


def test_rows_clipped_one_by_one_are_caught_where_a_unit_has_three(frozen: FrozenModel, learned: Make) -> None:
    """The twin: three rows of one person under a policy that says one."""
    learner = build("dp_lora", steps=STEPS, clip_norm=CLIP, learning_rate=STILL)
    run = functools.partial(observe, learner, frozen=frozen, start=learned(5), unit="patient")
    base = run(rows_of([["a b c"]]), Recording(decisions=[], rng=np.random.default_rng(0)))
    more = run(rows_of([["a b c"], ["x y"] * 3]), base.noise.replay([[1]] * STEPS))
    with pytest.raises(AssertionError):
        check_sensitivity(base, more, np.ones(STEPS, bool))


@pytest.mark.usefixtures("poisoned")
def test_a_row_that_is_not_finite_and_passes_is_caught(
    frozen: FrozenModel, learned: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: the release refuses the sum, which tells D' from D; so the row must never get that far."""
    plain = per_example._add_clipped

    def passing(total: np.ndarray, rows: Any, *rest: Any) -> None:
        plain(total, rows, *rest)
        total += (rows.sum(0) * 0).numpy()

    monkeypatch.setattr(per_example, "_add_clipped", passing)
    with pytest.raises(LedgerRefusal, match="not finite"):
        neighbours("dp_lora", "record", 0, frozen, learned(5), ["infinite"])


def test_a_step_that_listens_to_the_rows_is_caught(frozen: FrozenModel, learned: Make) -> None:
    """The twins: what an engine would have asked of its noise source, had it listened."""
    ((_, base, more, drawn),) = neighbours("dp_lora", "record", 0, frozen, learned(5), ["plain"])
    check_alike(base, more)
    calls = list(base.noise.calls)
    twins = {
        "a step more": [*calls, *calls[-9:]],
        "no Poisson sample": [call for call in calls if call[0] != "sample"],
        "the empty step left out": calls[9:],
        "a rate from the count": [(name, 0.4 if name == "sample" else what) for name, what in calls],
    }
    for twin in twins.values():
        more.noise.calls[:] = twin
        with pytest.raises(AssertionError):
            check_alike(base, more)
    sizes = np.array([max(1, len(indices)) for indices in base.noise.decisions])
    base.seen[:] *= (EXPECTED / sizes)[:, None]
    more.seen[:] *= (EXPECTED / (sizes + drawn))[:, None]
    with pytest.raises(AssertionError):  # divided by who was there
        check_sensitivity(base, more, drawn)


# --- isolation: the same bits in every company


LOSSES = sequences.example_losses


def token_mean(model: Any, batch: Any, *rest: Any) -> Any:
    """The twin that couples rows: every row's loss over the number of tokens of its batch."""
    counts = batch.loss_mask_BT.sum(dim=1)
    return LOSSES(model, batch, *rest) * counts / counts.clamp(min=1).sum()


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float32 kept", "bfloat16 kept"])
def model(request: pytest.FixtureRequest, learned: Make) -> Any:
    """Both types; and a model with nothing trained in its first block, whose states are then computed once and kept."""
    dtype, _, kept = request.param.partition(" ")
    adapter = learned(7)
    if kept:
        upper = {name: factors for name, factors in adapter.layers.items() if ".1." in name}
        adapter = dataclasses.replace(adapter, layers=upper)
    return lora.attach(models.load("tiny-random", dtype), adapter)


def some_examples(rng: np.random.Generator, lengths: Sequence[int]) -> list[TokenSequence]:
    return [
        TokenSequence(ids=tuple(rng.integers(3, 259, n).tolist()), loss_from=int(rng.integers(1, n))) for n in lengths
    ]


def summed(model: Any, examples: Sequence[TokenSequence], limit: int, frozen: Any = None) -> np.ndarray:
    found = clipped_sum(model, examples, clip_norm=CLIP, max_batch_tokens=limit, pad_id=0, frozen=frozen)
    return np.concatenate([tensor.ravel() for tensor in found.tensors])


def check_isolation(model: Any, limit: int) -> None:
    """Rows of 2 to 40 tokens, alone and first and amid 1 to 12 others: the same bits go into the sum, and the
    sum of float64 moves by what the row adds alone. Frozen states are made in whichever company asks for them first."""
    rng = np.random.default_rng(limit)
    first_block = sequences.first_adapted_block(per_example.trained(model))
    assert sequences.can_be_cut(model, first_block) == (first_block > 0)

    def fresh() -> Any:
        return sequences.FrozenPrefix(first_block=first_block) if first_block else None

    added: set[bytes] = set()
    plain = per_example._add_clipped

    def keep(total: Any, rows: Any, *rest: Any) -> None:
        added.update(row.numpy().tobytes() for row in rows)
        plain(total, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(per_example, "_add_clipped", keep)
        for length in (2, 4, 16, 17, 40):
            (own,) = some_examples(rng, [length])
            summed(model, [own], limit)  # an engine may try itself on other rows first
            added.clear()
            alone = summed(model, [own], limit, fresh())
            (bits,) = added
            for size in (1, 3, 12):
                company, frozen = some_examples(rng, rng.integers(2, 41, size).tolist()), fresh()
                for place in {0, size // 2 + 1}:
                    added.clear()
                    together = summed(model, [*company[:place], own, *company[place:]], limit, frozen)
                    assert bits in added
                    without = summed(model, company, limit, frozen)
                    assert np.abs(together - without - alone).max() <= 2.0**-50 * np.abs(together).max()


@pytest.mark.parametrize("limit", [64, 512])
def test_a_row_contributes_the_same_bits_in_every_company(model: Any, limit: int) -> None:
    check_isolation(model, limit)


@pytest.mark.parametrize(
    ("model", "twin"),
    [
        ("float32", "token mean"),
        ("float32", "shared width"),
        ("float32", "float32 total"),
        ("bfloat16", "token mean"),
        ("bfloat16", "float32 total"),  # on this model no width changes a bit of bfloat16
    ],
    indirect=["model"],
)
def test_a_coupled_row_is_caught(twin: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The engine's own probe would notice a coupled loss and train rows one by one; here it is told to trust.
    monkeypatch.setattr(per_example, "_rows_keep_apart", lambda *_: True)
    if twin == "token mean":
        monkeypatch.setattr(sequences, "example_losses", token_mean)
    elif twin == "shared width":
        packed = functools.partial(sequences.micro_batches, max_batch_tokens=512, pad_id=0)
        monkeypatch.setattr(sequences, "isolated_batches", lambda examples, **_: packed(examples))
    else:
        plain = per_example._add_clipped

        def rounded(total: Any, rows: Any, *rest: Any) -> None:
            plain(total, rows, *rest)
            total[:] = total.astype(np.float32)

        monkeypatch.setattr(per_example, "_add_clipped", rounded)
    with pytest.raises(AssertionError):
        check_isolation(model, 512)


def test_micro_batches_only_split_the_sum(model: Any) -> None:
    rng = np.random.default_rng(0)
    examples = some_examples(rng, rng.integers(2, 41, 12).tolist())
    expected = summed(model, examples, 1)
    for limit in (64, 100, 512):
        assert np.linalg.norm(summed(model, examples, limit) - expected) <= 1e-6 * np.linalg.norm(expected)
    # The twin: a mean per micro-batch is not a sum.
    means = (summed(model, examples[:3], 512) / 3 + summed(model, examples[3:], 512) / 9) * 6
    assert np.linalg.norm(means - expected) > 1e-3 * np.linalg.norm(expected)
