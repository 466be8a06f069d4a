"""Adapter algebra: numpy adapters, their place on a torch model, and PEFT's files.

`Adapter` holds float32 numpy arrays by module path of the base model. PEFT supplies the layers and the file format;
what is ours is the mapping between the two, so that every adapter is checked by name and shape and never guessed.

Legend of shapes: r = rank; a (r, d_in), b (d_out, r).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fl_app import disk
from fl_app.errors import AdapterMismatch, NotFinite
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fl_app.config import LoraSection
    from fl_app.models import FrozenModel

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the module paths of the base model."""

_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """The exact shape every adapter of a run must have: module path -> (d_in, d_out)."""

    shapes: Mapping[str, tuple[int, int]]
    rank: int
    alpha: float
    base: str


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
        if name.rsplit(".", 1)[-1] in section.targets and _block(name) >= section.first_layer
    }
    if not shapes:
        linear = {name.rsplit(".", 1)[-1] for name in maps}
        raise AdapterMismatch(
            f"lora.targets {list(section.targets)} from layer {section.first_layer} match nothing in "
            f"{frozen.resolved.name}; linear maps there: {', '.join(sorted(linear))}"
        )
    return LoraSpec(shapes=shapes, rank=section.rank, alpha=section.alpha, base=frozen.resolved.sha256)


def initial(spec: LoraSpec, rng: np.random.Generator, init: Literal["uniform", "orthonormal"] = "uniform") -> Adapter:
    """Return the adapter a run starts from: b zero, so that delta_W = 0, and a drawn without any data.

    uniform      in +-1/sqrt(d_in), what PEFT's kaiming_uniform(a=sqrt(5)) amounts to
    orthonormal  rows orthonormal (the Q of a Gaussian matrix): noise on b reaches every direction alike

    Raises: AdapterMismatch when the rank exceeds a map's inputs, which have no more orthonormal directions.
    Source: Hu et al. 2021 (LoRA, 2106.09685), 4.1; Sun et al. 2024 (FFA-LoRA, 2403.12313) for the orthonormal option.
    """

    def draw(name: str, d_in: int) -> np.ndarray:
        if init == "uniform":
            return rng.uniform(-(d_in**-0.5), d_in**-0.5, (spec.rank, d_in))
        if spec.rank > d_in:
            raise AdapterMismatch(f"{name} has {d_in} inputs, so no {spec.rank} orthonormal rows; lower lora.rank")
        columns, upper = np.linalg.qr(rng.standard_normal((d_in, spec.rank)))
        return (columns * np.sign(np.diag(upper))).T

    layers = {
        name: LoraFactors(a=draw(name, d_in).astype(np.float32), b=np.zeros((d_out, spec.rank), np.float32))
        for name, (d_in, d_out) in sorted(spec.shapes.items())
    }
    return Adapter(layers=layers, alpha=spec.alpha, base=spec.base)


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
    for name in spec.shapes:
        factors = adapter.layers[name]
        for tensor, values in ((f"{name}.a", factors.a), (f"{name}.b", factors.b)):
            if values.shape != shapes[tensor]:
                return Difference(rule="shape", tensor=tensor, reason=f"is {values.shape}, ours is {shapes[tensor]}")
            if not np.isfinite(values).all():
                return Difference(rule="finite", tensor=tensor, reason="holds NaN or infinity")
    return None


def factor_shapes(spec: LoraSpec) -> dict[str, tuple[int, int]]:
    """Return the shape of every factor of a spec, by `<layer>.a` and `<layer>.b`."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, (d_in, d_out) in sorted(spec.shapes.items()):
        shapes[f"{name}.a"], shapes[f"{name}.b"] = (spec.rank, d_in), (d_out, spec.rank)
    return shapes


def delta(adapter: Adapter, layer: str) -> np.ndarray:
    """Return delta_W of one layer, shape (d_out, d_in), float64. For tests and small models."""
    factors = adapter.layers[layer]
    return (adapter.alpha / factors.a.shape[0]) * factors.b.astype(np.float64) @ factors.a.astype(np.float64)


def sha256(adapter: Adapter) -> str:
    """Return a content hash over base, scaling, names, shapes and bytes."""
    digest = hashlib.sha256(f"{adapter.base} {adapter.alpha!r}".encode())
    for name in sorted(adapter.layers):
        factors = adapter.layers[name]
        for part in (factors.a, factors.b):
            digest.update(f"{name} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part, np.float32).tobytes())
    return digest.hexdigest()


def num_bytes(adapter: Adapter) -> int:
    """Return the size of the adapter's arrays in bytes."""
    return sum(factors.a.nbytes + factors.b.nbytes for factors in adapter.layers.values())


def _config(adapter: Adapter, **fields: Any) -> Any:
    from peft import LoraConfig

    kind: Any = LoraConfig
    return kind(r=rank_of(adapter), lora_alpha=adapter.alpha, target_modules=sorted(adapter.layers), **fields)


def attach(frozen: FrozenModel, adapter: Adapter) -> Any:
    """Return a PEFT model over a replica of the frozen weights that carries `adapter`, in float32.

    Raises: AdapterMismatch when the adapter is for another base.
    """
    from peft import get_peft_model

    if adapter.base != frozen.resolved.sha256:
        raise AdapterMismatch(
            f"adapter is for base {adapter.base[:12]}, {frozen.resolved.name} is {frozen.resolved.sha256[:12]}"
        )
    base = frozen.replica().model
    conv1d = any(type(base.get_submodule(name)).__name__ == "Conv1D" for name in adapter.layers)
    model: Any = get_peft_model(base, _config(adapter, lora_dropout=0.0, fan_in_fan_out=conv1d))
    write(model, adapter)
    return model


def parameters(model: Any) -> dict[str, Any]:
    """Return the LoRA parameters of a PEFT model by `<module path>.a` and `.b`, in sorted order."""
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        path = name.removeprefix(PEFT_PREFIX)
        for marker, factor in ((".lora_A.default.weight", ".a"), (".lora_B.default.weight", ".b")):
            if path.endswith(marker):
                found[path.removesuffix(marker) + factor] = parameter
    return dict(sorted(found.items()))


def write(model: Any, adapter: Adapter) -> None:
    """Copy an adapter's numbers into a PEFT model of the same layers and rank.

    Raises: AdapterMismatch, before anything is written, when a layer or a shape differs: torch would broadcast.
    """
    import torch

    slots = parameters(model)
    if {name.rsplit(".", 1)[0] for name in slots} != set(adapter.layers):
        raise AdapterMismatch("the model's adapted layers are not the adapter's layers")
    for name, factors in adapter.layers.items():
        for key, values in ((f"{name}.a", factors.a), (f"{name}.b", factors.b)):
            if values.shape != slots[key].shape:
                raise AdapterMismatch(f"{key} is of shape {values.shape}, the model's is {tuple(slots[key].shape)}")
    with torch.no_grad():
        for name, factors in adapter.layers.items():
            slots[f"{name}.a"].copy_(torch.from_numpy(np.array(factors.a)))
            slots[f"{name}.b"].copy_(torch.from_numpy(np.array(factors.b)))


def read(model: Any, *, alpha: float, base: str) -> Adapter:
    """Return a copy of the adapter that a PEFT model carries."""
    slots = {name: slot.detach().to("cpu").float().numpy().copy() for name, slot in parameters(model).items()}
    names = sorted({name.rsplit(".", 1)[0] for name in slots})
    layers = {name: LoraFactors(a=slots[f"{name}.a"], b=slots[f"{name}.b"]) for name in names}
    return Adapter(layers=layers, alpha=alpha, base=base)


def save_peft(adapter: Adapter, folder: Path, *, base_name: str, dtype: str = "float32") -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, loadable by `PeftModel.from_pretrained`.

    Guarantee: equal adapters under equal names give equal bytes.
    Raises: NotFinite before anything is written; DiskFull, RunInvalid, and each file is then whole or as it was.
    """
    import torch
    from safetensors.torch import save

    tensors: dict[str, Any] = {}
    for name, factors in sorted(adapter.layers.items()):
        if not (np.isfinite(factors.a).all() and np.isfinite(factors.b).all()):
            raise NotFinite(f"{name} holds NaN or infinity; such an adapter is neither kept nor sent")
        tensors[f"{PEFT_PREFIX}{name}{_A}"] = torch.from_numpy(np.array(factors.a)).to(getattr(torch, dtype))
        tensors[f"{PEFT_PREFIX}{name}{_B}"] = torch.from_numpy(np.array(factors.b)).to(getattr(torch, dtype))
    file = save(tensors, metadata={"format": "pt", "stillroom_base": adapter.base})
    disk.replace(folder / "adapter_model.safetensors", _with_sorted_header(file))
    config = _config(adapter, base_model_name_or_path=base_name, task_type="CAUSAL_LM", inference_mode=True)
    text = json.dumps(_plain(config.to_dict()), indent=2, sort_keys=True)
    disk.replace(folder / "adapter_config.json", (text + "\n").encode())


def load_peft(folder: Path, *, base: str | None = None) -> Adapter:
    """Return the adapter of a PEFT directory. `base` is the hash of its base model when the file does not say.

    Raises: AdapterMismatch when a tensor is not a LoRA factor, a factor is alone, or the base is not known.
    """
    from safetensors import safe_open

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    parts: dict[str, dict[str, np.ndarray]] = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as handle:
        known_base = (handle.metadata() or {}).get("stillroom_base") or base
        for key in sorted(handle.keys()):
            path = key.removeprefix(PEFT_PREFIX)
            factor = "a" if path.endswith(_A) else "b" if path.endswith(_B) else ""
            if not factor:
                raise AdapterMismatch(f"{folder}: tensor {key!r} is no LoRA factor; only plain LoRA is loaded")
            name = path.removesuffix(_A).removesuffix(_B)
            parts.setdefault(name, {})[factor] = handle.get_tensor(key).float().numpy()
    if known_base is None:
        raise AdapterMismatch(f"{folder} does not say which base it is for; pass its hash")
    for name, found in parts.items():
        if found.keys() != {"a", "b"}:
            raise AdapterMismatch(f"{folder}: layer {name} has only factor {', '.join(found)}")
    layers = {name: LoraFactors(a=found["a"], b=found["b"]) for name, found in parts.items()}
    return Adapter(layers=layers, alpha=float(config["lora_alpha"]), base=known_base)


def linear_shape(module: Any) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a linear map, GPT-2's Conv1D included; None for any other module."""
    import torch

    if isinstance(module, torch.nn.Linear):
        return int(module.in_features), int(module.out_features)
    if type(module).__name__ == "Conv1D":  # transformers.pytorch_utils; its weight is (d_in, d_out)
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def _block(name: str) -> int:
    """Return the number of the decoder block in a module path, -1 outside of any block."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _with_sorted_header(file: bytes) -> bytes:
    """Return a safetensors file with its header in order: the library writes the metadata in a random one."""
    size = int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header + file[8 + size :]


def _plain(value: Any) -> Any:
    """Return JSON-ready data: sets become sorted lists, enums their value."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(item) for item in value)
    return getattr(value, "value", value)
