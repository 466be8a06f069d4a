"""Evidence from the real engine: canary rows trained by `dp_lora` as a site trains, seen where AdamW sees them.

    canaries -> their clipped gradients (computed here, not by the engine) -> a random half becomes a site's rows
    -> the learner's own round of one step at rate 1 -> the gradient that reaches the optimizer

That is the view the accountant assumes: the attacker knows every canary, the clip and the start, and sees each noisy
sum itself, not only the adapter that is made of it.

Legend of shapes: M = canaries, B = rows of a batch, T = padded length, P = trained coordinates.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clients.learners.dp_lora import DpLora
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from clients.units import encoded_units
from fl_app import lora, lora_linear, sequences
from fl_app.config import LoraSection
from fl_app.privacy.noise import SimulatedNoise
from fl_app.types import Adapter, LoraFactors
from simulations.attacks.stages import Evidence

if TYPE_CHECKING:
    from collections.abc import Generator

    import numpy.typing as npt

    from fl_app.models import FrozenModel
    from simulations.attacks.stages import Doubles

    Floats = npt.NDArray[np.float32]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEXT, TOKENS = 14, 16
"""Random printable characters of a canary, and tokens of it with begin and end under a byte vocabulary."""

B_SCALE = 0.3
"""Entries of the start's b. At 0.3 the canaries' gradients are nearly orthogonal (mean cosine 0.001 on tiny-random)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """How the engine that is audited differs from the one that is claimed: factors on its noise and its clip."""

    noise: float = 1.0
    clip: float = 1.0


NO_FAULT = Fault()
FAULTS = {"no noise": Fault(noise=1e-6), "noise / 4": Fault(noise=0.25), "clip * 4": Fault(clip=4.0)}
"""What a one-run audit of 2,000 canaries must catch at a claimed epsilon of 2."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class Canaries:
    """Rows, the start they are trained from, and what an attacker computes beforehand, in units of `clip_norm`.

    Shapes: gradients (M, P) float32, gram (M, M).
    """

    rows: tuple[PrivateRow, ...]
    start: Adapter
    frozen: FrozenModel
    clip_norm: float
    gradients: Floats
    gram: Doubles


def make(frozen: FrozenModel, rng: np.random.Generator, *, count: int, rank: int, clip_norm: float = 1.0) -> Canaries:
    """Return canaries of random characters on a random adapter of all linear maps."""
    spec = lora.spec_of(frozen, LoraSection(rank=rank, alpha=float(rank), targets=TARGETS))
    layers = {
        name: LoraFactors(
            a=rng.normal(0, d_in**-0.5, (rank, d_in)).astype(np.float32),
            b=rng.normal(0, B_SCALE, (d_out, rank)).astype(np.float32),
        )
        for name, (d_in, d_out) in spec.shapes.items()
    }
    start = Adapter(layers=layers, alpha=spec.alpha, base=spec.base)
    texts = ["".join(map(chr, codes)) for codes in rng.integers(33, 127, (count, TEXT)).tolist()]
    rows = tuple(PrivateRow(instruction=t, output="", code="", unit=str(n)) for n, t in enumerate(texts))
    gradients = _gradients(frozen, start, rows)
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    gradients *= np.minimum(1.0, clip_norm / norms) / clip_norm
    gram = (gradients @ gradients.T).astype(np.float64)
    return Canaries(rows=rows, start=start, frozen=frozen, clip_norm=clip_norm, gradients=gradients, gram=gram)


def evidence(
    canaries: Canaries,
    rng: np.random.Generator,
    *,
    noise_multiplier: float,
    fault: Fault = NO_FAULT,
    unseen: bool = False,
) -> Evidence:
    """Return the evidence of one run of the learner on a random half of the canaries.

    `noise_multiplier` is claimed, at the canaries' clip norm; `fault` is what really runs. With `unseen` the learner
    gets no row at all, and the coins decide nothing: the chance level of every attack.
    """
    included = rng.random(len(canaries.rows)) < 0.5  # noqa: PLR2004 - a fair coin
    rows = [] if unseen else [row for row, inside in zip(canaries.rows, included, strict=True) if inside]
    section = DpLora(kind="dp_lora", steps=1, clip_norm=canaries.clip_norm * fault.clip)
    told, learner = _constants(), section.build(1)
    receipt = learner.announce(told, noise_multiplier * fault.noise / fault.clip)
    bench = Workbench(model=canaries.frozen, codes={}, noise=SimulatedNoise(rng), system="")
    with steps_seen() as seen:
        learner(PrivateRows(rows), canaries.start, receipt, told, bench)
    (release,) = seen
    matches = (canaries.gradients @ (release / canaries.clip_norm).astype(np.float32)).astype(np.float64)
    return Evidence(matches=matches, gram=canaries.gram, noise_multiplier=noise_multiplier, included=included)


@contextmanager
def steps_seen() -> Generator[list[Doubles]]:
    """Collect what every optimizer step of this process sees: all active factors' gradients, as one (P,) vector."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    seen: list[Doubles] = []

    def look(optimizer: Any, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        found = [weight.grad for weight in weights if weight.grad is not None]  # others took no part in this step
        seen.append(np.concatenate([gradient.double().numpy().ravel() for gradient in found]))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def _constants() -> PublicConstants:
    """Every unit in every step, and a normaliser of one: what the optimizer sees is the noised sum."""
    return PublicConstants(sample_rate=1.0, expected_batch=1, max_tokens=TOKENS, max_rows_per_unit=1, unit="record")


def _gradients(frozen: FrozenModel, start: Adapter, rows: tuple[PrivateRow, ...]) -> Floats:
    """Return every row's gradient from the parts that the layers report, in the optimizer's order. Shapes: (M, P)."""
    import torch

    bench = Workbench(model=frozen, codes={}, noise=SimulatedNoise(np.random.default_rng(0)), system="")
    encoded = [unit[0] for unit in encoded_units(PrivateRows(rows), "instruction", _constants(), bench)]
    model = lora.attach(frozen, start)
    parts: dict[str, Any] = {}

    def keep(layer: lora_linear.LoraLayer, x_BTI: Any, low_BTr: Any, u_BTr: Any, slope_BTO: Any, *_: Any) -> None:
        parts[f"{layer.name}.a"] = torch.einsum("btr,bti->bri", u_BTr, x_BTI)
        parts[f"{layer.name}.b"] = torch.einsum("bto,btr->bor", slope_BTO, low_BTr)

    weights = lora.parameters(model)
    found = np.empty((len(rows), sum(weight.numel() for weight in weights.values())), np.float32)
    with lora_linear.fused(model, keep):
        for batch in sequences.micro_batches(encoded, max_batch_tokens=512, pad_id=frozen.tokenizer.pad_token_id):
            with torch.enable_grad():
                sequences.example_losses(model, batch).sum().backward()
            found[list(batch.rows)] = torch.cat([parts[name].flatten(1) for name in weights], dim=1).numpy()
    return found
