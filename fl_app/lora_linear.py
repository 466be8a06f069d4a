"""A LoRA layer as one node of the graph: frozen map plus low rank, and a backward that hands its factors to a sink.

    out = x W' + bias + s * (x A') B'            (' is transposed, s = alpha / r)
    u = s * g B;   dx = g W + u A;   dA = u' x;   dB = s * g' (x A')

Where the model carries frozen blocks, their rows stand below A and their columns beside B: they are part of the
products, of dx, and of nothing else. Where the adapter has a core (fl_app.lora), with v = g B, per row:

    out = x W' + bias + s * ((x A') core') B';   u = s * v core;   dcore = v' (s * x A');   dB = s * g' ((x A') core')

PEFT builds the same from six modules, adds their outputs, and saves an activation for each. One node needs no sum of
its own and keeps x and x A' alone. What becomes of the factors' gradients is the caller's business: a `Sink` gets the
matrices they are products of, so that a learner can form them per row and a tuner for the batch.

Legend of shapes: B = rows, T = padded length, N = B * T, I and O = inputs and outputs, r = rank.
Source: Hu et al. 2021 (LoRA, 2106.09685), equation 3; the outer-product form of per-example gradients is Goodfellow
2015 (1510.01799). Ours differs from PEFT 0.21 in the graph only; tests hold it to PEFT's outputs and gradients.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fl_app import lora
from fl_app.errors import AdapterMismatch

if TYPE_CHECKING:
    from collections.abc import Generator

ADAPTER, BLOCKS = lora.ADAPTER, lora.BLOCKS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraLayer:
    """One adapted map. `name` is its path in the base model; `transposed`: GPT-2's Conv1D, whose weight is (I, O).

    `under` are the factors of frozen blocks, None without any: a (R, I), and b (O, R) in the scaling of this layer.
    `core` is (r, r), None for the identity.
    """

    name: str
    weight: Any
    bias: Any
    a: Any
    b: Any
    scaling: float
    transposed: bool
    under: tuple[Any, Any] | None = None
    core: Any = None


class Sink(Protocol):
    """Where the gradients of a layer's factors go, once per call of the layer in a forward pass."""

    def __call__(
        self,
        layer: LoraLayer,
        x_BTI: Any,
        low_BTr: Any,
        u_BTr: Any,
        slope_BTO: Any,
        core: tuple[Any, Any] | None = None,
        /,
    ) -> None:
        """Take the parts: dA of row i is u_i' x_i, dB of row i is slope_i' low_i (low = s * x A', or s * x A' core').

        `core` is given for a layer that has one: (v, w) with dcore of row i = v_i' w_i, where w = s * x A'.
        """
        ...


@contextmanager
def fused(model: Any, sink: Sink) -> Generator[dict[str, LoraLayer]]:
    """Let every LoRA layer of a PEFT model run as one node that reports to `sink`; yield the layers by name.

    Guarantee: outputs and gradients equal PEFT's up to rounding; factors get no `.grad` by themselves; on leaving,
    the model is what it was.
    Raises: AdapterMismatch for a layer that is not plain LoRA (dropout, DoRA, bias, several adapters), and, when it is
    called, for one whose inputs are not rows of tokens.
    """
    modules = {name: module for name, module in model.named_modules() if ADAPTER in getattr(module, "lora_A", {})}
    layers = {module: _layer(name.removeprefix(lora.PEFT_PREFIX), module) for name, module in modules.items()}
    node = _node()

    def forward_of(layer: LoraLayer) -> Any:
        def forward(x_BTI: Any, *_: Any, **__: Any) -> Any:
            if x_BTI.ndim != 3:  # noqa: PLR2004 - B, T, I
                raise AdapterMismatch(
                    f"{layer.name} gets inputs of shape {tuple(x_BTI.shape)}, which do not say where a row ends; "
                    "leave it out of lora.targets"
                )
            return node.apply(x_BTI, layer.a, layer.b, layer.core, layer, sink)

        return forward

    try:
        for module, layer in layers.items():
            module.forward = forward_of(layer)
        yield {layer.name: layer for layer in layers.values()}
    finally:
        for module in layers:
            module.__dict__.pop("forward", None)


def _layer(name: str, module: Any) -> LoraLayer:
    """Return a PEFT module as a value. Raises: AdapterMismatch."""
    import torch

    a, b, base = module.lora_A[ADAPTER], module.lora_B[ADAPTER], module.base_layer
    dropout = module.lora_dropout[ADAPTER]
    core = getattr(b, lora.CORE, None)
    b = b if core is None else getattr(b, lora.WIDE)
    plain = isinstance(dropout, torch.nn.Identity) and a.bias is None and b.bias is None
    if not plain or module.use_dora.get(ADAPTER) or not set(module.lora_A) <= {ADAPTER, BLOCKS} or module.merged:
        raise AdapterMismatch(f"{name} is not plain LoRA (dropout 0, no DoRA, no bias, one adapter, not merged)")
    transposed = type(base).__name__ == "Conv1D"
    if not transposed and not isinstance(base, torch.nn.Linear):
        raise AdapterMismatch(f"{name} is a {type(base).__name__}; LoRA is trained on Linear and Conv1D only")
    return LoraLayer(
        name=name,
        weight=base.weight,
        bias=base.bias,
        a=a.weight,
        b=b.weight,
        scaling=float(module.scaling[ADAPTER]),
        transposed=transposed,
        under=_under(module) if BLOCKS in module.lora_A else None,
        core=None if core is None else core.weight,
    )


def _under(module: Any) -> tuple[Any, Any]:
    """Return the frozen factors of a PEFT module, b in the scaling of the trained ones."""
    ratio = float(module.scaling[BLOCKS]) / float(module.scaling[ADAPTER])
    return module.lora_A[BLOCKS].weight.detach(), module.lora_B[BLOCKS].weight.detach() * ratio


def _row_by_row(x_BTI: Any, thin_Ir: Any) -> Any:
    """Return x @ thin with one product per row: thin products in bfloat16 round by the height of the batch.

    Shapes: x (B, T, I), thin (I, r) -> (B * T, r).
    """
    import torch

    out_BTr = x_BTI.new_empty(*x_BTI.shape[:-1], thin_Ir.shape[1])
    for x_TI, out_Tr in zip(x_BTI, out_BTr, strict=True):
        torch.mm(x_TI, thin_Ir, out=out_Tr)
    return out_BTr.flatten(0, 1)


@functools.cache
def _node() -> Any:
    import torch

    class LoraNode(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_BTI: Any, a_rI: Any, b_Or: Any, core_rr: Any, layer: LoraLayer, sink: Sink) -> Any:
            x_NI = x_BTI.reshape(-1, x_BTI.shape[-1])
            ctx.own = a_rI.shape[0]
            if layer.under is not None:
                a_rI, b_Or = torch.cat([a_rI, layer.under[0]]), torch.cat([b_Or, layer.under[1]], dim=1)
            a_rI, b_rO = a_rI.to(x_NI.dtype), b_Or.t().to(x_NI.dtype).contiguous()
            core_rr = None if core_rr is None else core_rr.to(x_NI.dtype)
            weight_IO = layer.weight if layer.transposed else layer.weight.t()
            out_NO = x_NI @ weight_IO if layer.bias is None else torch.addmm(layer.bias, x_NI, weight_IO)
            low_Nr = _row_by_row(x_BTI, a_rI.t()).mul_(layer.scaling)
            mid_Nr = low_Nr if core_rr is None else _through(core_rr.t(), low_Nr, x_BTI)
            out_NO.addmm_(mid_Nr, b_rO)
            ctx.save_for_backward(x_BTI, low_Nr, mid_Nr, a_rI, b_rO, core_rr, weight_IO)
            ctx.layer, ctx.sink = layer, sink
            return out_NO.view(*x_BTI.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, *slopes: Any) -> Any:
            x_BTI, low_Nr, mid_Nr, a_rI, b_rO, core_rr, weight_IO = ctx.saved_tensors
            slope_BTO = slopes[0]
            slope_NO = slope_BTO.reshape(-1, slope_BTO.shape[-1])
            v_Nr = _row_by_row(slope_BTO, b_rO.t())

            def own(part_Nr: Any) -> Any:
                return part_Nr.view(*x_BTI.shape[:-1], -1)[..., : ctx.own]

            if core_rr is None:
                u_Nr = v_Nr.mul_(ctx.layer.scaling)
                ctx.sink(ctx.layer, x_BTI, own(low_Nr), own(u_Nr), slope_NO.view_as(slope_BTO))
            else:
                u_Nr = _through(core_rr, v_Nr, x_BTI).mul_(ctx.layer.scaling)
                ctx.sink(
                    ctx.layer, x_BTI, own(mid_Nr), own(u_Nr), slope_NO.view_as(slope_BTO), (own(v_Nr), own(low_Nr))
                )
            dx_BTI = None
            if ctx.needs_input_grad[0]:
                dx_BTI = (slope_NO @ weight_IO.t()).addmm_(u_Nr, a_rI).view_as(x_BTI)
            return dx_BTI, None, None, None, None, None

    return LoraNode


def _through(core_rr: Any, low_NR: Any, x_BTI: Any) -> Any:
    """Return a copy of `low` with its first r columns times the core; those of frozen blocks have none."""
    rank = core_rr.shape[0]
    out_NR = low_NR.clone()
    out_NR[:, :rank] = _row_by_row(low_NR.view(*x_BTI.shape[:-1], -1)[..., :rank], core_rr)
    return out_NR
