"""Clipped sums of per-example LoRA gradients: the one place where single examples have gradients.

A LoRA factor is a linear map without bias; for row i its gradient is sum_t g_t x_t^T, with x the map's input and g the
gradient at its output. One backward pass of the summed losses gives x and g for all rows at once, so per-example
gradients cost two small products per layer. The clip is joint over all factors (A and B of every layer); rows whose
gradient is not finite contribute zero.

Two engines, one result: `hooks` is ours, `opacus` (GradSampleModule hooks, `wrap_model=False`) is the reference.

Legend of shapes: B = rows of a micro-batch, T = padded length, I and O = inputs and outputs of one factor.
Source: Goodfellow 2015 (1510.01799) for the outer product; Abadi et al. 2016 (1607.00133) for clip and sum.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fl_app import lora, sequences

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from fl_app.sequences import TokenSequence

Engine = Literal["hooks", "opacus"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class ClippedSum:
    """Sum over rows of gradients clipped to `clip_norm`, one tensor per factor in the order of `lora.parameters`."""

    tensors: tuple[Any, ...]


def clipped_sum(
    model: Any,
    examples: Sequence[TokenSequence],
    *,
    clip_norm: float,
    max_batch_tokens: int,
    pad_id: int,
    engine: Engine = "hooks",
) -> ClippedSum:
    """Return the clipped sum of the gradients of each example's own mean loss; zeros for no examples.

    Guarantee: adding or removing one example changes the result by at most `clip_norm` in L2 norm, whatever the other
    examples are. Micro-batches only split the sum.
    """
    import torch

    weights = list(lora.parameters(model).values())
    totals = [torch.zeros_like(weight) for weight in weights]
    per_example = _opacus_gradients if engine == "opacus" else _hook_gradients
    with per_example(model) as gradients_of:
        for batch in sequences.micro_batches(examples, max_batch_tokens=max_batch_tokens, pad_id=pad_id):
            gradients = gradients_of(batch)
            _add_clipped(totals, gradients, clip_norm)
            del gradients
    return ClippedSum(tensors=tuple(totals))


def _add_clipped(totals: list[Any], gradients: Sequence[Any], clip_norm: float) -> None:
    """Add each row's gradient, scaled to at most `clip_norm`, to the totals. Shapes: gradients (B, *weight)."""
    import torch

    square_B = sum(gradient.flatten(1).double().square().sum(1) for gradient in gradients)
    assert isinstance(square_B, torch.Tensor)
    norm_B = square_B.sqrt()
    scale_B = torch.where(torch.isfinite(norm_B), (clip_norm / norm_B.clamp(min=1e-30)).clamp(max=1.0), 0.0).float()
    # Below float32's normal range a scale has too few digits to keep the bound; such a row counts as not finite.
    usable_B = scale_B >= torch.finfo(torch.float32).tiny
    scale_B = torch.where(usable_B, scale_B, 0.0)
    for total, gradient in zip(totals, gradients, strict=True):
        clean = torch.where(usable_B.view(-1, *[1] * (gradient.ndim - 1)), gradient, 0.0)
        total.add_(torch.einsum("b,b...->...", scale_B, clean))


@contextmanager
def _hook_gradients(model: Any) -> Generator[Any]:
    """Yield a function: micro-batch -> per-example gradients, from inputs and output gradients of every factor."""
    import torch

    factors = _factor_modules(model)
    seen: dict[str, tuple[Any, Any]] = {}

    def remember(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...], output_BTO: Any) -> None:
            seen[name] = (inputs[0].detach(), output_BTO)

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in factors.items()]

    def gradients_of(batch: Any) -> list[Any]:
        seen.clear()
        with torch.enable_grad():
            loss = sequences.example_losses(model, batch).sum()
            names = list(factors)
            slopes = torch.autograd.grad(loss, [seen[name][1] for name in names])
        result = [
            torch.einsum("bto,bti->boi", slope_BTO.float(), seen[name][0].float())
            for name, slope_BTO in zip(names, slopes, strict=True)
        ]
        seen.clear()
        return result

    try:
        yield gradients_of
    finally:
        seen.clear()
        for handle in handles:
            handle.remove()


@contextmanager
def _opacus_gradients(model: Any) -> Generator[Any]:
    """Yield the same function from Opacus' grad-sample hooks."""
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    weights = list(lora.parameters(model).values())
    model.train()
    hooks: Any = GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=False)

    def gradients_of(batch: Any) -> list[Any]:
        sequences.example_losses(model, batch).sum().backward()
        result = [weight.grad_sample.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad_sample = None
            weight.grad = None
        return result

    try:
        yield gradients_of
    finally:
        hooks.cleanup()
        model.eval()


def _factor_modules(model: Any) -> dict[str, Any]:
    """Return the linear maps of all factors by the names of `lora.parameters`, in the same order."""
    by_weight = {id(weight): name for name, weight in lora.parameters(model).items()}
    modules = {by_weight[id(m.weight)]: m for m in model.modules() if id(getattr(m, "weight", None)) in by_weight}
    return dict(sorted(modules.items()))
