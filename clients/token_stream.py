"""Next-token scores of many prompts, a token at a time, in which no row sees another.

A clip bounds what one row of scores adds to a sum; it does not bound what a row does to the *rounding* of others. So
prompts are read one by one into the attention cache, without padding, then padded on the left to a width that is a
public constant, and decoded in batches of one height: a multiple of `HEIGHT_STEP` where the machine computes a row to
the same bits in any company (`rows_keep_apart`), one row each where it does not. The product that narrows to a LoRA's
rank is made row by row (`fl_app.lora_linear`).

Out of scope: whose rows these are and what becomes of the scores (`clients.decoding`). The time that a prompt takes is
not hidden.

Legend of shapes: R = rows, V = vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fl_app import kernels, lora_linear, sequences
from fl_app.errors import PolicyRefusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    Singles = npt.NDArray[np.float32]


class Stream:
    """Next-token scores of many prompts, each belonging to a bucket, all rows of which get the same tokens appended.

    Batches are of `together` rows of whatever buckets; no prompt is longer than `width`.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], owners: Sequence[int], *, width: int, together: int
    ) -> None:
        self._parts = [
            _Part(model, prompts[n : n + together], owners[n : n + together], width=width, height=_height(together))
            for n in range(0, len(prompts), together)
        ]

    def restart(self) -> None:
        """Forget what was appended: the next scores follow the prompts."""
        for part in self._parts:
            part.restart()

    def scores(self, active: set[int]) -> Iterator[tuple[int, Singles]]:
        """Yield (bucket, scores of some of its rows (R, V) float32) for every active bucket that has rows."""
        for part in self._parts:
            if not active.isdisjoint(part.owners):
                scores_RV = part.forward()
                for bucket, rows in part.runs:
                    if bucket in active:
                        yield bucket, scores_RV[rows]

    def append(self, tokens: dict[int, int]) -> None:
        """Append a token to all rows of each bucket named; a bucket left out is finished until the next restart."""
        for part in self._parts:
            part.append(tokens)


def rows_keep_apart(model: Any, batch_rows: int) -> bool:
    """Whether a row's scores are the same to the bit, whatever rows are decoded beside it.

    The products are tried at every height (`fl_app.kernels`), then the model as a whole: rows of a few lengths, in two
    orders and two heights. A property of machine and model.
    """
    if not kernels.keep_rows_apart(model, _height(batch_rows)):
        return False
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocabulary, length).tolist() for length in (9, 3, 7, 9, 5)]
    company = [rng.integers(0, vocabulary, 9).tolist() for _ in range(_height(batch_rows) - len(prompts))]
    for _ in range(kernels.draws(len(prompts) * vocabulary, model.get_input_embeddings().weight.dtype)):
        few = _Part(model, prompts, range(len(prompts)), width=12, height=kernels.HEIGHT_STEP)
        crowd = [*company, *prompts[::-1]]
        many = _Part(model, crowd, range(len(crowd)), width=12, height=len(crowd))
        for _ in range(2):
            if not np.array_equal(few.forward()[: len(prompts)], many.forward()[len(company) :][::-1]):
                return False
            token = int(rng.integers(vocabulary))
            for part in (few, many):
                part.append(dict.fromkeys(part.owners, token))
    return True


def _height(rows: int) -> int:
    """Return the height of every batch of up to `rows` rows."""
    return 1 if rows == 1 else -(-rows // kernels.HEIGHT_STEP) * kernels.HEIGHT_STEP


class _Part:
    """Some rows of a stream that go through the model together."""

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], owners: Sequence[int], *, width: int, height: int
    ) -> None:
        import torch

        self.owners = tuple(owners)
        self.runs = [
            (bucket, [row for row, owner in enumerate(self.owners) if owner == bucket])
            for bucket in dict.fromkeys(self.owners)
        ]
        self._model, self._rows = model, len(prompts)
        filled = [*prompts, *[prompts[0]] * (height - len(prompts))]
        self._width = width - 1
        self._lengths = torch.tensor([len(prompt) - 1 for prompt in filled])
        self._last = torch.tensor([prompt[-1] for prompt in filled])
        self._prompt_layers = _read_one_by_one(model, prompts, width=width - 1, height=height)
        self.restart()

    def restart(self) -> None:
        import torch

        self._cache: Any = None
        self._next = self._last.clone()
        self._appended = 0
        places = torch.arange(self._width)
        self._mask = (places >= self._width - self._lengths[:, None]).long()

    def forward(self) -> Singles:
        """Return the scores of the next token. Shapes: (R, V) float32."""
        import torch
        from transformers import DynamicCache

        if self._cache is None:
            self._cache = DynamicCache(self._prompt_layers)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        with torch.inference_mode(), lora_linear.fused(self._model, _no_slopes):
            out = self._model(
                input_ids=self._next[:, None],
                attention_mask=self._mask,
                position_ids=(self._lengths + self._appended)[:, None],
                past_key_values=self._cache,
                use_cache=True,
            )
        self._appended += 1
        return out.logits[: self._rows, -1].float().numpy()

    def append(self, tokens: dict[int, int]) -> None:
        for bucket, rows in self.runs:
            if bucket in tokens:
                self._next[rows] = tokens[bucket]


def _read_one_by_one(model: Any, prompts: Sequence[Sequence[int]], *, width: int, height: int) -> list[tuple[Any, Any]]:
    """Return keys and values of every layer for all prompts but their last tokens, padded on the left with zeros.

    Shapes: each (height, heads, width, d); rows beyond the prompts are zeros. Raises: PolicyRefusal for a model whose
    cache is not made of one key and one value per token.
    """
    import torch

    decoder = sequences.core_of(model).get_decoder()
    found: list[tuple[Any, Any]] = []
    with torch.inference_mode(), lora_linear.fused(model, _no_slopes):
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt[:-1]])
            cache = decoder(input_ids=ids, use_cache=True).past_key_values  # no scores: for one row they cost a third
            for number, layer in enumerate(cache.layers):
                keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
                if keys is None or values is None or keys.shape[-2] != ids.shape[1]:
                    raise PolicyRefusal("this model keeps no key and value of every token; it cannot decode privately")
                if number == len(found):
                    shapes = [(height, one.shape[1], width, one.shape[3]) for one in (keys, values)]
                    found.append((keys.new_zeros(shapes[0]), values.new_zeros(shapes[1])))
                found[number][0][row, :, width - ids.shape[1] :] = keys[0]
                found[number][1][row, :, width - ids.shape[1] :] = values[0]
    return found


def _no_slopes(*_: Any) -> None:
    raise AssertionError("decoding has no backward pass")
