"""Adapter algebra: numpy adapters, and their place on a torch model (their files: `fl_app.peft_files`).

`Adapter` holds float32 numpy arrays by module path of the base model. PEFT supplies the layers;
what is ours is the mapping between the two, so that every adapter is checked by name and shape and never guessed.

Legend of shapes: r = rank; a (r, d_in), b (d_out, r).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_app import low_rank
from fl_app.errors import AdapterMismatch
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_app.config import LoraSection
    from fl_app.models import FrozenModel

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the module paths of the base model."""

ADAPTER, BLOCKS = "default", "blocks"
"""The names, on a PEFT model, of the adapter that is trained and of the one under it that is not."""

CORE, WIDE = "core", "wide"
"""The two maps that stand, one after the other, in the place of PEFT's `lora_B` where a core is kept apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """The exact shape every adapter of a run must have: module path -> (d_in, d_out); `core`: with r x r cores."""

    shapes: Mapping[str, tuple[int, int]]
    rank: int
    alpha: float
    base: str
    core: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where an adapter is not of a spec: the rule it breaks, the factor where there is one, and how."""

    rule: str
    reason: str
    tensor: str = ""

    def __str__(self) -> str:
        return f"{self.rule}: {self.tensor} {self.reason}" if self.tensor else f"{self.rule}: {self.reason}"


def spec_of(frozen: FrozenModel, section: LoraSection) -> LoraSpec:
    """Return the spec of [lora] on this model.

    Raises: AdapterMismatch when the targets or the layer range match no linear map; it lists what there is.
    """
    maps = {name: shape for name, module in frozen.model.named_modules() if (shape := linear_shape(module))}
    shapes = {
        name: shape
        for name, shape in maps.items()
        if name.rsplit(".", 1)[-1] in section.targets and block_of(name) >= section.first_layer
    }
    if not shapes:
        linear = {name.rsplit(".", 1)[-1] for name in maps}
        raise AdapterMismatch(
            f"lora.targets {list(section.targets)} from layer {section.first_layer} match nothing in "
            f"{frozen.resolved.name}; linear maps there: {', '.join(sorted(linear))}"
        )
    return LoraSpec(shapes=shapes, rank=section.rank, alpha=section.alpha, base=frozen.resolved.sha256)


def spec_like(adapter: Adapter) -> LoraSpec:
    """Return the spec that an adapter is of."""
    shapes = {name: (one.a.shape[1], one.b.shape[0]) for name, one in adapter.layers.items()}
    return LoraSpec(
        shapes=shapes, rank=rank_of(adapter), alpha=adapter.alpha, base=adapter.base, core=has_core(adapter)
    )


def rank_of(adapter: Adapter) -> int:
    """Return the rank of an adapter, the same in every layer by construction of `check_alike`."""
    return next(iter(adapter.layers.values())).a.shape[0]


def check_alike(adapters: Sequence[Adapter], *, same_rank: bool = True) -> None:
    """Raise `AdapterMismatch` unless all adapters agree in base, layers and (when asked) rank and scaling."""
    first = adapters[0]
    for index, other in enumerate(adapters[1:], start=1):
        if other.base != first.base:
            raise AdapterMismatch(f"adapter {index} is for base {other.base[:12]}, adapter 0 for {first.base[:12]}")
        if other.layers.keys() != first.layers.keys():
            odd = sorted(other.layers.keys() ^ first.layers.keys())[:3]
            raise AdapterMismatch(f"adapter {index} and adapter 0 differ in layers, e.g. {', '.join(odd)}")
        if has_core(other) != has_core(first):
            raise AdapterMismatch(f"adapters 0 and {index}: one has cores, the other has none")
        if same_rank and (other.alpha, rank_of(other)) != (first.alpha, rank_of(first)):
            raise AdapterMismatch(
                f"adapter {index} has alpha {other.alpha}, rank {rank_of(other)}; adapter 0 has {first.alpha}, "
                f"{rank_of(first)}: use an aggregator for mixed ranks"
            )


def check_spec(adapter: Adapter, spec: LoraSpec) -> None:
    """Raise `AdapterMismatch` unless the adapter has exactly the shape of `spec`, naming the first difference."""
    if found := difference(adapter, spec):
        raise AdapterMismatch(str(found))


def difference(adapter: Adapter, spec: LoraSpec) -> Difference | None:
    """Return the first way in which an adapter is not of `spec`, None when it is; its values must all be finite."""
    if adapter.base != spec.base:
        return Difference(rule="base", reason=f"{adapter.base[:12]}, ours is {spec.base[:12]}")
    if odd := sorted(adapter.layers.keys() ^ spec.shapes.keys()):
        told = "is missing" if odd[0] in spec.shapes else "is none of ours"
        return Difference(rule="layers", tensor=odd[0], reason=told)
    if adapter.alpha != spec.alpha:
        return Difference(rule="alpha", reason=f"{adapter.alpha}, ours is {spec.alpha}")
    shapes = factor_shapes(spec)
    found = (_misshapen(name, adapter.layers[name], shapes) for name in spec.shapes)
    return next((one for one in found if one), None)


def _misshapen(layer: str, factors: LoraFactors, shapes: Mapping[str, tuple[int, int]]) -> Difference | None:
    found = named_factors(layer, factors)
    core = f"{layer}.core"
    if (core in found) != (core in shapes):
        return Difference(rule="layers", tensor=core, reason="is missing" if core in shapes else "is none of ours")
    for tensor, values in found.items():
        if values.shape != shapes[tensor]:
            return Difference(rule="shape", tensor=tensor, reason=f"is {values.shape}, ours is {shapes[tensor]}")
        if not np.isfinite(values).all():
            return Difference(rule="finite", tensor=tensor, reason="holds NaN or infinity")
    return None


def factor_shapes(spec: LoraSpec) -> dict[str, tuple[int, int]]:
    """Return the shape of every factor of a spec, by `<layer>.a`, `<layer>.b` and, with cores, `<layer>.core`."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, (d_in, d_out) in sorted(spec.shapes.items()):
        shapes[f"{name}.a"], shapes[f"{name}.b"] = (spec.rank, d_in), (d_out, spec.rank)
        if spec.core:
            shapes[f"{name}.core"] = (spec.rank, spec.rank)
    return shapes


def named_factors(layer: str, factors: LoraFactors) -> dict[str, np.ndarray]:
    """Return the factors of one layer by `<layer>.a`, `<layer>.b` and, where there is one, `<layer>.core`."""
    found = {f"{layer}.a": factors.a, f"{layer}.b": factors.b}
    return found if factors.core is None else {**found, f"{layer}.core": factors.core}


def has_core(adapter: Adapter) -> bool:
    """Whether the layers of an adapter have cores."""
    return any(factors.core is not None for factors in adapter.layers.values())


def plain(adapter: Adapter) -> Adapter:
    """Return an adapter without cores and with the same delta_W, up to float32: b @ core in the place of b."""
    if not has_core(adapter):
        return adapter
    layers = {
        name: LoraFactors(a=factors.a, b=_times_core(factors).astype(np.float32))
        for name, factors in adapter.layers.items()
    }
    return Adapter(layers=layers, alpha=adapter.alpha, base=adapter.base)


def stacked(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """Return an adapter whose delta_W is sum_k weights_k * delta_W_k, exactly: the stack, of rank sum r_k.

    The rows of all a_k over each other and the columns of all weights_k * b_k side by side: b @ a = sum_k weights_k
    b_k a_k. A weight goes on one side only; on both it would square. Scalings may differ: each s_k = alpha_k / r_k is
    folded into its block of b, and alpha is raised with the rank. Without weights each is 1.

    Source: Wang et al. 2024 (FLoRA, 2409.05976), section 3; ours keeps the stack as an adapter instead of merging it
    into the base.
    """
    folded = [plain(adapter) for adapter in adapters]
    scalings = [adapter.alpha / rank_of(adapter) for adapter in folded]
    rank = sum(rank_of(adapter) for adapter in folded)
    told = [1.0] * len(folded) if weights is None else weights
    blocks = [scaling / scalings[0] * weight for scaling, weight in zip(scalings, told, strict=True)]
    layers = {
        name: LoraFactors(
            a=np.concatenate([adapter.layers[name].a for adapter in folded], axis=0),
            b=np.concatenate(
                [block * adapter.layers[name].b for block, adapter in zip(blocks, folded, strict=True)], axis=1
            ).astype(np.float32),
        )
        for name in sorted(folded[0].layers)
    }
    return Adapter(layers=layers, alpha=scalings[0] * rank, base=folded[0].base)


def _times_core(factors: LoraFactors) -> np.ndarray:
    """Return b @ core in float64, b itself without a core."""
    b = factors.b.astype(np.float64)
    return b if factors.core is None else b @ factors.core.astype(np.float64)


def delta(adapter: Adapter, layer: str) -> np.ndarray:
    """Return delta_W of one layer, shape (d_out, d_in), float64. For tests and small models."""
    factors = adapter.layers[layer]
    return (adapter.alpha / factors.a.shape[0]) * _times_core(factors) @ factors.a.astype(np.float64)


def sha256(adapter: Adapter) -> str:
    """Return a content hash over base, scaling, names, shapes and bytes."""
    digest = hashlib.sha256(f"{adapter.base} {adapter.alpha!r}".encode())
    for name in sorted(adapter.layers):
        for part in named_factors(name, adapter.layers[name]).values():
            digest.update(f"{name} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part, np.float32).tobytes())
    return digest.hexdigest()


def num_bytes(adapter: Adapter) -> int:
    """Return the size of the adapter's arrays in bytes."""
    named = (named_factors(name, factors) for name, factors in adapter.layers.items())
    return sum(part.nbytes for parts in named for part in parts.values())


def peft_config(adapter: Adapter, **fields: Any) -> Any:
    """Return PEFT's configuration of an adapter."""
    from peft import LoraConfig

    kind: Any = LoraConfig
    return kind(r=rank_of(adapter), lora_alpha=adapter.alpha, target_modules=sorted(adapter.layers), **fields)


def attach(frozen: FrozenModel, adapter: Adapter, blocks: Sequence[Adapter] = (), *, keep_cores: bool = False) -> Any:
    """Return a PEFT model over a replica of the frozen weights that carries `adapter`, in float32.

    `blocks` are carried as well, as one adapter that asks for no gradient (`BLOCKS`). Cores are folded into b; with
    `keep_cores` those of `adapter` stay apart, as parameters `<layer>.core`, which is how they are trained.
    Raises: AdapterMismatch when an adapter is for another base, or a block adapts other maps.
    """
    from peft import get_peft_model

    for one in (adapter, *blocks):
        if one.base != frozen.resolved.sha256:
            raise AdapterMismatch(
                f"adapter is for base {one.base[:12]}, {frozen.resolved.name} is {frozen.resolved.sha256[:12]}"
            )
    adapter = adapter if keep_cores else plain(adapter)
    base = frozen.replica().model
    conv1d = any(type(base.get_submodule(name)).__name__ == "Conv1D" for name in adapter.layers)
    fields: dict[str, Any] = {"lora_dropout": 0.0, "fan_in_fan_out": conv1d}
    model: Any = get_peft_model(base, peft_config(adapter, **fields))
    if has_core(adapter):
        _make_room_for_cores(model)
    write(model, adapter)
    if blocks:
        check_alike([plain(adapter), *map(plain, blocks)], same_rank=False)
        under = low_rank.compact(stacked(blocks))
        model.add_adapter(BLOCKS, peft_config(under, **fields))
        write(model, under, place=BLOCKS)
        model.base_model.set_adapter([ADAPTER, BLOCKS])
        for weight in parameters(model, place=BLOCKS).values():
            weight.requires_grad_(False)
    return model


def _make_room_for_cores(model: Any) -> None:
    """Put an r x r map before every `lora_B`: PEFT's own forward pass then computes b @ core @ a, core unset."""
    import torch

    for module in model.modules():
        if ADAPTER in getattr(module, "lora_B", {}):
            wide = module.lora_B[ADAPTER]
            core = torch.nn.Linear(wide.in_features, wide.in_features, bias=False)
            module.lora_B[ADAPTER] = torch.nn.Sequential(OrderedDict([(CORE, core), (WIDE, wide)])).eval()


def parameters(model: Any, *, place: str = ADAPTER) -> dict[str, Any]:
    """Return the LoRA parameters of a PEFT model by `<module path>.a`, `.b` and `.core`, in sorted order."""
    found: dict[str, Any] = {}
    markers = {f"A.{place}": ".a", f"B.{place}": ".b", f"B.{place}.{WIDE}": ".b", f"B.{place}.{CORE}": ".core"}
    for name, parameter in model.named_parameters():
        path = name.removeprefix(PEFT_PREFIX)
        for marker, factor in markers.items():
            if path.endswith(end := f".lora_{marker}.weight"):
                found[path.removesuffix(end) + factor] = parameter
    return dict(sorted(found.items()))


def write(model: Any, adapter: Adapter, *, place: str = ADAPTER) -> None:
    """Copy an adapter's numbers into a PEFT model of the same layers and rank.

    Raises: AdapterMismatch, before anything is written, when a layer or a shape differs: torch would broadcast.
    """
    import torch

    slots = parameters(model, place=place)
    named: dict[str, np.ndarray] = {}
    for name, factors in adapter.layers.items():
        named |= named_factors(name, factors)
    if named.keys() != slots.keys():
        raise AdapterMismatch("the model's adapted layers are not the adapter's layers")
    for key, values in named.items():
        if values.shape != slots[key].shape:
            raise AdapterMismatch(f"{key} is of shape {values.shape}, the model's is {tuple(slots[key].shape)}")
    with torch.no_grad():
        for key, values in named.items():
            slots[key].copy_(torch.from_numpy(np.array(values)))


def read(model: Any, *, alpha: float, base: str) -> Adapter:
    """Return a copy of the adapter that a PEFT model carries."""
    slots = {name: slot.detach().to("cpu").float().numpy().copy() for name, slot in parameters(model).items()}
    names = sorted({name.rsplit(".", 1)[0] for name in slots})
    layers = {
        name: LoraFactors(a=slots[f"{name}.a"], b=slots[f"{name}.b"], core=slots.get(f"{name}.core")) for name in names
    }
    return Adapter(layers=layers, alpha=alpha, base=base)


def linear_shape(module: Any) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a linear map, GPT-2's Conv1D included; None for any other module."""
    import torch

    if isinstance(module, torch.nn.Linear):
        return int(module.in_features), int(module.out_features)
    if type(module).__name__ == "Conv1D":  # transformers.pytorch_utils; its weight is (d_in, d_out)
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def block_of(name: str) -> int:
    """Return the number of the decoder block in a module path, -1 outside of any block."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)
