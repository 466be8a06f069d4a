"""Text and likelihoods from a model in memory; randomness is an argument.

Decoding is transformers' `generate`. Its sampling draws from torch's global generator, so we let it decode greedily
over scores to which `SeededSampling` has added Gumbel noise of a given stream: argmax(score / T + Gumbel) is an exact
draw from softmax(score / T) (Gumbel-max trick, Maddison et al. 2014), and the same stream gives the same text.

Legend of shapes: B = rows, T = padded length, V = vocabulary, O = options per prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_app.errors import NotFinite

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CANDIDATES = 512
"""Sampling looks at this many most likely tokens. A full sort of 49k scores costs a third of a decoding step on a CPU;
under top_p <= .95 the tail beyond 512 tokens is cut anyway (assumption, not studied)."""

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

    Raises: NotFinite when a row's best score is no number: what is drawn from such scores means nothing.
    """
    import torch
    from transformers import LogitsProcessorList

    if not prompts:
        return []
    processors = LogitsProcessorList([_finite_scores()])
    if temperature > 0:
        processors.append(_seeded_sampling(temperature, top_p, rng))
    ids_BT, mask_BT = _left_padded(tokenizer, [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts])
    with torch.inference_mode():
        out_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=processors,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(out_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)


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


def _finite_scores() -> Any:
    """Return a logits processor that changes nothing and refuses rows without a best score."""
    from transformers import LogitsProcessor

    class FiniteScores(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            best_B = scores.amax(-1)  # NaN if any is NaN; -inf where all are, and single ones may be
            if not bool(best_B.isfinite().all()):
                raise NotFinite(f"best score {best_B.tolist()[:4]} from the model: {_WAY_OUT}")
            return scores

    return FiniteScores()


def _uniforms(rng: np.random.Generator | Sequence[np.random.Generator]) -> Callable[[int, int], Any]:
    """Return a function: rows, draws -> uniform numbers (rows, draws), from one stream or from one per row."""
    import torch

    streams = [rng] if isinstance(rng, np.random.Generator) else rng
    generators = [torch.Generator().manual_seed(int(one.integers(2**62))) for one in streams]
    if isinstance(rng, np.random.Generator):
        return lambda rows, draws: torch.rand((rows, draws), generator=generators[0])

    def own(rows: int, draws: int) -> Any:
        assert rows == len(generators), f"{len(generators)} streams for {rows} rows"
        return torch.stack([torch.rand(draws, generator=one) for one in generators])

    return own


def _seeded_sampling(temperature: float, top_p: float, rng: np.random.Generator | Sequence[np.random.Generator]) -> Any:
    """Return a logits processor that leaves, in each row, a random draw as the largest score."""
    import torch
    from transformers import LogitsProcessor

    uniforms = _uniforms(rng)

    class SeededSampling(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            scaled_BV = scores.float() / temperature
            total_B1 = scaled_BV.logsumexp(-1, keepdim=True)
            best_BK, index_BK = scaled_BV.topk(min(CANDIDATES, scaled_BV.shape[-1]), dim=-1)
            mass_BK = (best_BK - total_B1).exp()
            outside_BK = mass_BK.cumsum(-1) - mass_BK >= top_p
            uniform_BK = uniforms(*best_BK.shape).clamp_(min=1e-20, max=1 - 1e-7)
            noisy_BK = (best_BK - (-uniform_BK.log()).log()).masked_fill(outside_BK, -torch.inf)
            drawn_B1 = index_BK.gather(1, noisy_BK.argmax(-1, keepdim=True))
            return torch.full_like(scores, -torch.inf).scatter_(1, drawn_B1, 0.0)

    return SeededSampling()
