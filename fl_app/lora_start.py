"""The adapter that a run, or a round, starts from: delta_W = 0, drawn from a seed or taken from the base model.

Legend of shapes: r = rank; a (r, d_in), b (d_out, r), core (r, r).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fl_app.errors import AdapterMismatch
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from fl_app.config import LoraInit
    from fl_app.lora import LoraSpec
    from fl_app.models import FrozenModel


def initial(spec: LoraSpec, rng: np.random.Generator, init: LoraInit = "uniform") -> Adapter:
    """Return the adapter a run starts from: delta_W = 0, drawn without any data.

    | init        | a                                              | b |
    |-------------|------------------------------------------------|---|
    | uniform     | in +-1/sqrt(d_in), as PEFT's kaiming_uniform   | 0 |
    | orthonormal | orthonormal rows: noise on b reaches all alike | 0 |

    With cores a and b are orthonormal whatever `init` says, and the core is 0.

    Raises: AdapterMismatch when the rank exceeds a side that must be orthonormal; for `weights`, see `from_weights`.
    Source: Hu et al. 2021 (LoRA, 2106.09685), 4.1; Sun et al. 2024 (FFA-LoRA, 2403.12313) for the orthonormal option.
    """
    if init == "weights":
        raise AdapterMismatch('lora.init = "weights" takes its directions from the base model; see from_weights')

    def orthonormal(name: str, width: int) -> np.ndarray:
        if spec.rank > width:
            raise AdapterMismatch(f"{name} has a side of {width}, so no {spec.rank} orthonormal rows; lower lora.rank")
        columns, upper = np.linalg.qr(rng.standard_normal((width, spec.rank)))
        return (columns * np.sign(np.diag(upper))).astype(np.float32)

    def draw(name: str, d_in: int, d_out: int) -> LoraFactors:
        if spec.core:
            core = np.zeros((spec.rank, spec.rank), np.float32)
            return LoraFactors(a=orthonormal(name, d_in).T.copy(), b=orthonormal(name, d_out), core=core)
        if init == "orthonormal":
            a = orthonormal(name, d_in).T.copy()
        else:
            a = rng.uniform(-(d_in**-0.5), d_in**-0.5, (spec.rank, d_in)).astype(np.float32)
        return LoraFactors(a=a, b=np.zeros((d_out, spec.rank), np.float32))

    layers = {name: draw(name, d_in, d_out) for name, (d_in, d_out) in sorted(spec.shapes.items())}
    return Adapter(layers=layers, alpha=spec.alpha, base=spec.base)


def from_weights(frozen: FrozenModel, spec: LoraSpec) -> Adapter:
    """Return an adapter whose a and b are the first singular vectors of each frozen map, and delta_W = 0.

    With cores a, b stay and the core, zero at first, learns; without, b is zero and a begins along the map's own
    directions. No data is looked at. Source: LoRA-XS (Balazy et al. 2024, 2405.17604), section 3; ours starts its core
    at zero, so that a run begins at the base model.
    """
    layers: dict[str, LoraFactors] = {}
    for name, (d_in, d_out) in sorted(spec.shapes.items()):
        if spec.rank > min(d_in, d_out):
            raise AdapterMismatch(f"{name} has a side of {min(d_in, d_out)}, less than lora.rank = {spec.rank}")
        module: Any = frozen.model.get_submodule(name)
        weight = module.weight.detach().float().numpy().astype(np.float64)
        u, _, v = np.linalg.svd(weight.T if type(module).__name__ == "Conv1D" else weight, full_matrices=False)
        a, b = v[: spec.rank].astype(np.float32), u[:, : spec.rank].astype(np.float32)
        core = np.zeros((spec.rank, spec.rank), np.float32) if spec.core else None
        layers[name] = LoraFactors(a=a, b=b if spec.core else np.zeros_like(b), core=core)
    return Adapter(layers=layers, alpha=spec.alpha, base=spec.base)
