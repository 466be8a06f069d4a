"""Clipped sums of per-example LoRA gradients: the one place where single examples have gradients.

One backward pass of the summed losses gives every LoRA layer its inputs and output gradients for all rows at once; at
rank 8 a row's gradient is two products of them that cost next to nothing, so it is formed, measured and added, and
forgotten. The clip is joint over all trained factors; a row whose gradient is not finite contributes zero.

What "whoever else is there" means in bits. A row is padded by its own length alone (`sequences.isolated_batches`),
shares a batch only where kernels keep rows apart (`fl_app.kernels`), and its scaled gradient is added in float64. So
adding a row to the sum moves it by that row's clipped gradient and by nothing else, up to 2^-53: in float32 and in
bfloat16 alike, with one or two torch threads (with others see `fl_app.kernels`).

Two engines, one result: `fused` is ours, `opacus` (GradSampleModule hooks, `wrap_model=False`) is the reference.

Legend of shapes: B = rows of a micro-batch, T = padded length, I and O = inputs and outputs of a map, r = rank,
P = trained coordinates; a factor b (O, r) is kept transposed, (r, O), until the end; a core is (r, r).
Source: Goodfellow 2015 (1510.01799) for the outer product; Abadi et al. 2016 (1607.00133) for clip and sum.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from fl_app import kernels, lora, lora_linear, sequences

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    import numpy.typing as npt

    from fl_app.lora_linear import LoraLayer
    from fl_app.sequences import FrozenPrefix, MicroBatch, TokenSequence

Engine = Literal["fused", "opacus"]

NORM_BLOCK = 1 << 9
"""Coordinates whose squares are added in float32; whole factors would be off by 1e-3 in the worst case."""


class RowLosses(Protocol):
    """A loss for each row of a micro-batch, a function of that row alone; `sequences.example_losses` is the plain one.

    `name` tells its arithmetic from that of others: whether rows keep apart is asked once for each.
    """

    @property
    def name(self) -> str:
        """What is computed, in words that differ where the arithmetic does."""
        ...

    def __call__(self, model: Any, batch: MicroBatch, frozen: FrozenPrefix | None) -> Any:
        """Return the losses. Shape: (B,) float32."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class ClippedSum:
    """Sum over rows of gradients clipped to `clip_norm`: one float64 array per factor of `trained`, in that order."""

    tensors: tuple[npt.NDArray[np.float64], ...]


def trained(model: Any) -> dict[str, Any]:
    """Return the factors that a learner moves, by the names of `lora.parameters`: those that ask for a gradient."""
    return {name: weight for name, weight in lora.parameters(model).items() if weight.requires_grad}


def clipped_sum(
    model: Any,
    examples: Sequence[TokenSequence],
    *,
    clip_norm: float,
    max_batch_tokens: int,
    pad_id: int,
    engine: Engine = "fused",
    frozen: FrozenPrefix | None = None,
    losses: RowLosses | None = None,
) -> ClippedSum:
    """Return the clipped sum of the gradients of each example's own loss; zeros for no examples.

    The loss is the mean over the example's own tokens, or what `losses` says.

    Guarantee: adding or removing one example changes the result by at most `clip_norm` in L2 norm, up to a relative
    2^-15 for the float32 norm and 2^-53 for each addition, whatever the other examples are. Micro-batches of at most
    `max_batch_tokens` padded tokens only split the sum.
    """
    layout = _Layout.of(model)
    total_P = np.zeros(layout.size)
    per_example = _opacus_gradients if engine == "opacus" else _fused_gradients
    with per_example(model, layout, losses) as gradients_of:
        how = f"{engine} {losses.name if losses else ''}"
        tokens = max_batch_tokens if _rows_keep_apart(model, layout, gradients_of, max_batch_tokens, how) else 1
        for batch in sequences.isolated_batches(examples, max_batch_tokens=tokens, pad_id=pad_id):
            _add_clipped(total_P, gradients_of(batch, frozen), clip_norm)
    return ClippedSum(tensors=layout.split(total_P))


def plain_sum(
    model: Any, examples: Sequence[TokenSequence], *, max_batch_tokens: int, pad_id: int
) -> tuple[npt.NDArray[np.float64], ...]:
    """Return the sum of the examples' gradients, not clipped and not private, in the order of `trained`."""
    layout = _Layout.of(model)
    total_P = np.zeros(layout.size)
    with _summed_gradients(model, layout) as gradient_of:
        for batch in sequences.isolated_batches(examples, max_batch_tokens=max_batch_tokens, pad_id=pad_id):
            total_P += gradient_of(batch).numpy()
    return layout.split(total_P)


def row_losses(
    model: Any,
    examples: Sequence[TokenSequence],
    *,
    max_batch_tokens: int,
    pad_id: int,
    frozen: FrozenPrefix | None = None,
) -> npt.NDArray[np.float64]:
    """Return each example's own loss, in the order of `examples`. Shape: (examples,).

    Guarantee: an example's loss has the same bits in every company, as gradients have in `clipped_sum`.
    """
    import torch

    def losses_of(batch: MicroBatch, frozen: FrozenPrefix | None) -> Any:
        with torch.no_grad():
            return sequences.example_losses(model, batch, frozen)

    found = np.zeros(len(examples))
    layout = _Layout.of(model)
    with lora_linear.fused(model, _no_sink):
        apart = _rows_keep_apart(model, layout, losses_of, max_batch_tokens, "losses")
        for batch in sequences.isolated_batches(
            examples, max_batch_tokens=max_batch_tokens if apart else 1, pad_id=pad_id
        ):
            found[list(batch.rows)] = losses_of(batch, frozen).double().numpy()
    return found


def _no_sink(*_: Any) -> None:
    raise AssertionError("a loss has no backward pass")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where each trained factor lies in a flat vector of P coordinates. Shapes: name -> (r, I), (r, O) or (r, r)."""

    shapes: dict[str, tuple[int, int]]
    starts: dict[str, int]
    size: int

    @classmethod
    def of(cls, model: Any) -> _Layout:
        """Return the layout of the trained factors. Raises: ValueError when nothing is trained."""
        shapes = {name: tuple(w.t().shape if name.endswith(".b") else w.shape) for name, w in trained(model).items()}
        if not shapes:
            raise ValueError("no factor asks for a gradient: there is nothing to learn")
        ends = np.cumsum([rows * columns for rows, columns in shapes.values()])
        starts = dict(zip(shapes, [0, *ends[:-1].tolist()], strict=True))
        return cls(shapes=shapes, starts=starts, size=int(ends[-1]))

    def part(self, flat: Any, name: str) -> Any:
        """Return a factor's view of flat vectors. Shapes: flat (B, P) -> (B, r, I, O or r)."""
        rows, columns = self.shapes[name]
        start = self.starts[name]
        return flat[:, start : start + rows * columns].view(flat.shape[0], rows, columns)

    def split(self, flat_P: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
        """Return the factors' own arrays, b transposed back. Shapes: (P,) -> a (r, I), b (O, r), core (r, r)."""
        parts: list[npt.NDArray[np.float64]] = []
        for name, shape in self.shapes.items():
            part = flat_P[self.starts[name] : self.starts[name] + shape[0] * shape[1]].reshape(shape)
            parts.append(np.ascontiguousarray(part.T) if name.endswith(".b") else part)
        return tuple(parts)


def _rows_keep_apart(
    model: Any, layout: _Layout, gradients_of: Callable[..., Any], max_batch_tokens: int, how: str
) -> bool:
    """Whether a row's gradient has the same bits alone and in company, here and now; asked once per process and `how`.

    The products are tried at every height (`fl_app.kernels`), then the model as a whole on a few short rows: GPT-2's
    attention, for one, takes another path for one row than for two.
    """
    import torch

    config = model.get_base_model().config
    dtype = str(model.get_input_embeddings().weight.dtype)
    attention = str(getattr(config, "_attn_implementation", ""))
    carried = [
        {name: tuple(weight.shape) for name, weight in lora.parameters(model, place=where).items()}
        for where in (lora.ADAPTER, lora.BLOCKS)
    ]
    shape = (config.to_json_string(), str(layout.shapes), str(carried))
    place = (*shape, dtype, attention, how, max_batch_tokens, torch.get_num_threads())
    verdicts = _verdicts()
    if place not in verdicts:
        verdicts[place] = kernels.keep_rows_apart(model, max_batch_tokens) and _gradients_keep_apart(
            gradients_of, model
        )
    return verdicts[place]


@functools.cache
def _verdicts() -> dict[tuple[str | int, ...], bool]:
    """Return what was found out in this process: a property of machine and model, in which no row has a part."""
    return {}


def _gradients_keep_apart(gradients_of: Callable[..., Any], model: Any) -> bool:
    """Whether rows of two widths have the same gradient alone and in company, over enough numbers to tell."""
    import torch

    config = model.get_base_model().config.get_text_config()
    rng = np.random.default_rng(0)
    numbers = 2 * sequences.WIDTH_STEP * config.hidden_size * config.num_hidden_layers
    for _ in range(kernels.draws(numbers, model.get_input_embeddings().weight.dtype)):
        for width, height in ((sequences.WIDTH_STEP, 3), (2 * sequences.WIDTH_STEP, 2)):
            rows = [
                sequences.TokenSequence(
                    ids=tuple(rng.integers(0, config.vocab_size, width - n).tolist()), loss_from=1 + n
                )
                for n in range(height)
            ]
            alone = gradients_of(*_together(rows[:1], width))[0].clone()
            if not torch.equal(gradients_of(*_together(rows, width))[-1], alone):  # sorted: the longest comes last
                return False
    return True


def _together(rows: Sequence[TokenSequence], width: int) -> tuple[MicroBatch, None]:
    """Return rows of one width as one micro-batch, and no frozen states: arguments of a `gradients_of`."""
    (batch,) = sequences.isolated_batches(rows, max_batch_tokens=len(rows) * width, pad_id=0)
    return batch, None


def _add_clipped(total_P: npt.NDArray[np.float64], gradient_BP: Any, clip_norm: float) -> None:
    """Add each row's gradient, scaled to at most `clip_norm`, to the total. Shapes: gradient (B, P) float32."""
    import torch

    # Float32 within blocks, float64 over them: a sum of 2^9 squares is right to 2^-15 in any order, its root to 2^-16.
    # A block that overflows is infinite, and such a row counts as not finite.
    whole = gradient_BP.shape[1] // NORM_BLOCK * NORM_BLOCK
    blocks_BKN = gradient_BP[:, :whole].unflatten(1, (-1, NORM_BLOCK)) if whole else gradient_BP[:, :0].unsqueeze(1)
    norms_BK = torch.linalg.vector_norm(blocks_BKN, dim=2).double()
    rest_B = torch.linalg.vector_norm(gradient_BP[:, whole:], dim=1).double()
    norm_B = (norms_BK.square().sum(1) + rest_B.square()).sqrt()
    scales_B = torch.where(torch.isfinite(norm_B), (clip_norm / norm_B).clamp(max=1.0), 0.0).tolist()
    total = torch.from_numpy(total_P)
    for row, scale in enumerate(scales_B):
        if scale > 0:  # zero times infinity would not be zero
            total.add_(gradient_BP[row], alpha=scale)


@contextmanager
def _fused_gradients(model: Any, layout: _Layout, losses: RowLosses | None) -> Generator[Callable[..., Any]]:
    """Yield a function: micro-batch -> per-example gradients (B, P), formed while the backward pass goes by."""
    import torch

    buffer = torch.empty(0, layout.size)
    seen: set[str] = set()

    def sink(layer: LoraLayer, *parts: Any) -> None:
        for name, left_BTr, right in _pairs(layer, *parts):
            if name in layout.shapes:
                _products_into(layout.part(buffer, name), left_BTr.transpose(1, 2), right, add=name in seen)
                seen.add(name)

    def gradients_of(batch: MicroBatch, frozen: FrozenPrefix | None) -> Any:
        nonlocal buffer
        if buffer.shape[0] != batch.ids_BT.shape[0]:
            buffer = torch.empty(batch.ids_BT.shape[0], layout.size)
        seen.clear()
        with torch.enable_grad():
            (losses or sequences.example_losses)(model, batch, frozen).sum().backward()
        for name in layout.shapes.keys() - seen:  # a layer that no token passed through
            layout.part(buffer, name).zero_()
        return buffer

    with lora_linear.fused(model, sink):
        yield gradients_of


@contextmanager
def _summed_gradients(model: Any, layout: _Layout) -> Generator[Callable[[MicroBatch], Any]]:
    """Yield a function: micro-batch -> the sum of its rows' gradients (P,), formed without any row's own."""
    import torch

    total_1P = torch.zeros(1, layout.size)

    def sink(layer: LoraLayer, *parts: Any) -> None:
        for name, left_BTr, right in _pairs(layer, *parts):
            if name in layout.shapes:
                layout.part(total_1P, name)[0].add_(left_BTr.flatten(0, 1).t() @ right.flatten(0, 1))

    def gradient_of(batch: MicroBatch) -> Any:
        total_1P.zero_()
        with torch.enable_grad():
            sequences.example_losses(model, batch).sum().backward()
        return total_1P[0]

    with lora_linear.fused(model, sink):
        yield gradient_of


def _pairs(
    layer: LoraLayer, x_BTI: Any, low_BTr: Any, u_BTr: Any, slope_BTO: Any, core: tuple[Any, Any] | None = None
) -> list[tuple[str, Any, Any]]:
    """Return (factor, left, right) with the factor's gradient, kept as `_Layout` keeps it, left_i' right_i of row i."""
    pairs = [(f"{layer.name}.a", u_BTr, x_BTI), (f"{layer.name}.b", low_BTr, slope_BTO)]
    return pairs if core is None else [*pairs, (f"{layer.name}.core", *core)]


def _products_into(target_BrI: Any, left_BrT: Any, right_BTI: Any, *, add: bool) -> None:
    """Write (or add) each row's product left @ right into `target`, which is float32 whatever they are.

    One product per row, of a shape that is the row's own: batched kernels need not treat rows alike.
    """
    import torch

    for target, left, right in zip(target_BrI, left_BrT, right_BTI, strict=True):
        if left.dtype == target.dtype and not add:
            torch.mm(left, right, out=target)
        elif add:
            target.add_(left @ right)
        else:
            target.copy_(left @ right)


@contextmanager
def _opacus_gradients(model: Any, layout: _Layout, losses: RowLosses | None) -> Generator[Callable[..., Any]]:
    """Yield the same function from Opacus' grad-sample hooks."""
    import torch
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    weights = trained(model)
    factors = [m for m in model.modules() if any(getattr(m, "weight", None) is weight for weight in weights.values())]
    for factor in factors:
        factor.train()  # Opacus' hooks look away from modules in eval mode; the rest stays there, without dropout
    hooks: Any = GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=False)

    def gradients_of(batch: MicroBatch, frozen: FrozenPrefix | None) -> Any:
        (losses or sequences.example_losses)(model, batch, frozen).sum().backward()
        gradient_BP = torch.empty(batch.ids_BT.shape[0], layout.size)
        for name, weight in weights.items():
            sample = weight.grad_sample.detach()
            layout.part(gradient_BP, name).copy_(sample.transpose(1, 2) if name.endswith(".b") else sample)
            weight.grad_sample = None
            weight.grad = None
        return gradient_BP

    try:
        yield gradients_of
    finally:
        hooks.cleanup()
        for factor in factors:
            factor.eval()
