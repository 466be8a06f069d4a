"""A row goes on in the student's own words: on-policy text for a private step.

A row's text is cut, and the student continues what is left, as long as the row was. The continuation is a function of
the row, the student and public values alone: its random numbers are derived from a public seed and the row, so that no
other row shifts them; it is decoded at a width that depends on the row's own prompt, among a fixed number of rows of
whom it is verified that they do not move each other's logits by a bit, or by itself where they do.

Drawing adds no privacy and needs none: a continuation never leaves the site, and whatever it says of its row goes
through that row's clipped gradient.

Legend of shapes: H = rows of a batch, W = padded prompt, V = vocabulary.
Source: on-policy samples as in generalised knowledge distillation (Agarwal et al. 2023, 2306.13649), at temperature 1.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_app.kernels import HEIGHT_STEP, draws
from fl_app.sequences import WIDTH_STEP, TokenSequence, core_of

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBED = 3
"""Tokens decoded for the question whether rows keep apart: one from the prompt, two through the cache."""


def stream_of(seed: bytes, example: TokenSequence) -> np.random.Generator:
    """Return a row's own random numbers: a function of a public seed and the row."""
    digest = hashlib.sha256(seed + np.array(example.ids, np.int64).tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def continued(
    model: Any, examples: Sequence[TokenSequence], *, prompt_share: float, seed: bytes, end_id: int
) -> list[TokenSequence]:
    """Return every example with the rest of its text in the model's own words, in order; the rest carries the loss.

    The first `prompt_share` of the text's tokens stay, at least one goes; the end token ends a continuation early. An
    example without text stays as it is.
    """
    found = list(examples)
    cuts = [_cut(example, prompt_share) for example in examples]
    by_width: dict[int, list[int]] = {}
    for index, (example, cut) in enumerate(zip(examples, cuts, strict=True)):
        if cut < len(example.ids):
            by_width.setdefault(-(-cut // WIDTH_STEP) * WIDTH_STEP, []).append(index)
    height = HEIGHT_STEP if _rows_keep_apart(model) else 1
    for width, members in by_width.items():
        for first in range(0, len(members), height):
            chosen = members[first : first + height]
            prompts = [examples[n].ids[: cuts[n]] for n in chosen]
            lengths = [len(examples[n].ids) - cuts[n] for n in chosen]
            streams = [stream_of(seed, examples[n]) for n in chosen]
            written = _write(model, prompts, lengths, streams, width=width, height=height, end_id=end_id)
            for n, prompt, text in zip(chosen, prompts, written, strict=True):
                found[n] = TokenSequence(ids=(*prompt, *text), loss_from=len(prompt))
    return found


def _cut(example: TokenSequence, prompt_share: float) -> int:
    """Return how many tokens of an example stay."""
    text = len(example.ids) - example.loss_from
    return example.loss_from + max(0, min(int(prompt_share * text), text - 1))


def _write(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    lengths: Sequence[int],
    streams: Sequence[np.random.Generator],
    *,
    width: int,
    height: int,
    end_id: int,
) -> list[list[int]]:
    """Return a continuation of each prompt, of at most its own length."""
    written: list[list[int]] = [[] for _ in prompts]
    steps = _Decoder(model, prompts, width=width, height=height)
    for _ in range(max(lengths)):
        logits_HV = steps.logits()
        tokens = [end_id] * height
        for row, (text, length, stream) in enumerate(zip(written, lengths, streams, strict=True)):
            if len(text) < length and end_id not in text:
                tokens[row] = _drawn(logits_HV[row], stream)
                text.append(tokens[row])
        steps.say(tokens)
    return written


def _drawn(logits_V: Any, stream: np.random.Generator) -> int:
    """Return one draw from softmax(logits), by inverting its distribution function in float64."""
    mass_V = np.cumsum(logits_V.double().softmax(0).numpy())
    return min(int(np.searchsorted(mass_V, stream.random() * mass_V[-1], side="right")), len(mass_V) - 1)


class _Decoder:
    """A batch of left-padded prompts that grows by a token a row; rows without a prompt repeat the first."""

    def __init__(self, model: Any, prompts: Sequence[tuple[int, ...]], *, width: int, height: int) -> None:
        import torch

        self._model = model
        self._ids_HT = torch.zeros((height, width), dtype=torch.int64)
        self._mask_HT = torch.zeros((height, width), dtype=torch.int64)
        for row in range(height):
            prompt = prompts[row if row < len(prompts) else 0]
            self._ids_HT[row, width - len(prompt) :] = torch.tensor(prompt)
            self._mask_HT[row, width - len(prompt) :] = 1
        self._positions_HT = (self._mask_HT.cumsum(-1) - 1).clamp(min=0)
        self._cache: Any = None

    def logits(self) -> Any:
        """Return the logits of every row's next token. Shape: (H, V) float32."""
        import torch

        with torch.inference_mode():
            out = self._model(
                input_ids=self._ids_HT,
                attention_mask=self._mask_HT,
                position_ids=self._positions_HT,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = out.past_key_values
        return out.logits[:, -1].float()

    def say(self, tokens: Sequence[int]) -> None:
        """Let every row go on by one token."""
        import torch

        self._ids_HT = torch.tensor(tokens)[:, None]
        self._mask_HT = torch.cat([self._mask_HT, torch.ones_like(self._ids_HT)], dim=1)
        self._positions_HT = self._positions_HT[:, -1:] + 1


def _rows_keep_apart(model: Any) -> bool:
    """Whether a row's logits have the same bits whoever else is decoded; asked once per process, model and machine."""
    import torch

    core = core_of(model)
    adapted = str(sorted(name for name, _ in model.named_parameters() if "lora_" in name))
    dtype = model.get_input_embeddings().weight.dtype
    place = (core.config.to_json_string(), adapted, str(dtype), torch.get_num_threads())
    verdicts = _verdicts()
    if place not in verdicts:
        verdicts[place] = _probe(model, core.config.get_text_config().vocab_size, dtype)
    return verdicts[place]


@functools.cache
def _verdicts() -> dict[tuple[str | int, ...], bool]:
    """Return what was found out in this process: a property of machine and model, in which no row has a part."""
    return {}


def _probe(model: Any, words: int, dtype: Any) -> bool:
    """Whether a row of either of two widths decodes to the same bits alone, at another place, and in company."""
    import torch

    rng = np.random.default_rng(0)
    widths, places = (WIDTH_STEP, 2 * WIDTH_STEP), (0, 5, 15)
    for _ in range(draws(len(widths) * len(places) * PROBED * words, dtype)):
        for width in widths:
            rows = [tuple(rng.integers(0, words, width - n % 7).tolist()) for n in range(HEIGHT_STEP)]
            tokens = rng.integers(0, words, (PROBED, HEIGHT_STEP))
            company = _Decoder(model, rows, width=width, height=HEIGHT_STEP)
            alone = {place: _Decoder(model, [rows[place]], width=width, height=HEIGHT_STEP) for place in places}
            for step in range(PROBED):
                together_HV = company.logits()
                for place, one in alone.items():
                    if not torch.equal(one.logits()[0], together_HV[place]):
                        return False
                    one.say([int(tokens[step, place])] * HEIGHT_STEP)
                company.say(tokens[step].tolist())
    return True
