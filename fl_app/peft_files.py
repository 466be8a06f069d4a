"""Adapters as PEFT's files: `adapter_model.safetensors` and `adapter_config.json`, loadable by `PeftModel`.

An adapter with cores is written as the plain LoRA that it amounts to, b @ core in the place of b; `core.safetensors`
beside it holds what was folded, so that a run can go on from it and PEFT need not know.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_app import disk, lora
from fl_app.errors import AdapterMismatch, NotFinite
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from pathlib import Path

_A, _B = ".lora_A.weight", ".lora_B.weight"

WEIGHTS, CONFIG, CORES = "adapter_model.safetensors", "adapter_config.json", "core.safetensors"


def save(adapter: Adapter, folder: Path, *, base_name: str, dtype: str = "float32") -> None:
    """Write an adapter's files into a folder.

    Guarantee: equal adapters under equal names give equal bytes.
    Raises: NotFinite before anything is written; DiskFull, RunInvalid, and each file is then whole or as it was.
    """
    import torch
    from safetensors.torch import save as to_bytes

    for name, factors in sorted(adapter.layers.items()):
        for tensor, values in lora.named_factors(name, factors).items():
            if not np.isfinite(values).all():
                raise NotFinite(f"{tensor} holds NaN or infinity; such an adapter is neither kept nor sent")

    def bytes_of(values: dict[str, Any], kind: str) -> bytes:
        tensors = {name: torch.from_numpy(np.array(one)).to(getattr(torch, kind)) for name, one in values.items()}
        return _with_sorted_header(to_bytes(tensors, metadata={"format": "pt", "stillroom_base": adapter.base}))

    plain = lora.plain(adapter)
    factors = {f"{lora.PEFT_PREFIX}{name}{_A}": one.a for name, one in plain.layers.items()}
    factors |= {f"{lora.PEFT_PREFIX}{name}{_B}": one.b for name, one in plain.layers.items()}
    disk.replace(folder / WEIGHTS, bytes_of(factors, dtype))
    if lora.has_core(adapter):
        named = [lora.named_factors(name, one) for name, one in adapter.layers.items()]
        kept = {tensor: values for one in named for tensor, values in one.items() if not tensor.endswith(".a")}
        disk.replace(folder / CORES, bytes_of(kept, "float32"))
    config = lora.peft_config(adapter, base_model_name_or_path=base_name, task_type="CAUSAL_LM", inference_mode=True)
    text = json.dumps(_plain(config.to_dict()), indent=2, sort_keys=True)
    disk.replace(folder / CONFIG, (text + "\n").encode())


def load(folder: Path, *, base: str | None = None) -> Adapter:
    """Return the adapter of a PEFT directory. `base` is the hash of its base model when the file does not say.

    Raises: AdapterMismatch when a tensor is not a LoRA factor, a factor is alone, or the base is not known.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    parts: dict[str, dict[str, np.ndarray]] = {}
    tensors, known_base = _read(folder / WEIGHTS, base)
    for key, values in tensors.items():
        path = key.removeprefix(lora.PEFT_PREFIX)
        factor = "a" if path.endswith(_A) else "b" if path.endswith(_B) else ""
        if not factor:
            raise AdapterMismatch(f"{folder}: tensor {key!r} is no LoRA factor; only plain LoRA is loaded")
        parts.setdefault(path.removesuffix(_A).removesuffix(_B), {})[factor] = values
    if known_base is None:
        raise AdapterMismatch(f"{folder} does not say which base it is for; pass its hash")
    for name, found in parts.items():
        if found.keys() != {"a", "b"}:
            raise AdapterMismatch(f"{folder}: layer {name} has only factor {', '.join(found)}")
    if (folder / CORES).is_file():
        for tensor, values in _read(folder / CORES, base)[0].items():
            name, _, factor = tensor.rpartition(".")
            parts[name][factor] = values
    layers = {name: LoraFactors(a=one["a"], b=one["b"], core=one.get("core")) for name, one in parts.items()}
    return Adapter(layers=layers, alpha=float(config["lora_alpha"]), base=known_base)


def _read(path: Path, base: str | None) -> tuple[dict[str, np.ndarray], str | None]:
    """Return the tensors of a file in the order of their names, and the base that it or the caller names."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key).float().numpy() for key in sorted(handle.keys())}
        return tensors, (handle.metadata() or {}).get("stillroom_base") or base


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
