"""Cores and blocks in the engine: their products against autograd, dense arithmetic, and rows in any company."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from clients import per_example
from clients.dp_steps import select
from clients.learners import AnyLearner
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app import kernels, lora, lora_start, sequences
from fl_app.config import LoraSection
from fl_app.errors import AdapterMismatch
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import Adapter, LoraFactors
from tests.unit import test_lora_linear
from tests.unit.test_lora_linear import CUTTABLE, FAMILIES, TARGETS, by_loop, clipped, distance, make, some_examples

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_app.models import FrozenModel

RANK = 3


def spec_of(frozen: FrozenModel, family: str, first_layer: int = 0) -> Any:
    section = LoraSection(rank=RANK, alpha=6.0, targets=TARGETS[family], first_layer=first_layer)
    return dataclasses.replace(lora.spec_of(frozen, section), core=True)


def cored(frozen: FrozenModel, family: str, first_layer: int = 0) -> Adapter:
    """Return an adapter with orthonormal a and b and cores that have learned something."""
    rng = np.random.default_rng(8)
    start = lora_start.initial(spec_of(frozen, family, first_layer), rng)
    for factors in start.layers.values():
        assert factors.core is not None
        factors.core[:] = rng.normal(0, 0.3, factors.core.shape)
    return start


def block(start: Adapter, seed: int, rank: int) -> Adapter:
    """Return a frozen adapter for the same maps, of another rank and scaling."""
    rng = np.random.default_rng(seed)
    layers = {
        name: LoraFactors(
            a=rng.normal(0, one.a.shape[1] ** -0.5, (rank, one.a.shape[1])).astype(np.float32),
            b=rng.normal(0, 0.2, (one.b.shape[0], rank)).astype(np.float32),
        )
        for name, one in start.layers.items()
    }
    return Adapter(layers=layers, alpha=1.5 * rank, base=start.base)


def adapted(family: str, dtype: str = "float32", *, blocks: bool = False, first_layer: int = 0) -> Any:
    frozen = make(family, dtype)
    start = cored(frozen, family, first_layer)
    under = [block(start, 1, 2), block(start, 2, 4)] if blocks else []
    return lora.attach(frozen, start, under, keep_cores=True)


def merged(frozen: FrozenModel, *adapters: Adapter) -> FrozenModel:
    """Return the model with the dense delta_W of these adapters in its own weights: the oracle."""
    import torch

    found = frozen.replica(own_weights=True)
    for adapter in adapters:
        for name in adapter.layers:
            module: Any = found.model.get_submodule(name)
            delta = lora.delta(adapter, name)
            delta = delta.T if type(module).__name__ == "Conv1D" else delta
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(module.weight.double().numpy() + delta))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", [False, True])
def test_what_is_attached_computes_what_dense_weights_do(family: str, blocks: bool) -> None:
    import torch

    frozen = make(family)
    start = cored(frozen, family)
    under = [block(start, 1, 2), block(start, 2, 4)] if blocks else []
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = merged(frozen, start, *under).model(input_ids=ids).logits
        for keep in (True, False):
            found = lora.attach(frozen, start, under, keep_cores=keep)(input_ids=ids).logits
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        without = lora.attach(frozen, dataclasses.replace(start, alpha=0.0), under)(input_ids=ids).logits
    assert not torch.allclose(without, expected, atol=1e-2)  # the twin: the core is heard


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("moving", [("core",), ("a", "b", "core")], ids=str)
def test_the_clipped_sum_is_that_of_a_loop(family: str, blocks: bool, moving: tuple[Any, ...]) -> None:
    model, examples = adapted(family, blocks=blocks), some_examples()
    names = list(lora.parameters(model))
    sizes = [weight.numel() for weight in lora.parameters(model).values()]
    gradients = by_loop(model, examples)
    mask = np.repeat([name.rsplit(".", 1)[-1] in moving for name in names], sizes)
    gradients = gradients[:, mask]
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    clip = float(np.median(norms))
    expected = (gradients * np.minimum(1, clip / norms)).sum(0)
    select(model, moving)
    assert distance(clipped(model, examples, clip), expected) <= 1e-5
    assert distance(clipped(model, examples, clip, engine="opacus"), expected) <= 1e-5
    assert distance(gradients.sum(0), expected) > 1e-2  # the twin: the clip matters here


@pytest.mark.parametrize("family", FAMILIES)
def test_over_blocks_alone_it_is_that_of_a_loop_too(family: str) -> None:
    frozen = make(family)
    start = lora.plain(cored(frozen, family))
    model, examples = lora.attach(frozen, start, [block(start, 1, 2), block(start, 2, 4)]), some_examples()
    gradients = by_loop(model, examples)
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    clip = float(np.median(norms))
    expected = (gradients * np.minimum(1, clip / norms)).sum(0)
    assert distance(clipped(model, examples, clip), expected) <= 1e-5
    assert distance(clipped(model, examples, clip, engine="opacus"), expected) <= 1e-5
    bare = lora.attach(frozen, start)
    assert distance(clipped(bare, examples, clip), expected) > 1e-2  # the twin: the blocks are part of the model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_one_row_alone_is_autograds(family: str) -> None:
    model = adapted(family, blocks=True)
    select(model, ("core",))
    for example in some_examples(3):
        names = list(lora.parameters(model))
        sizes = [weight.numel() for weight in lora.parameters(model).values()]
        mask = np.repeat([name.endswith(".core") for name in names], sizes)
        for weight in lora.parameters(model).values():
            weight.requires_grad_(True)
        expected = by_loop(model, [example])[0][mask]
        select(model, ("core",))
        assert distance(clipped(model, [example], 1e9), expected) <= 2e-6


def test_the_plain_sum_has_cores_too() -> None:
    model, examples = adapted("llama", blocks=True), some_examples()
    expected = by_loop(model, examples).sum(0)
    found = per_example.plain_sum(model, examples, max_batch_tokens=96, pad_id=0)
    assert distance(np.concatenate([t.ravel() for t in found]), expected) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_row_has_the_same_bits_in_any_company(family: str, dtype: str, blocks: bool) -> None:
    model = adapted(family, dtype, blocks=blocks)
    select(model, ("core",))
    mine = some_examples(1, seed=3)
    alone = clipped(model, mine, 0.1)
    for seed in range(3):
        company = some_examples(9, seed=10 + seed)
        without = clipped(model, company, 0.1)
        for place in (0, 9):
            together = clipped(model, [*company[:place], *mine, *company[place:]], 0.1)
            assert np.abs((together - without) - alone).max() <= 1e-15


def test_a_row_as_steep_as_can_be_stays_within_the_joint_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """All cores of all layers share one clip; each by itself, as the twin has it, would reach sqrt(layers) times it."""
    model = adapted("llama")
    select(model, ("core",))
    company, steep = some_examples(4, seed=1), some_examples(1, seed=2)
    own = sequences.Scored.means

    def means(self: Any, losses_N: Any, batch: Any) -> Any:
        import torch

        return own(self, losses_N, batch) * torch.tensor([1e6 if key is steep[0] else 1.0 for key in batch.keys])

    monkeypatch.setattr(sequences.Scored, "means", means)
    moved = clipped(model, [*company, *steep], 0.5) - clipped(model, company, 0.5)
    assert 0.5 * (1 - 1e-4) <= np.linalg.norm(moved) <= 0.5 * (1 + 1e-4)
    raw = clipped(model, steep, 1e30)
    parts = raw.reshape(-1, RANK * RANK)
    by_part = parts * (0.5 / np.linalg.norm(parts, axis=1, keepdims=True)).clip(max=1)
    assert np.linalg.norm(by_part) > 0.5 * 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_states_change_nothing_where_they_are_used(family: str) -> None:
    model = adapted(family, first_layer=2, blocks=True)
    select(model, ("core",))
    assert sequences.can_be_cut(model, 2) == (family in CUTTABLE)
    if family in CUTTABLE:
        whole = clipped(model, some_examples(6), 0.1)
        frozen = sequences.FrozenPrefix(first_block=2)
        assert np.array_equal(clipped(model, some_examples(6), 0.1, frozen=frozen), whole)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_of_the_core_is_a_projected_step_of_the_map(family: str) -> None:
    """With orthonormal a and b: s b g_core a = s^2 (b b') G (a' a), G the gradient of the dense map itself."""
    import torch

    frozen = make(family)
    start = cored(frozen, family)
    example = some_examples(1)[0]
    dense = merged(frozen, start).model
    maps = {name: dense.get_submodule(name).weight.requires_grad_(True) for name in start.layers}
    ids = torch.tensor([example.ids])
    labels = torch.tensor([[-100] * example.loss_from + list(example.ids[example.loss_from :])])
    slopes = torch.autograd.grad(dense(input_ids=ids, labels=labels).loss, list(maps.values()))
    model = lora.attach(frozen, start, keep_cores=True)
    select(model, ("core",))
    names = list(per_example.trained(model))
    cores = per_example.clipped_sum(model, [example], clip_norm=1e9, max_batch_tokens=96, pad_id=0).tensors
    scaling = start.alpha / RANK
    for name, slope in zip(maps, slopes, strict=True):
        factors = start.layers[name]
        full = slope.double().numpy()
        full = full.T if type(dense.get_submodule(name)).__name__ == "Conv1D" else full  # (d_out, d_in)
        a, b = factors.a.astype(np.float64), factors.b.astype(np.float64)
        core = cores[names.index(f"{name}.core")]
        assert distance(scaling * b @ core @ a, scaling**2 * (b @ b.T) @ full @ (a.T @ a)) <= 1e-4
        for left, right in ((a @ a.T, np.eye(RANK)), (b.T @ b, np.eye(RANK))):
            assert np.abs(left - right).max() <= 1e-6
        projector = b @ b.T
        assert np.abs(projector @ projector - projector).max() <= 1e-6


def test_the_check_of_kernels_tries_what_the_node_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product that widens has the rank of the cores and of what is frozen beside them; the core's own is by row."""
    tried: set[tuple[int, int, bool]] = set()

    def agree(matrix: tuple[int, int, bool], *_: Any) -> bool:
        tried.add(matrix)
        return True

    monkeypatch.setattr(kernels, "_agree", agree)
    assert kernels.keep_rows_apart(adapted("llama", blocks=True), 96)
    assert {(RANK + 6, 32, False), (RANK + 6, 48, False)} <= tried
    assert not any(rows == RANK for rows, _, _ in tried)


def test_cores_are_written_read_and_not_mistaken() -> None:
    frozen = make("llama")
    start = cored(frozen, "llama")
    model = lora.attach(frozen, start, keep_cores=True)
    assert lora.sha256(lora.read(model, alpha=start.alpha, base=start.base)) == lora.sha256(start)
    with pytest.raises(AdapterMismatch, match="adapted layers are not"):
        lora.write(model, lora.plain(start))
    with pytest.raises(AdapterMismatch, match="adapted layers are not"):
        lora.write(lora.attach(frozen, start), start)  # the core would have been dropped
    with pytest.raises(AdapterMismatch, match="no core to train"):
        select(lora.attach(frozen, lora.plain(start), keep_cores=True), ("core",))


# --- training over blocks


def tiny(family: str, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> FrozenModel:
    """Return a small model of a family that reads the tiny model's tokens."""
    if family == "llama":
        return frozen
    monkeypatch.setitem(test_lora_linear.common, "vocab_size", len(frozen.tokenizer))
    return dataclasses.replace(make(family), tokenizer=frozen.tokenizer)


def learn(frozen: FrozenModel, start: Adapter, blocks: tuple[Adapter, ...], **options: Any) -> Adapter:
    section: Any = TypeAdapter(AnyLearner).validate_python({"steps": 4, "learning_rate": 1e-2, **options})
    learner = section.build(1)
    constants = PublicConstants(sample_rate=0.9, expected_batch=4, max_tokens=24, max_rows_per_unit=1, unit="record")
    rows = PrivateRows([PrivateRow(instruction=f"row {n}", output="yes", code="c", unit=str(n)) for n in range(5)])
    noise = SimulatedNoise(stream(1, "noise"))
    bench = Workbench(model=frozen, codes={"c": "A cough:"}, noise=noise, system="", blocks=blocks)
    receipts = learner.announce(constants, 0.01) if learner.private else ()
    return learner(rows, start, receipts, constants, bench).adapter


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["dp_lora", "dp_ffa_lora", "dp_lora_sb", "plain_lora"])
def test_training_over_blocks_is_training_over_weights_that_hold_them(
    kind: str, family: str, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family, frozen, monkeypatch)
    targets = TARGETS["gpt2"] if family == "gpt2" else ("q_proj", "v_proj")
    section = LoraSection(rank=4, alpha=8.0, targets=targets)
    spec = dataclasses.replace(lora.spec_of(model, section), core=kind == "dp_lora_sb")
    start = lora_start.initial(spec, np.random.default_rng(3))
    under = (block(start, 1, 2), block(start, 2, 3))
    before = [lora.sha256(one) for one in under]
    options = {"kind": kind} | ({} if kind == "plain_lora" else {"clip_norm": 1.0})
    over = learn(model, start, under, **options)
    inside = learn(merged(model, *under), start, (), **options)
    bare = learn(model, start, (), **options)
    assert [lora.sha256(one) for one in under] == before
    moved = 0.0
    for name in start.layers:
        for key, value in lora.named_factors(name, over.layers[name]).items():
            other = lora.named_factors(name, inside.layers[name])[key]
            assert np.abs(value - other).max() <= 2e-4, key  # of 4 steps of 1e-2
            moved = max(moved, np.abs(value - lora.named_factors(name, bare.layers[name])[key]).max())
    assert moved > 2e-3  # the twin: without the blocks it is other training


def test_blocks_do_not_move(frozen: FrozenModel, learned: Callable[[int], Adapter]) -> None:
    import torch

    start = learned(5)
    model = lora.attach(frozen, start, [learned(6), block(start, 1, 2)])
    before = {name: weight.clone() for name, weight in lora.parameters(model, place=lora.BLOCKS).items()}
    weights = select(model, ("a", "b"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    summed = per_example.clipped_sum(model, some_examples(3), clip_norm=1.0, max_batch_tokens=96, pad_id=0)
    for weight, total in zip(weights.values(), summed.tensors, strict=True):
        weight.grad = torch.from_numpy(total.astype(np.float32))
    optimizer.step()
    after = lora.parameters(model, place=lora.BLOCKS)
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(
        lora.parameters(model)[next(iter(weights))],
        torch.from_numpy(start.layers[next(iter(weights)).rsplit(".", 1)[0]].a),
    )
