"""Adapters as arrays, on a model, and in PEFT's files."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fl_app import lora, lora_start, peft_files
from fl_app.config import LoraSection
from fl_app.errors import AdapterMismatch
from fl_app.seeds import stream
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fl_app.lora import LoraSpec
    from fl_app.models import FrozenModel

    Make = Callable[[int], Adapter]

Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def changed(adapter: Adapter, name: str, *, a: Any = None, b: Any = None) -> Adapter:
    old = adapter.layers[name]
    layers = {**adapter.layers, name: LoraFactors(a=old.a if a is None else a, b=old.b if b is None else b)}
    return dataclasses.replace(adapter, layers=layers)


def equal(left: Adapter, right: Adapter) -> bool:
    return (left.alpha, left.base, left.layers.keys()) == (right.alpha, right.base, right.layers.keys()) and all(
        np.array_equal(f.a, right.layers[n].a) and np.array_equal(f.b, right.layers[n].b)
        for n, f in left.layers.items()
    )


def logits(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([[5, 9, 70, 200, 31]])).logits


def test_the_spec_is_what_the_model_has(spec: LoraSpec, frozen: FrozenModel) -> None:
    assert spec.shapes == {
        f"model.layers.{layer}.self_attn.{name}": (64, out)
        for layer in (0, 1)
        for name, out in (("q_proj", 64), ("v_proj", 32))
    }
    assert (spec.rank, spec.alpha, spec.base) == (4, 8.0, frozen.resolved.sha256)


def test_first_layer_leaves_out_the_blocks_below(frozen: FrozenModel) -> None:
    section = LoraSection(rank=2, alpha=1.0, targets=("v_proj", "down_proj"), first_layer=1)
    assert set(lora.spec_of(frozen, section).shapes) == {
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
    }


@pytest.mark.parametrize("change", [{"targets": ("q_prj",)}, {"first_layer": 2}, {"targets": ()}])
def test_targets_that_match_nothing_list_what_there_is(frozen: FrozenModel, change: dict[str, Any]) -> None:
    section = LoraSection(**{"rank": 2, "alpha": 1.0, "targets": ("q_proj",), **change})
    with pytest.raises(AdapterMismatch) as caught:
        lora.spec_of(frozen, section)
    known = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    assert known in str(caught.value)


def test_a_run_starts_from_the_base_itself(frozen: FrozenModel, spec: LoraSpec) -> None:
    import torch

    adapter = lora_start.initial(spec, stream(0, "start"))
    assert all(not lora.delta(adapter, name).any() for name in spec.shapes)
    assert all(factors.a.any() and np.abs(factors.a).max() <= 64**-0.5 for factors in adapter.layers.values())
    assert torch.equal(logits(lora.attach(frozen, adapter)), logits(frozen.model))
    assert equal(adapter, lora_start.initial(spec, stream(0, "start")))
    assert not equal(adapter, lora_start.initial(spec, stream(1, "start")))


def test_delta_is_the_scaled_product() -> None:
    a, b = np.array([[1, 2], [3, 4]], np.float32), np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    adapter = Adapter(layers={"x": LoraFactors(a=a, b=b)}, alpha=8.0, base="z")
    assert lora.delta(adapter, "x").tolist() == [[4.0, 8.0], [12.0, 16.0], [16.0, 24.0]]  # 8 / 2 * b @ a
    assert lora.num_bytes(adapter) == 4 * (4 + 6)
    assert lora.rank_of(adapter) == 2


def test_attach_adds_exactly_delta_to_the_weights(frozen: FrozenModel, learned: Make) -> None:
    import torch

    adapter = learned(1)
    by_hand = frozen.replica(own_weights=True).model
    for name in adapter.layers:
        with torch.no_grad():
            by_hand.get_submodule(name).weight += torch.from_numpy(lora.delta(adapter, name)).float()
    found, base = logits(lora.attach(frozen, adapter)), logits(frozen.model)
    assert torch.allclose(found, logits(by_hand), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, base, atol=1e-3)


def test_write_and_read_keep_every_bit(frozen: FrozenModel, learned: Make) -> None:
    first, second = learned(1), learned(2)
    model = lora.attach(frozen, first)
    assert equal(lora.read(model, alpha=first.alpha, base=first.base), first)
    lora.write(model, second)
    assert equal(lora.read(model, alpha=first.alpha, base=first.base), second)


def test_only_the_factors_ask_for_gradients_in_sorted_order(frozen: FrozenModel, learned: Make) -> None:
    adapter = learned(1)
    model = lora.attach(frozen, adapter)
    slots = lora.parameters(model)
    assert list(slots) == sorted(f"{name}.{factor}" for name in adapter.layers for factor in "ab")
    assert {id(slot) for slot in slots.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())


def test_two_attached_models_hold_two_adapters_over_one_set_of_weights(frozen: FrozenModel, learned: Make) -> None:
    one, two = lora.attach(frozen, learned(1)), lora.attach(frozen, learned(2))
    assert equal(lora.read(one, alpha=8.0, base=learned(1).base), learned(1))
    assert equal(lora.read(two, alpha=8.0, base=learned(2).base), learned(2))
    weight = frozen.model.get_submodule(Q0).weight
    assert all(m.get_base_model().get_submodule(Q0).base_layer.weight is weight for m in (one, two))


def test_read_gives_a_copy(frozen: FrozenModel, learned: Make) -> None:
    model = lora.attach(frozen, learned(1))
    found = lora.read(model, alpha=8.0, base="b")
    lora.write(model, learned(2))
    assert np.array_equal(found.layers[Q0].a, learned(1).layers[Q0].a)


def test_an_adapter_of_another_base_is_refused(frozen: FrozenModel, learned: Make) -> None:
    with pytest.raises(AdapterMismatch, match="adapter is for base other"):
        lora.attach(frozen, dataclasses.replace(learned(1), base="other"))


@pytest.mark.parametrize(
    "shapes", [{"a": (1, 64), "b": (64, 1)}, {"a": (2, 64), "b": (64, 2)}, {"a": (4, 1)}, {"b": (1, 4)}, {"a": (64,)}]
)
def test_write_never_stretches_an_array(frozen: FrozenModel, learned: Make, shapes: dict[str, tuple[int, ...]]) -> None:
    model = lora.attach(frozen, learned(1))
    other = changed(
        learned(2), V1 if "b" not in shapes else Q0, **{k: np.ones(s, np.float32) for k, s in shapes.items()}
    )
    with pytest.raises(AdapterMismatch, match="is of shape"):
        lora.write(model, other)
    assert equal(lora.read(model, alpha=8.0, base=learned(1).base), learned(1))


def test_write_refuses_other_layers(frozen: FrozenModel, learned: Make) -> None:
    adapter = learned(1)
    fewer = dataclasses.replace(adapter, layers={Q0: adapter.layers[Q0]})
    with pytest.raises(AdapterMismatch, match="layers"):
        lora.write(lora.attach(frozen, adapter), fewer)


def test_check_alike(learned: Make) -> None:
    one = learned(1)
    wide = {n: LoraFactors(a=np.zeros((2, f.a.shape[1])), b=np.zeros((f.b.shape[0], 2))) for n, f in one.layers.items()}
    narrow = dataclasses.replace(one, layers=wide)
    lora.check_alike([one, learned(2)])
    lora.check_alike([one, narrow], same_rank=False)
    for other, words in (
        (dataclasses.replace(one, base="another"), "is for base another"),
        (dataclasses.replace(one, layers={Q0: one.layers[Q0]}), "differ in layers"),
        (dataclasses.replace(one, alpha=9.0), "has alpha 9.0"),
        (narrow, "rank 2"),
    ):
        with pytest.raises(AdapterMismatch, match=words):
            lora.check_alike([one, other])


def test_the_hash_sees_every_part(learned: Make) -> None:
    one = learned(1)
    nudged = one.layers[V1].b.copy()
    nudged[3, 1] = np.nextafter(nudged[3, 1], np.float32(9))
    negative_zero = np.zeros_like(nudged)
    others = [
        one,
        dataclasses.replace(one, base="other"),
        dataclasses.replace(one, alpha=8.000001),
        dataclasses.replace(one, layers={n.replace("model", "modem"): f for n, f in one.layers.items()}),
        dataclasses.replace(one, layers={Q0: one.layers[Q0]}),
        changed(one, V1, b=nudged),
        changed(one, V1, b=negative_zero),
        changed(one, V1, b=-negative_zero),
        changed(one, V1, a=one.layers[V1].a.reshape(8, 32)),
        changed(one, V1, a=one.layers[V1].a[::-1]),
    ]
    assert len({lora.sha256(other) for other in others}) == len(others)
    turned = dataclasses.replace(one, layers=dict(reversed(one.layers.items())))
    fortran = changed(one, V1, a=np.asfortranarray(one.layers[V1].a))
    assert lora.sha256(turned) == lora.sha256(fortran) == lora.sha256(one)


def test_peft_files_keep_every_bit_and_load_with_peft(frozen: FrozenModel, learned: Make, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    adapter = learned(3)
    peft_files.save(adapter, tmp_path / "deep" / "er", base_name="tiny-random")
    assert equal(peft_files.load(tmp_path / "deep" / "er"), adapter)
    theirs = PeftModel.from_pretrained(frozen.replica(own_weights=True).model, tmp_path / "deep" / "er")
    assert torch.equal(logits(theirs), logits(lora.attach(frozen, adapter)))


def test_bfloat16_files_round_to_it(learned: Make, tmp_path: Path) -> None:
    adapter = learned(3)
    peft_files.save(adapter, tmp_path, base_name="tiny-random", dtype="bfloat16")
    found = peft_files.load(tmp_path).layers[Q0].a
    assert found.dtype == np.float32
    assert np.allclose(found, adapter.layers[Q0].a, rtol=2**-8, atol=0)
    assert not np.array_equal(found, adapter.layers[Q0].a)


@pytest.fixture
def stored(learned: Make, tmp_path: Path) -> Path:
    peft_files.save(learned(3), tmp_path, base_name="tiny-random")
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], metadata: dict[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)


def test_a_foreign_adapter_needs_its_base(stored: Path) -> None:
    rewrite(stored, lambda _: None, {"format": "pt"})
    with pytest.raises(AdapterMismatch, match="does not say which base"):
        peft_files.load(stored)
    assert peft_files.load(stored, base="given").base == "given"


def test_the_file_wins_over_the_base_given(stored: Path, spec: LoraSpec) -> None:
    assert peft_files.load(stored, base="given").base == spec.base


def test_other_tensors_and_lone_factors_are_refused(stored: Path) -> None:
    key = f"base_model.model.{Q0}.lora_A.weight"
    rewrite(stored, lambda tensors: tensors.pop(key), {"stillroom_base": "b"})
    with pytest.raises(AdapterMismatch, match="has only factor b"):
        peft_files.load(stored)
    rewrite(stored, lambda tensors: tensors.update(other=next(iter(tensors.values())).clone()), {"stillroom_base": "b"})
    with pytest.raises(AdapterMismatch, match="'other' is no LoRA factor"):
        peft_files.load(stored)


def test_the_config_file_says_what_peft_needs(stored: Path, learned: Make) -> None:
    config = json.loads((stored / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, "tiny-random")
    assert config["target_modules"] == sorted(learned(3).layers)
    assert config["inference_mode"] is True
