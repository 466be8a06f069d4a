"""An adapter per row: what a row becomes is what its own adapter makes of it, whoever else is in the batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app import inference, lora, row_adapters
from fl_app.config import LoraSection
from fl_app.errors import AdapterMismatch
from fl_app.seeds import stream
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.models import FrozenModel

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = ["A rather long question about fevers?", "Hm?", "", "What helps a cough?", "Hm?", "Sage! And then?"]


@dataclass(frozen=True)
class Ids:
    """The tokenizer, but it hands the tokens out as they are: decoded bytes hide which tokens they were."""

    inner: Any
    end: int = -2

    @property
    def eos_token_id(self) -> int:
        return self.inner.eos_token_id if self.end == -2 else self.end

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self.inner(*args, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def batch_decode(self, ids_BT: Any, **_: Any) -> list[Any]:
        """Tokens up to the end token, which stops a row; what follows it in a batch is filling."""
        end = self.eos_token_id
        return [tuple(row[: row.index(end) + 1] if end in row else row) for row in ids_BT.tolist()]


def _adapter(frozen: FrozenModel, seed: int, *, rank: int = 2, alpha: float = 4.0, targets: Any = ALL) -> Adapter:
    spec = lora.spec_of(frozen, LoraSection(rank=rank, alpha=alpha, targets=targets))
    rng = np.random.default_rng(seed)
    layers = {
        name: LoraFactors(
            a=rng.normal(0, 2 * d_in**-0.5, (rank, d_in)).astype(np.float32),
            b=rng.normal(0, 0.4, (d_out, rank)).astype(np.float32),
        )
        for name, (d_in, d_out) in spec.shapes.items()
    }
    return Adapter(layers=layers, alpha=alpha, base=spec.base)


@pytest.fixture(scope="module")
def adapters(frozen: FrozenModel) -> list[Adapter]:
    """Three adapters of three ranks and scalings."""
    return [_adapter(frozen, 10 + rank, rank=rank, alpha=alpha) for rank, alpha in ((1, 3.0), (4, 8.0), (3, 2.0))]


def _tokens(model: Any, frozen: FrozenModel, prompts: Sequence[str], rng: Any, temperature: float) -> list[Any]:
    return inference.generate(
        model, Ids(frozen.tokenizer), prompts, max_new_tokens=12, temperature=temperature, top_p=0.95, rng=rng
    )


def _logits(model: Any, frozen: FrozenModel, prompts: Sequence[str]) -> Any:
    import torch

    ids, mask = inference._left_padded(frozen.tokenizer, [frozen.tokenizer(p)["input_ids"] for p in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]


# --- equal to single-adapter runs


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("index", [(0, 1, 2, 0, 2, 1), (1, 1, 1, 1, 1, 0), (0, 0, 1, 1, 2, 2)], ids=str)
def test_tokens_are_those_of_each_row_alone_under_peft(
    frozen: FrozenModel, adapters: list[Adapter], index: tuple[int, ...], temperature: float
) -> None:
    """The oracle is PEFT with one adapter and one row: no padding, no batch, none of our products."""
    streams = [stream(7, f"row {row}") for row in range(len(PROMPTS))]
    alone = [
        _tokens(lora.attach(frozen, adapters[own]), frozen, [prompt], [rng], temperature)[0]
        for prompt, own, rng in zip(PROMPTS, index, streams, strict=True)
    ]

    model = row_adapters.attach(frozen, adapters, index)
    streams = [stream(7, f"row {row}") for row in range(len(PROMPTS))]
    together = _tokens(model, frozen, PROMPTS, streams, temperature)

    assert together == alone
    assert len(set(alone)) >= len(PROMPTS) - 1  # "Hm?" twice, with one index by the same adapter


def test_another_index_gives_other_tokens(frozen: FrozenModel, adapters: list[Adapter]) -> None:
    """The twin that must differ: rows whose adapter changes, and no others."""
    first = _tokens(row_adapters.attach(frozen, adapters, (0, 1, 2, 0, 1, 2)), frozen, PROMPTS, None, 0.0)
    other = _tokens(row_adapters.attach(frozen, adapters, (0, 2, 2, 0, 0, 2)), frozen, PROMPTS, None, 0.0)

    assert [one != two for one, two in zip(first, other, strict=True)] == [False, True, False, False, True, False]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_rows_keep_their_adapters_when_others_have_ended(
    frozen: FrozenModel, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    index, prompts = (0, 1, 2, 2, 1, 0, 1, 1), [*PROMPTS, "No", "Why willow?"]

    def run() -> list[Any]:
        streams = [stream(3, "row", row) for row in range(len(prompts))]
        model = row_adapters.attach(frozen, adapters, index)
        return [_tokens_until(end, model, frozen, prompts, streams, temperature) for end in range(3, 200, 12)]

    shrinking = run()
    monkeypatch.setattr(inference, "SHRINK", 0.0)

    assert run() == shrinking
    lengths = {len(row) for one in shrinking for row in one}
    assert len(lengths) > 3  # rows ended at many places


def _tokens_until(
    end: int, model: Any, frozen: FrozenModel, prompts: Sequence[str], rng: Any, temperature: float
) -> list[Any]:
    tokenizer = Ids(frozen.tokenizer, end)
    return inference.generate(
        model, tokenizer, prompts, max_new_tokens=12, temperature=temperature, top_p=0.95, rng=rng
    )


def test_logits_agree_with_peft_to_rounding(frozen: FrozenModel, adapters: list[Adapter]) -> None:
    index = (2, 0, 1, 1, 0, 1)

    found = _logits(row_adapters.attach(frozen, adapters, index), frozen, PROMPTS)

    bare = _logits(frozen.model, frozen, PROMPTS)
    for row, own in enumerate(index):
        expected = _logits(lora.attach(frozen, adapters[own]), frozen, PROMPTS)[row]
        assert float((found[row] - expected).abs().max()) < 2e-5 * float(expected.abs().max())
        assert float((bare[row] - expected).abs().max()) > 0.1 * float(expected.abs().max())


def test_a_bfloat16_base_adds_in_float32_as_peft_does(adapters: list[Adapter]) -> None:
    from fl_app import models

    narrow = models.load("tiny-random", "bfloat16")

    found = _logits(row_adapters.attach(narrow, adapters, (0, 1, 2)), narrow, PROMPTS[:3]).float()

    for row in range(3):
        expected = _logits(lora.attach(narrow, adapters[row]), narrow, PROMPTS[:3])[row].float()
        assert float((found[row] - expected).abs().max()) < 0.03 * float(expected.abs().max())


# --- nothing leaks


@pytest.mark.parametrize("index", [(0, 1, 0, 1), (0, 0, 1, 1), (1, 0, 0, 0)], ids=str)
def test_a_row_keeps_every_bit_when_other_adapters_hold_no_numbers(
    frozen: FrozenModel, adapters: list[Adapter], index: tuple[int, ...]
) -> None:
    broken = replace(
        adapters[1], layers={n: LoraFactors(a=f.a * np.nan, b=f.b * np.inf) for n, f in adapters[1].layers.items()}
    )

    clean = _logits(row_adapters.attach(frozen, adapters, index), frozen, PROMPTS[:4])
    beside = _logits(row_adapters.attach(frozen, [adapters[0], broken], index), frozen, PROMPTS[:4])

    for row, own in enumerate(index):
        if own == 0:
            assert clean[row].equal(beside[row])
        else:
            assert bool(beside[row].isnan().all())


def _weights(frozen: FrozenModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(frozen.model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_the_frozen_model_is_the_same_after_a_pass_and_after_one_that_fails(
    frozen: FrozenModel, adapters: list[Adapter]
) -> None:
    weights, bare = _weights(frozen), _logits(frozen.model, frozen, PROMPTS)
    model = row_adapters.attach(frozen, adapters, (0, 1, 2))

    _tokens(model, frozen, PROMPTS[:3], None, 0.0)
    with pytest.raises(AdapterMismatch, match=r"inputs of shape \(2, .*an adapter for each of 3 rows"):
        _tokens(model, frozen, PROMPTS[:2], None, 0.0)

    assert _weights(frozen) == weights
    assert _logits(frozen.model, frozen, PROMPTS).equal(bare)
    assert not any("forward" in vars(module) for module in frozen.model.modules())


# --- groups


@settings(max_examples=200, deadline=None)
@given(index=st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_every_row_stands_in_one_place_of_a_group_of_its_adapter(index: list[int]) -> None:
    groups = row_adapters.groups_of(index)

    size = len(groups.rows) // len(groups.adapters)
    for row, place in enumerate(groups.places):
        assert groups.rows[place] == row
        assert groups.adapters[place // size] == index[row]
    for place, row in enumerate(groups.rows):
        assert groups.adapters[place // size] == index[row]  # filling is of the group's own adapter
    assert len(groups.rows) == size * len(groups.adapters) < 2 * len(index) + len(set(index))


@pytest.mark.parametrize(
    ("index", "groups"),
    [
        ((4, 4, 7, 7), row_adapters.Groups(adapters=(4, 7), rows=(0, 1, 2, 3), places=(0, 1, 2, 3))),
        ((7, 4, 7), row_adapters.Groups(adapters=(4, 7), rows=(1, 1, 0, 2), places=(2, 0, 3))),
        ((1, 1, 1, 0), row_adapters.Groups(adapters=(0, 1, 1), rows=(3, 3, 0, 1, 2, 2), places=(2, 3, 4, 0))),
    ],
)
def test_groups_by_hand(index: tuple[int, ...], groups: row_adapters.Groups) -> None:
    assert row_adapters.groups_of(index) == groups
    assert groups.in_order == (index == (4, 4, 7, 7))


# --- what is refused


def test_what_does_not_fit_is_refused(frozen: FrozenModel, adapters: list[Adapter]) -> None:
    first = adapters[0]
    name = next(iter(first.layers))
    wide = {**first.layers, name: LoraFactors(a=np.ones((1, 3), np.float32), b=first.layers[name].b)}
    foreign = replace(first, base="0" * 64)
    strange = replace(first, layers={"model.norm": LoraFactors(a=np.ones((1, 2)), b=np.ones((2, 1)))})

    with pytest.raises(AdapterMismatch, match=r"rows ask for adapters \[0, 3\]; there are 3"):
        row_adapters.attach(frozen, adapters, (0, 3))
    with pytest.raises(AdapterMismatch, match=r"rows ask for adapters \[-1\]"):
        row_adapters.attach(frozen, adapters, (-1,))
    with pytest.raises(AdapterMismatch, match=r"rows ask for adapters \[\]"):
        row_adapters.attach(frozen, adapters, ())
    with pytest.raises(AdapterMismatch, match="adapters are for base 000000000000, tiny-random is"):
        row_adapters.attach(frozen, [foreign], (0,))
    with pytest.raises(AdapterMismatch, match="adapter 1 is for base 000000000000"):
        row_adapters.attach(frozen, [first, foreign], (0, 1))
    with pytest.raises(AdapterMismatch, match="adapter 1 and adapter 0 differ in layers"):
        row_adapters.attach(frozen, [first, _adapter(frozen, 1, targets=("q_proj",))], (0, 0))
    with pytest.raises(AdapterMismatch, match=r"model.norm: .*is no linear one"):
        row_adapters.attach(frozen, [strange], (0,))
    with pytest.raises(AdapterMismatch, match=r"factors \(1, 3\) and"):
        row_adapters.attach(frozen, [replace(first, layers=wide)], (0,))
