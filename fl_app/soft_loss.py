"""The loss of single tokens against a teacher's whole distribution, without ever holding all logits.

    loss_n = hard_n * CE_n + soft_n * KL(p_T || p_S)_n,   p = softmax(logits / temperature)

and its gradient with respect to the student's logits is hard_n * (softmax(logits) - onehot) + soft_n / temperature *
(p_S - p_T). Both models' logits live for one chunk of positions; the teacher's are constants. The caller's soft_n
holds the factor temperature^2 that keeps the gradient's size (Hinton et al.).

Legend of shapes: N = positions that carry loss, D = width of the student, E = of the teacher, V = vocabulary, C =
positions of one chunk.
Source: Hinton et al. 2015 (1503.02531), section 2; chunks as in `fl_app.token_loss`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from fl_app.kernels import HEIGHT_STEP
from fl_app.token_loss import Head, padded, to_logits

CHUNK = 128
"""Positions per chunk: seven float32 buffers of 49k words each then take 170 MB a thread (512 would take 700)."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class SoftTargets:
    """What the student is held to. Shapes: hidden (N, E) the teacher's states, no graph; hard, soft (N,) weights.

    `head` maps the teacher's states to logits over the student's own vocabulary.
    """

    hidden_NE: Any
    head: Head
    hard_N: Any
    soft_N: Any
    temperature: float


def mixed_losses(hidden_ND: Any, targets_N: Any, head: Head, soft: SoftTargets) -> Any:
    """Return hard * cross entropy + soft * KL of each position, in nats. Shape: (N,) float32.

    Guarantee: a position's loss and its gradient depend on that position alone, as in `token_loss.token_losses`; the
    gradient reaches the student's states and nothing of the teacher's.
    """
    return _chunked_loss().apply(hidden_ND, targets_N, head, soft)


@functools.cache
def _chunked_loss() -> Any:
    import torch

    class MixedLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden_ND: Any, targets_N: Any, head: Head, soft: SoftTargets) -> Any:
            count = hidden_ND.shape[0]
            slopes_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
            losses_N = torch.empty(count, dtype=torch.float32, device=hidden_ND.device)
            for start in range(0, count, CHUNK):
                part = slice(start, min(start + CHUNK, count))
                slopes_CV = _chunk(hidden_ND[part], targets_N[part], head, soft, part, losses_N)
                if slopes_ND is not None:
                    narrow = padded(slopes_CV.to(hidden_ND.dtype), -slopes_CV.shape[0] % HEIGHT_STEP)
                    slopes_ND[part] = torch.mm(narrow, head.weight)[: slopes_CV.shape[0]]
            ctx.slopes_ND = slopes_ND
            return losses_N

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            slopes_ND = ctx.slopes_ND * upstream[0].to(ctx.slopes_ND.dtype).unsqueeze(1)
            ctx.slopes_ND = None
            return slopes_ND, None, None, None

    return MixedLoss


def _chunk(hidden_CD: Any, targets_C: Any, head: Head, soft: SoftTargets, part: slice, losses_N: Any) -> Any:
    """Write the losses of a chunk into their place; return their gradient with respect to hidden @ weight.T (C, V)."""
    hard_C1, soft_C1 = soft.hard_N[part].unsqueeze(1), soft.soft_N[part].unsqueeze(1)
    logits_CV, steepness_CV = _logits(hidden_CD, head, slopes=True)
    taught_CV, _ = _logits(soft.hidden_NE[part], soft.head, slopes=False)
    log_student_CV = (logits_CV / soft.temperature).log_softmax(1)
    log_teacher_CV = taught_CV.div_(soft.temperature).log_softmax(1)
    teacher_CV = log_teacher_CV.exp()
    divergence_C = log_teacher_CV.sub_(log_student_CV).mul_(teacher_CV).sum(1)
    log_plain_CV = log_student_CV if soft.temperature == 1 else logits_CV.log_softmax(1)
    index_C1 = targets_C.unsqueeze(1)
    surprise_C = -log_plain_CV.gather(1, index_C1).squeeze(1)
    losses_N[part] = soft.hard_N[part] * surprise_C + soft.soft_N[part] * divergence_C
    slopes_CV = log_student_CV.exp().sub_(teacher_CV).mul_(soft_C1 / soft.temperature)
    slopes_CV.add_(log_plain_CV.exp_().mul_(hard_C1)).scatter_add_(1, index_C1, -hard_C1)
    if steepness_CV is not None:
        slopes_CV.mul_(steepness_CV)
    return slopes_CV if head.scale == 1.0 else slopes_CV.mul_(head.scale)


def _logits(hidden_CD: Any, head: Head, *, slopes: bool) -> Any:
    """Return the logits of a chunk in float32, and the slope of a soft cap or None. Shapes: (C, D) -> (C, V) twice."""
    raw_CV = padded(hidden_CD, -hidden_CD.shape[0] % HEIGHT_STEP) @ head.weight.t()
    wide_CV = raw_CV[: hidden_CD.shape[0]].float()
    return wide_CV, to_logits(wide_CV, head, slopes)
