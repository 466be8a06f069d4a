"""The loss of single tokens under a large vocabulary, without ever holding all logits.

At 49k words the head and its cross entropy cost as much as eight decoder blocks, and their logits more memory than the
whole rest of a step. Here a chunk of positions at a time becomes logits, then probabilities in the same buffer, then
at once the gradient that the hidden states will need; nothing of the size of the vocabulary is kept.

Legend of shapes: N = positions that carry loss, D = width of the model, V = vocabulary, C = positions of one chunk.
Source: the gradient of softmax and cross entropy is p - onehot; chunked as in Wijmans et al. 2024 (Cut Cross-Entropy,
2411.09009) and Liger Kernel. Ours differs in giving one loss and one gradient per position, never a mean over them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from fl_app.kernels import HEIGHT_STEP

CHUNK = 512
"""Positions per chunk: large enough for the matrix units (256 is 6 % slower on a CPU), 100 MB at 49k words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The map from hidden states to logits: logits = cap(scale * (hidden @ weight.T + bias)).

    Shapes: weight (V, D), bias (V,) or None; `softcap` None or the bound c of c * tanh(logits / c).
    """

    weight: Any
    bias: Any
    scale: float
    softcap: float | None


def head_of(core: Any) -> Head | None:
    """Return the head of a causal language model, or None when it is not a frozen linear map of the usual kind."""
    import torch

    head = core.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.weight.requires_grad:
        return None
    config = core.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight=head.weight, bias=head.bias, scale=scale, softcap=softcap)


def token_losses(hidden_ND: Any, targets_N: Any, head: Head) -> Any:
    """Return the negative log-likelihood of each target, in nats. Shape: (N,) float32.

    Guarantee: a position's loss and its gradient depend on that position alone, in all bits where kernels keep rows
    apart (`fl_app.kernels`): products have a multiple of 16 rows, some of zeros.
    """
    return _chunked_loss().apply(hidden_ND, targets_N, head)


@functools.cache
def _chunked_loss() -> Any:
    import torch

    class ChunkedLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden_ND: Any, targets_N: Any, head: Head) -> Any:
            count = hidden_ND.shape[0]
            chunk = max(HEIGHT_STEP, min(CHUNK, count))
            slopes_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
            losses_N = torch.empty(count, dtype=torch.float32, device=hidden_ND.device)
            tall = -(-chunk // HEIGHT_STEP) * HEIGHT_STEP
            raw_CV = torch.empty(tall, head.weight.shape[0], dtype=hidden_ND.dtype, device=hidden_ND.device)
            wide_CV = raw_CV if raw_CV.dtype == torch.float32 else torch.empty_like(raw_CV, dtype=torch.float32)
            for start in range(0, count, chunk):
                size = min(chunk, count - start)
                part = slice(start, start + size)
                padding = -size % HEIGHT_STEP
                raw, wide = raw_CV[: size + padding], wide_CV[: size + padding]
                torch.mm(padded(hidden_ND[part], padding), head.weight.t(), out=raw)
                losses_N[part] = _to_slopes(raw[:size], wide[:size], targets_N[part], head, slopes_ND is not None)
                if slopes_ND is not None:
                    wide[size:] = 0
                    narrow = wide if wide.dtype == raw.dtype else raw.copy_(wide)
                    slopes_ND[part] = torch.mm(narrow, head.weight)[:size]
            ctx.slopes_ND = slopes_ND
            return losses_N

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            slopes_ND = ctx.slopes_ND * upstream[0].to(ctx.slopes_ND.dtype).unsqueeze(1)
            ctx.slopes_ND = None
            return slopes_ND, None, None

    return ChunkedLoss


def to_logits(wide: Any, head: Head, slopes: bool) -> Any:
    """Turn products hidden @ weight.T into logits, in place; with a soft cap, return its slope where asked, else None.

    Shapes: wide (C, V) float32.
    """
    if head.bias is not None:
        wide.add_(head.bias)
    if head.scale != 1.0:
        wide.mul_(head.scale)
    steepness = None
    if head.softcap is not None:
        wide.div_(head.softcap).tanh_()
        steepness = 1 - wide.square() if slopes else None
        wide.mul_(head.softcap)
    return steepness


def padded(hidden_ND: Any, rows: int) -> Any:
    """Return the states with so many rows of zeros below them."""
    import torch

    return torch.nn.functional.pad(hidden_ND, (0, 0, 0, rows)) if rows else hidden_ND


def _to_slopes(raw: Any, wide: Any, targets: Any, head: Head, slopes: bool) -> Any:
    """Return the losses of a chunk; `wide` then holds their gradient with respect to hidden @ weight.T.

    Shapes: raw (C, V) products of hidden states and weights, wide (C, V) float32 (the same buffer in float32).
    """
    import torch

    if wide.dtype != raw.dtype:
        wide.copy_(raw)
    steepness = to_logits(wide, head, slopes)
    index = targets.unsqueeze(1)
    target_logits = wide.gather(1, index).squeeze(1)
    top = wide.amax(1)
    torch.softmax(wide, 1, out=wide)
    losses = top - wide.amax(1).log() - target_logits  # top - log p(top) is the log-sum-exp, whatever underflows
    if slopes:
        wide.scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
        if steepness is not None:
            wide.mul_(steepness)
        if head.scale != 1.0:
            wide.mul_(head.scale)
    return losses
