"""What a site's rows may be: poisoned, absent, too long, alone, ten thousand. None of it shows from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from clients import dp_steps
from clients.learners.dp_lora import DpLora
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from clients.units import encoded_units
from fl_app import lora
from fl_app.models import FrozenModel
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.types import Adapter

STEPS, CLIP, NOISE = 2, 0.05, 1.0


class Everyone:
    """Draws every unit and no noise, and remembers how often it was asked."""

    simulated = True

    def __init__(self, only: Sequence[int] | None = None) -> None:
        self.only = only
        self.asked: list[Any] = []

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        self.asked.append(shape)
        return np.zeros(shape)

    def poisson_sample(self, count: int, rate: float) -> np.ndarray:
        self.asked.append(rate)
        return np.arange(count) if self.only is None else np.array([n for n in self.only if n < count], np.int64)


def constants(**changes: Any) -> PublicConstants:
    values = {"sample_rate": 0.5, "expected_batch": 4, "max_tokens": 24, "max_rows_per_unit": 1, "unit": "record"}
    return PublicConstants(**{**values, **changes})


def rows_of(*texts: str) -> PrivateRows:
    return PrivateRows([PrivateRow(instruction=t, output="", code="", unit=str(n)) for n, t in enumerate(texts)])


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Collect the clipped sum of every step as one vector, before noise."""
    seen: list[np.ndarray] = []
    plain = dp_steps.clipped_sum

    def watched(*arguments: Any, **options: Any) -> Any:
        found = plain(*arguments, **options)
        seen.append(np.concatenate([tensor.ravel() for tensor in found.tensors]))
        return found

    monkeypatch.setattr(dp_steps, "clipped_sum", watched)
    return seen


def learn(frozen: FrozenModel, start: Adapter, rows: PrivateRows, noise: Any, **changes: Any) -> Adapter:
    learner = DpLora(kind="dp_lora", steps=STEPS, clip_norm=CLIP).build(1)
    told = constants(**changes)
    bench = Workbench(model=frozen, codes={}, noise=noise, system="")
    return learner(rows, start, learner.announce(told, NOISE), told, bench).adapter


@pytest.fixture
def poisoned(frozen: FrozenModel) -> FrozenModel:
    """A base model in which the letter z has an embedding of NaN: a row that holds one has no finite gradient."""
    import torch

    twin = frozen.replica(own_weights=True)
    twin.model.set_input_embeddings(
        torch.nn.Embedding.from_pretrained(twin.model.get_input_embeddings().weight.clone())
    )
    (z,) = frozen.tokenizer("z", add_special_tokens=False)["input_ids"]
    twin.model.get_input_embeddings().weight[z] = float("nan")
    return FrozenModel(resolved=twin.resolved, tokenizer=twin.tokenizer, model=twin.model)


def test_a_row_of_nan_adds_nothing_and_harms_nobody(
    poisoned: FrozenModel, learned: Callable[[int], Adapter], sums: list[np.ndarray]
) -> None:
    good = ("a cough that stays", "how much of the syrup", "a fever at night")
    learn(poisoned, learned(5), rows_of(*good), Everyone())
    learn(poisoned, learned(5), rows_of(*good, "zzz what is it"), Everyone())
    learn(poisoned, learned(5), rows_of("z", "a z", "zz"), Everyone())
    clean, mixed, bad = sums[0], sums[STEPS], sums[2 * STEPS]
    assert np.linalg.norm(clean) > CLIP
    assert np.array_equal(mixed, clean)
    assert not bad.any()


def test_a_base_model_of_nan_still_takes_every_noised_step(
    frozen: FrozenModel, learned: Callable[[int], Adapter]
) -> None:
    twin = frozen.replica(own_weights=True)
    for weight in twin.model.parameters():
        weight.fill_(float("nan"))
    found = learn(twin, learned(5), rows_of("a", "b"), SimulatedNoise(stream(0, "noise")))
    assert all(np.isfinite(f.a).all() and np.isfinite(f.b).all() for f in found.layers.values())
    assert lora.sha256(found) != lora.sha256(learned(5))


@pytest.mark.parametrize(
    "texts", [(), ("alone",), ("x" * 10_000,), ("", "\n", "\u0000")], ids=["none", "one", "long", "empty"]
)
def test_the_steps_are_the_same_whatever_the_rows(
    frozen: FrozenModel, learned: Callable[[int], Adapter], sums: list[np.ndarray], texts: tuple[str, ...]
) -> None:
    noise = Everyone()
    learn(frozen, learned(5), rows_of(*texts), noise)
    shapes = [s for f in learned(5).layers.values() for s in (f.a.shape, f.b.shape)]
    assert noise.asked == [0.5, *shapes] * STEPS
    assert all(np.linalg.norm(one) <= len(texts) * CLIP for one in sums)
    assert sums[0].any() == bool(texts)


def test_a_row_longer_than_the_limit_is_cut_and_stays_within_the_clip(
    frozen: FrozenModel, learned: Callable[[int], Adapter], sums: list[np.ndarray]
) -> None:
    start = "a letter that begins like this and then "
    bench = Workbench(model=frozen, codes={}, noise=Everyone(), system="")
    ((long,),) = encoded_units(rows_of(start + "goes on " * 5000), "instruction", constants(), bench)
    assert len(long.ids) == 24
    learn(frozen, learned(5), rows_of(start + "goes on " * 5000), Everyone())
    learn(frozen, learned(5), rows_of(start + "ends"), Everyone())
    assert 0 < np.linalg.norm(sums[0]) <= CLIP
    assert np.array_equal(sums[0], sums[STEPS])  # what was cut away was never read


def test_ten_thousand_rows(frozen: FrozenModel, learned: Callable[[int], Adapter], sums: list[np.ndarray]) -> None:
    """All of them in one step: the sum keeps to its bound, and so do additions in float64."""
    count = 10_000
    texts = [f"row {n % 97} of {n}" for n in range(count)]
    learner = DpLora(kind="dp_lora", steps=1, clip_norm=CLIP).build(1)
    told = constants(max_tokens=16, sample_rate=1.0, expected_batch=count)
    noise = Everyone()
    bench = Workbench(model=frozen, codes={}, noise=noise, system="")
    found = learner(rows_of(*texts), learned(5), learner.announce(told, NOISE), told, bench).adapter
    assert noise.asked[0] == 1.0
    assert CLIP < np.linalg.norm(sums[0]) <= count * CLIP
    assert all(np.isfinite(f.a).all() and np.isfinite(f.b).all() for f in found.layers.values())
