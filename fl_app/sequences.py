"""Token sequences that carry a loss on their second half, bucketed by length, and their loss one by one.

Both a site's learner and the server's tuner train on (prefix, text) pairs: the prefix carries no loss (prefix-LM), the
text does, averaged over its own tokens. Nothing here averages over a batch: a batch-wide token mean would couple
examples and break per-example clipping.

Two ways to batch. `micro_batches` packs tightly, for text that is not private. `isolated_batches` pads a sequence to a
width that depends on that sequence alone and may put it alone: with kernels that keep rows apart (`fl_app.kernels`),
adding a row then moves no other row's gradient by a single bit, which is what a bound on sensitivity means.

Legend of shapes: B = rows of a micro-batch, T = padded length, D = width, N = positions that carry loss.
Source: Kurakin et al. 2023 (2306.01684) for the prefix-LM loss; sorting by length and logits only where a loss is due
are engineering (docs/performance.md).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_app import token_loss

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WIDTH_STEP = 16
"""Isolated batches are as wide as the next multiple of this: few shapes, and at most 15 tokens of padding a row."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class TokenSequence:
    """Token ids and the index of the first token that carries loss. Hides its repr: it may be private text."""

    ids: tuple[int, ...]
    loss_from: int


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class MicroBatch:
    """Right-padded rows. Shapes: ids, mask (B, T) int64; loss_mask (B, T - 1) bool over predicted positions.

    `rows` are indices into the sequences that were batched, `keys` those sequences themselves.
    """

    rows: tuple[int, ...]
    keys: tuple[TokenSequence, ...]
    ids_BT: Any
    mask_BT: Any
    loss_mask_BT: Any


@dataclass(slots=True, kw_only=True, repr=False, eq=False)
class FrozenPrefix:
    """Hidden states that enter the first adapted block, by sequence; constants of a run, since all below is frozen.

    Shapes: each (length, D) in the model's own type. Exact: the same arithmetic, done once instead of at every step.
    Keyed by identity, so it lives no longer than the sequences do. Beyond `most_bytes` it computes and does not keep.
    """

    first_block: int
    most_bytes: int = 1 << 30
    states: dict[int, Any] = field(default_factory=dict[int, Any])
    kept_bytes: int = 0

    def entering(self, model: Any, batch: MicroBatch) -> Any:
        """Return the states that enter the first adapted block. Shape: (B, T, D); zeros on padding.

        Rows that were met before are not computed again.
        """
        missing = [row for row, key in enumerate(batch.keys) if id(key) not in self.states]
        fresh: dict[int, Any] = {}
        if missing:
            computed_MTD = frozen_states(model, batch, self.first_block, missing)
            fresh = {row: computed_MTD[n, : len(batch.keys[row].ids)].clone() for n, row in enumerate(missing)}
        for row, state in fresh.items():
            if self.kept_bytes + state.nbytes <= self.most_bytes:
                self.states[id(batch.keys[row])] = state
                self.kept_bytes += state.nbytes
        rows = [fresh[row] if row in fresh else self.states[id(key)] for row, key in enumerate(batch.keys)]
        height, width = batch.ids_BT.shape
        start_BTD = rows[0].new_zeros(height, width, rows[0].shape[1])
        for row, state in enumerate(rows):
            start_BTD[row, : state.shape[0]] = state
        return start_BTD


def first_adapted_block(names: Iterable[str]) -> int:
    """Return the lowest decoder block among module paths of adapted layers; 0 when one lies outside of any block."""
    return min((next((int(part) for part in name.split(".") if part.isdigit()), 0) for name in names), default=0)


def frozen_states(model: Any, batch: MicroBatch, first_block: int, rows: Sequence[int]) -> Any:
    """Return the states of some rows of a micro-batch that enter block `first_block`. Shape: (len(rows), T, D)."""
    import torch

    with torch.no_grad():
        bottom = _blocks(model.get_base_model().get_decoder(), 0, first_block)
        return bottom(input_ids=batch.ids_BT[rows], attention_mask=batch.mask_BT[rows], use_cache=False)[0]


def can_be_cut(model: Any, first_block: int) -> bool:
    """Whether a decoder gives the same states when it runs in two halves, found by running it both ways once.

    True for the common kind (embeddings, `layers`, a final `norm`); others, GPT-2 and models with blocks of several
    kinds among them, are trained whole.
    """
    import torch

    decoder = model.get_base_model().get_decoder()
    if not (first_block and hasattr(decoder, "layers") and hasattr(decoder, "norm")):
        return False
    kinds = getattr(decoder.config, "layer_types", None) or []
    if kinds[first_block:] != kinds[: len(kinds) - first_block]:
        return False  # a decoder that tells its blocks apart by number would take the upper half for the lower
    probe = TokenSequence(ids=tuple(range(WIDTH_STEP)), loss_from=1)
    batch = _pad([probe], [0], pad_id=0, width=WIDTH_STEP)
    with torch.no_grad():
        whole_BTD = decoder(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)[0]
        cut_BTD = _from_block(decoder, FrozenPrefix(first_block=first_block).entering(model, batch), batch, first_block)
    return bool(torch.equal(whole_BTD, cut_BTD))


def encode(tokenizer: Any, prefix: str, text: str, *, max_tokens: int, end: bool = True) -> TokenSequence:
    """Return prefix + text (+ end token), cut on the right at `max_tokens`.

    A prefix longer than `max_tokens - 1` is cut on the left, so that at least one token of the text carries loss;
    an empty text without an end token carries none and has a loss of zero.
    """
    assert max_tokens >= 2  # noqa: PLR2004 - the configuration's own bound is 8; [-0:] would keep the whole prefix
    prefix_ids = tokenizer(prefix, add_special_tokens=False, verbose=False)["input_ids"][-(max_tokens - 1) :]
    text_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if end:
        text_ids = [*text_ids, tokenizer.eos_token_id]
    if not prefix_ids:
        prefix_ids = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    return TokenSequence(ids=tuple([*prefix_ids, *text_ids][:max_tokens]), loss_from=len(prefix_ids))


def micro_batches(sequences: Sequence[TokenSequence], *, max_batch_tokens: int, pad_id: int) -> list[MicroBatch]:
    """Return the sequences sorted by length in batches of at most `max_batch_tokens` padded tokens.

    `rows` of a batch are indices into `sequences`. A single row longer than the limit is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in _by_length(sequences):
        width = len(sequences[index].ids)
        if batches and width * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    widths = [max(len(sequences[i].ids) for i in rows) for rows in batches]
    return [_pad(sequences, rows, pad_id, width) for rows, width in zip(batches, widths, strict=True)]


def isolated_batches(sequences: Sequence[TokenSequence], *, max_batch_tokens: int, pad_id: int) -> list[MicroBatch]:
    """Return the sequences in batches in which the width of each is its own affair.

    A sequence of length n goes into batches of width W, the next multiple of `WIDTH_STEP`, and of at most
    max(1, max_batch_tokens // W) rows.

    Guarantee: the width of a sequence's batch is a function of its own length; with `max_batch_tokens` 1 so is the
    whole batch.
    """
    by_width: dict[int, list[int]] = {}
    for index in _by_length(sequences):
        by_width.setdefault(-(-len(sequences[index].ids) // WIDTH_STEP) * WIDTH_STEP, []).append(index)
    batches: list[MicroBatch] = []
    for width, rows in by_width.items():
        height = max(1, max_batch_tokens // width)
        batches += [_pad(sequences, rows[n : n + height], pad_id, width) for n in range(0, len(rows), height)]
    return batches


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class Scored:
    """A model's last states where a loss is due. Shapes: hidden (N, D); rows of the batch, targets (N,)."""

    hidden_ND: Any
    rows_N: Any
    targets_N: Any

    def means(self, losses_N: Any, batch: MicroBatch) -> Any:
        """Return each row's mean over its own positions, 0 for a row without any. Shape: (B,) float32."""
        import torch

        counts_B = batch.loss_mask_BT.sum(dim=1).clamp(min=1)
        totals_B = torch.zeros(batch.ids_BT.shape[0], dtype=torch.float32).index_add(0, self.rows_N, losses_N)
        return totals_B / counts_B


def core_of(model: Any) -> Any:
    """Return the causal language model inside a PEFT model, or the model itself when it is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def scored(model: Any, batch: MicroBatch, frozen: FrozenPrefix | None = None) -> Scored:
    """Return the states that logits are due from, N of B * T. With `frozen`, only adapted blocks are computed."""
    decoder = core_of(model).get_decoder()
    if frozen is None:
        hidden_BTD = decoder(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)[0]
    else:
        hidden_BTD = _from_block(decoder, frozen.entering(model, batch), batch, frozen.first_block)
    rows_N, positions_N = batch.loss_mask_BT.nonzero(as_tuple=True)
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, rows_N * batch.ids_BT.shape[1] + positions_N)
    return Scored(hidden_ND=hidden_ND, rows_N=rows_N, targets_N=batch.ids_BT[rows_N, positions_N + 1])


def example_losses(model: Any, batch: MicroBatch, frozen: FrozenPrefix | None = None) -> Any:
    """Return each row's mean negative log-likelihood over its own loss positions, in nats. Shape: (B,) float32.

    `model` is a PEFT model of a causal language model; logits are computed only where a loss is due (N of B * T) and
    a chunk at a time. With `frozen`, only the blocks from the first adapted one up are computed.
    """
    import torch

    found = scored(model, batch, frozen)
    core = core_of(model)
    head = token_loss.head_of(core)
    if head is None:  # a head that is no frozen linear map: the model's own arithmetic
        logits_NV = core.get_output_embeddings()(found.hidden_ND).float()
        losses_N = torch.nn.functional.cross_entropy(logits_NV, found.targets_N, reduction="none")
    else:
        losses_N = token_loss.token_losses(found.hidden_ND, found.targets_N, head)
    return found.means(losses_N, batch)


def _from_block(decoder: Any, start_BTD: Any, batch: MicroBatch, first_block: int) -> Any:
    top = _blocks(decoder, first_block, None)
    return top(inputs_embeds=start_BTD, attention_mask=batch.mask_BT, use_cache=False)[0]


def _by_length(sequences: Sequence[TokenSequence]) -> list[int]:
    return sorted(range(len(sequences)), key=lambda index: (len(sequences[index].ids), index))


def _blocks(decoder: Any, first: int, last: int | None) -> Any:
    """Return a view of a decoder that runs blocks first..last over the same weights; only the top ends in its norm."""
    import torch

    view = copy.copy(decoder)
    view.__dict__["_modules"] = dict(decoder.__dict__["_modules"])
    view.layers = torch.nn.ModuleList(list(decoder.layers)[first:last])
    if last is not None:
        view.norm = torch.nn.Identity()
    return view


def _pad(sequences: Sequence[TokenSequence], rows: Sequence[int], pad_id: int, width: int) -> MicroBatch:
    import torch

    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    loss = torch.zeros((len(rows), width - 1), dtype=torch.bool)
    for row, index in enumerate(rows):
        sequence = sequences[index]
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        mask[row, : len(sequence.ids)] = 1
        loss[row, sequence.loss_from - 1 : len(sequence.ids) - 1] = True
    return MicroBatch(
        rows=tuple(rows), keys=tuple(sequences[i] for i in rows), ids_BT=ids, mask_BT=mask, loss_mask_BT=loss
    )
