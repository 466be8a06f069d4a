"""Text and likelihoods from a model in memory; randomness is an argument.

Decoding is a loop of our own over the model's cached steps, for two reasons. transformers' `generate` samples from
torch's global generator; we decode greedily over scores to which `SeededSampling` has added Gumbel noise of a given
stream: argmax(score / T + Gumbel) is an exact draw from softmax(score / T) (Gumbel-max trick, Maddison et al. 2014),
and the same stream gives the same text. And `generate` computes every row until the last one ends; we take rows that
have ended out of the batch. Tests hold the loop to `generate`.

Legend of shapes: B = rows, A = rows still being written, T = padded length, V = vocabulary, O = options per prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_app.errors import NotFinite

if TYPE_CHECKING:
    from collections.abc import Sequence

CANDIDATES = 512
"""Sampling looks at this many most likely tokens. A full sort of 49k scores costs a third of a decoding step on a CPU;
under top_p <= .95 the tail beyond 512 tokens is cut anyway (assumption, not studied)."""

SHRINK = 0.875
"""The batch shrinks when no more than this share of its rows is still being written. One step costs as much as
54 ms + 2.4 ms a row (SmolLM2-135M, bfloat16, one thread), making a smaller cache about as much as the largest step."""

_WAY_OUT = "its weights, or the adapter on it, hold NaN or infinity; check the base model's files, lower learning_rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Log-likelihood (nats) of one continuation given its prompt, over its own tokens and UTF-8 bytes."""

    log_prob: float
    tokens: int
    bytes: int


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    rng: np.random.Generator | Sequence[np.random.Generator],
) -> list[str]:
    """Return one continuation per prompt, decoded as one batch, special tokens removed.

    temperature 0 is greedy; `rng` is then not used. A row ends at the end token or after `max_new_tokens`. With a
    generator per prompt a row's draws do not depend on the batch it is in; one for all draws for the batch as a whole.
    A row is left alone when others leave the batch, up to rounding: products over fewer rows may sum in another order.

    Raises: NotFinite when a row's best score is no number: what is drawn from such scores means nothing.
    """
    import torch

    if not prompts:
        return []
    ids_BT, mask_BT = _left_padded(tokenizer, [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts])
    sampling = _seeded_sampling(temperature, top_p, rng) if temperature > 0 else None
    with torch.inference_mode():
        new_BT = _decode(model, tokenizer, ids_BT, mask_BT, max_new_tokens=max_new_tokens, sampling=sampling)
    return tokenizer.batch_decode(new_BT, skip_special_tokens=True)


def _decode(model: Any, tokenizer: Any, ids_BT: Any, mask_BT: Any, *, max_new_tokens: int, sampling: Any) -> Any:
    """Return the new tokens of every row, filled up with the padding token behind its end. Shape: (B, T)."""
    import torch

    end = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    new_BT = torch.full((len(ids_BT), max_new_tokens), tokenizer.pad_token_id, dtype=torch.int64)
    rows_A, going_A = torch.arange(len(ids_BT)), torch.ones(len(ids_BT), dtype=torch.bool)
    cache, step_AT, mask_AT = None, ids_BT, mask_BT
    _keep(model, sampling, None)
    positions_AT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    for step in range(max_new_tokens):
        out = model(
            input_ids=step_AT,
            attention_mask=mask_AT,
            position_ids=positions_AT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        scores_AV = _finite(out.logits[:, -1].float())
        drawn_A = (scores_AV if sampling is None else sampling(None, scores_AV)).argmax(-1)
        drawn_A = drawn_A.masked_fill(~going_A, tokenizer.pad_token_id)
        new_BT[rows_A, step] = drawn_A
        going_A = going_A & (drawn_A != end)
        left = int(going_A.sum())
        if not left:
            return new_BT[:, : step + 1]
        if left <= SHRINK * len(rows_A):
            kept_A = going_A.nonzero()[:, 0]
            cache.batch_select_indices(kept_A)
            rows_A, going_A, drawn_A, mask_AT = rows_A[kept_A], going_A[kept_A], drawn_A[kept_A], mask_AT[kept_A]
            _keep(model, sampling, kept_A.tolist())
        step_AT = drawn_A[:, None]
        mask_AT = torch.cat([mask_AT, torch.ones_like(step_AT)], dim=1)
        positions_AT = mask_AT.sum(-1, keepdim=True) - 1
    return new_BT


def _keep(model: Any, sampling: Any, kept: list[int] | None) -> None:
    """Tell whoever knows rows by their number that the others have left the batch; None: that all are there again."""
    for one in (sampling, model):
        keep_rows = getattr(one, "keep_rows", None)
        if keep_rows is not None:
            keep_rows(kept)


def option_likelihood(
    model: Any, tokenizer: Any, prompts: Sequence[str], options: Sequence[Sequence[str]]
) -> list[list[Likelihood]]:
    """Return the likelihood of every option after its prompt, as one batch; each prompt is computed once.

    Every prompt must have the same number of options O. Options are tokenised apart from their prompt; an empty one
    has log-likelihood 0.

    Raises: NotFinite when a likelihood is no number.
    """
    import torch

    if not prompts:
        return []
    width = len(options[0])
    ids_BT, mask_BT = _left_padded(tokenizer, [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts])
    flat = [tokenizer(o, add_special_tokens=False)["input_ids"] for row in options for o in row]
    length = max(1, *(len(ids) for ids in flat))
    next_BT = torch.full((len(flat), length), tokenizer.pad_token_id, dtype=torch.int64)
    for row, ids in enumerate(flat):
        next_BT[row, : len(ids)] = torch.tensor(ids)
    with torch.inference_mode():
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        first = model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=True, logits_to_keep=1
        )
        cache = first.past_key_values
        cache.batch_repeat_interleave(width)
        prompt_mask = mask_BT.repeat_interleave(width, dim=0)
        steps = torch.arange(length)
        more = model(
            input_ids=next_BT,
            attention_mask=torch.cat([prompt_mask, torch.ones_like(next_BT)], dim=1),
            position_ids=prompt_mask.sum(-1, keepdim=True) + steps,
            past_key_values=cache,
            use_cache=True,
        )
        start_BV = first.logits[:, -1].float().log_softmax(-1).repeat_interleave(width, dim=0)
        likelihoods: list[Likelihood] = []
        texts = [o for row in options for o in row]
        for row, ids in enumerate(flat):
            total = float(start_BV[row, ids[0]]) if ids else 0.0
            if len(ids) > 1:
                later = more.logits[row, : len(ids) - 1].float().log_softmax(-1)
                total += float(later.gather(1, torch.tensor(ids[1:])[:, None]).sum())
            if not math.isfinite(total):
                raise NotFinite(f"log-likelihood {total} from the model: {_WAY_OUT}")
            likelihoods.append(Likelihood(log_prob=total, tokens=len(ids), bytes=len(texts[row].encode())))
    return [likelihoods[i : i + width] for i in range(0, len(likelihoods), width)]


def _left_padded(tokenizer: Any, rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    import torch

    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    filled = [list(ids) or [start] for ids in rows]
    width = max(len(ids) for ids in filled)
    ids_BT = torch.full((len(filled), width), tokenizer.pad_token_id, dtype=torch.int64)
    mask_BT = torch.zeros((len(filled), width), dtype=torch.int64)
    for row, ids in enumerate(filled):
        ids_BT[row, width - len(ids) :] = torch.tensor(ids)
        mask_BT[row, width - len(ids) :] = 1
    return ids_BT, mask_BT


def _finite(scores_AV: Any) -> Any:
    """Return the scores. Raises: NotFinite for a row without a best one."""
    best_A = scores_AV.amax(-1)  # NaN if any is NaN; -inf where all are, and single ones may be
    if not bool(best_A.isfinite().all()):
        raise NotFinite(f"best score {best_A.tolist()[:4]} from the model: {_WAY_OUT}")
    return scores_AV


def _seeded_sampling(temperature: float, top_p: float, rng: np.random.Generator | Sequence[np.random.Generator]) -> Any:
    """Return a logits processor that leaves, in each row, a random draw as the largest score."""
    import torch
    from transformers import LogitsProcessor

    one_stream = isinstance(rng, np.random.Generator)
    generators = [
        torch.Generator().manual_seed(int(one.integers(2**62))) for one in ([rng] if one_stream else list(rng))
    ]

    class SeededSampling(LogitsProcessor):
        """Call after call the same rows, less those that `keep_rows` took out. One stream goes on drawing for all."""

        begun = 0
        rows: list[int] | None = None

        def keep_rows(self, kept: list[int] | None) -> None:
            before = range(self.begun) if self.rows is None else self.rows
            self.rows = None if kept is None else [before[row] for row in kept]

        def uniforms(self, rows: int, draws: int) -> Any:
            own = list(range(rows)) if self.rows is None else self.rows
            self.begun = self.begun or rows
            if one_stream:
                return torch.rand((self.begun, draws), generator=generators[0])[own]
            assert self.rows is not None or rows == len(generators), f"{len(generators)} streams for {rows} rows"
            return torch.stack([torch.rand(draws, generator=generators[row]) for row in own])

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            scaled_BV = scores.float() / temperature
            total_B1 = scaled_BV.logsumexp(-1, keepdim=True)
            best_BK, index_BK = scaled_BV.topk(min(CANDIDATES, scaled_BV.shape[-1]), dim=-1)
            mass_BK = (best_BK - total_B1).exp()
            outside_BK = mass_BK.cumsum(-1) - mass_BK >= top_p
            uniform_BK = self.uniforms(*best_BK.shape).clamp_(min=1e-20, max=1 - 1e-7)
            noisy_BK = (best_BK - (-uniform_BK.log()).log()).masked_fill(outside_BK, -torch.inf)
            drawn_B1 = index_BK.gather(1, noisy_BK.argmax(-1, keepdim=True))
            return torch.full_like(scores, -torch.inf).scatter_(1, drawn_B1, 0.0)

    return SeededSampling()
