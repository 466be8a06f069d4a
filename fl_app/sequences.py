"""Token sequences that carry a loss on their second half, bucketed by length, and their loss one by one.

Both a site's learner and the server's tuner train on (prefix, text) pairs: the prefix carries no loss (prefix-LM), the
text does, averaged over its own tokens. Nothing here averages over a batch: a batch-wide token mean would couple
examples and break per-example clipping.

Legend of shapes: B = rows of a micro-batch, T = padded length, V = vocabulary, N = positions that carry loss.
Source: Kurakin et al. 2023 (2306.01684) for the prefix-LM loss; specs `performance.md` 2 for sorting and for
computing logits only where a loss is due.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class FrozenPrefix:
    """Hidden states that enter the first adapted block, by sequence; constants of a run, since all below is frozen.

    Shapes: each (length, D) in the model's own type. Exact: the same arithmetic, done once instead of every epoch.
    """

    first_block: int
    states: Mapping[int, Any]

    def padded(self, keys: Sequence[TokenSequence], *, width: int) -> Any:
        """Return the states of some sequences, right-padded with zeros. Shape: (B, width, D)."""
        import torch

        rows = [self.states[id(key)] for key in keys]
        return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, width - row.shape[0])) for row in rows])


def first_adapted_block(names: Iterable[str]) -> int:
    """Return the lowest decoder block among module paths of adapted layers; 0 when one lies outside of any block."""
    return min((next((int(part) for part in name.split(".") if part.isdigit()), 0) for name in names), default=0)


def frozen_states(model: Any, batch: MicroBatch, first_block: int) -> dict[int, Any]:
    """Return the states of one micro-batch for a `FrozenPrefix`, keyed by the identity of its sequences."""
    import torch

    with torch.no_grad():
        bottom = _blocks(model.get_base_model().get_decoder(), 0, first_block)
        hidden_BTD = bottom(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)[0]
    return {id(key): hidden_BTD[row, : len(key.ids)].clone() for row, key in enumerate(batch.keys)}


def can_be_cut(model: Any) -> bool:
    """Whether the decoder is the common kind: embeddings, `layers`, a final `norm`."""
    decoder = model.get_base_model().get_decoder()
    return hasattr(decoder, "layers") and hasattr(decoder, "norm")


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
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i].ids), i))
    batches: list[list[int]] = []
    for index in order:
        width = len(sequences[index].ids)
        if batches and width * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return [_pad(sequences, rows, pad_id) for rows in batches]


def example_losses(model: Any, batch: MicroBatch, frozen: FrozenPrefix | None = None) -> Any:
    """Return each row's mean negative log-likelihood over its own loss positions, in nats. Shape: (B,) float32.

    `model` is a PEFT model of a causal language model; logits are computed only where a loss is due (N of B * T).
    With `frozen`, only the blocks from the first adapted one up are computed.
    """
    import torch

    core = model.get_base_model()
    if frozen is None:
        hidden_BTD = core.get_decoder()(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)[0]
    else:
        top = _blocks(core.get_decoder(), frozen.first_block, None)
        start_BTD = frozen.padded([batch.keys[row] for row in range(len(batch.rows))], width=batch.ids_BT.shape[1])
        hidden_BTD = top(inputs_embeds=start_BTD, attention_mask=batch.mask_BT, use_cache=False)[0]
    rows_N, positions_N = batch.loss_mask_BT.nonzero(as_tuple=True)
    logits_NV = core.get_output_embeddings()(hidden_BTD[rows_N, positions_N]).float()
    targets_N = batch.ids_BT[rows_N, positions_N + 1]
    losses_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    counts_B = batch.loss_mask_BT.sum(dim=1).clamp(min=1)
    totals_B = torch.zeros(len(batch.rows), dtype=torch.float32).index_add(0, rows_N, losses_N)
    return totals_B / counts_B


def _blocks(decoder: Any, first: int, last: int | None) -> Any:
    """Return a view of a decoder that runs blocks first..last over the same weights; only the top ends in its norm."""
    import torch

    view = copy.copy(decoder)
    view.__dict__["_modules"] = dict(decoder.__dict__["_modules"])
    view.layers = torch.nn.ModuleList(list(decoder.layers)[first:last])
    if last is not None:
        view.norm = torch.nn.Identity()
    return view


def _pad(sequences: Sequence[TokenSequence], rows: Sequence[int], pad_id: int) -> MicroBatch:
    import torch

    width = max(len(sequences[i].ids) for i in rows)
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
