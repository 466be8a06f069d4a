"""What a text looks like inside a model, and how to push the model towards it: read and write the residual stream.

    representations   mean over a text's tokens, read after a prompt, of the stream after chosen decoder blocks
    steer             within it, length * unit(direction) is added to the last token's stream after chosen blocks

Blocks are numbered from 0; "after block l" is what block l + 1 reads. Both go through forward hooks that act in the
thread that placed them and pass every other thread by, so that batches of one shared model may run side by side, each
steered its own way. Hooks come and go while other threads compute: torch copies the table of hooks before it runs them,
in one step that no other thread interrupts. Hooks are gone when the block ends, however it ends.

Out of scope: which directions, and what they cost (`clients.learners.epsvec`, `strategies.synthesizers.epsvec`).

Legend of shapes: B = rows, T = padded length, D = width of the model.
Source: EPSVec (2602.21218): representation after the block, injection at the last token of every decoding step. Ours
differs: theirs is the mean over prompt, text and an opener for the next example; ours over the text's own tokens. In a
causal model the prompt's states are the same for all texts, so all that they add is one over the length of the text,
and the first token's is huge: in SmolLM2-135M, after blocks 12 to 21, 91 to 97 % of the squared difference between two
sets of headlines then lay in one coordinate, which told their lengths; over the text's own tokens it is 2 to 5 %.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_app.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from fl_app.types import Floats


def vector_name(code: str, layer: int) -> str:
    """Return the name of a class's vector after a block, as a site releases it."""
    return f"{code}/{layer}"


def count_name(code: str) -> str:
    """Return the name of a class's count, as a site releases it."""
    return f"{code}/count"


def centre_name(code: str, layer: int) -> str:
    """Return the name of a class's centre after a block, the mean over public text, as a server sends it."""
    return f"{code}/{layer}/centre"


def scale_name(layer: int) -> str:
    """Return the name of a block's scale, how far public texts lie from their centre there, as a server sends it."""
    return f"{layer}/scale"


def width(model: Any) -> int:
    """Return D, the length of a vector of the residual stream."""
    return int(_core(model).get_input_embeddings().weight.shape[1])


def check_layers(model: Any, layers: Sequence[int]) -> None:
    """Return when every layer is a decoder block of the model, each named once.

    Raises: ConfigInvalid naming the layers and the range.
    """
    count = len(_blocks(model))
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
        raise ConfigInvalid(f"layers {list(layers)}: name one or more of 0 to {count - 1}, each once")


def representations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    layers: Sequence[int],
    max_text_tokens: int,
    batch_rows: int,
) -> dict[int, Floats]:
    """Return, by layer, the mean over a text's tokens of the residual stream after that block, read after its prompt.

    A text is cut at `max_text_tokens`, a prompt never. Prompt and text are tokenised apart; an empty prompt becomes
    the token that texts begin with. An empty text is the mean over its prompt's tokens.

    Shapes: (len(texts), D) each, float32, also where the model is bfloat16.
    Guarantee: with `batch_rows` 1 a row is a function of its own prompt and text and of nothing else; in a batch the
    others may move it by rounding, so that private rows are read one at a time.
    Raises: ConfigInvalid for a layer that is not there.
    """
    import torch

    check_layers(model, layers)
    begins = [_ids(tokenizer, prompt) or [_start(tokenizer)] for prompt in prompts]
    encoded = [begin + _ids(tokenizer, text)[:max_text_tokens] for begin, text in zip(begins, texts, strict=True)]
    found = {layer: np.zeros((len(encoded), width(model)), np.float32) for layer in layers}
    order = sorted(range(len(encoded)), key=lambda row: (len(encoded[row]), row))
    decoder = _core(model).get_decoder()
    for start in range(0, len(order), batch_rows):
        rows = order[start : start + batch_rows]
        ids_BT, mask_BT = _right_padded(tokenizer, [encoded[row] for row in rows])
        seen: dict[int, Any] = {}
        # What the hook calls returns nothing: looking changes nothing.
        with torch.inference_mode(), _after_blocks(model, layers, seen.__setitem__):
            decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        weights_BT1 = mask_BT[..., None].float()
        for place, row in enumerate(rows):
            if len(encoded[row]) > len(begins[row]):
                weights_BT1[place, : len(begins[row])] = 0
        for layer, hidden_BTD in seen.items():
            total_BD = torch.where(weights_BT1 > 0, hidden_BTD.float(), 0.0).sum(dim=1)
            found[layer][rows] = (total_BD / weights_BT1.sum(dim=1)).numpy()
    return found


@contextmanager
def steer(model: Any, directions: Mapping[int, Floats], lengths: Mapping[int, float]) -> Generator[None]:
    """Within it, this thread's passes of `model` are pushed: lengths[l] * unit(directions[l]) after block l.

    What is pushed is the last position of a pass, that is the newest token of every decoding step under left padding.
    With a cache former tokens stay as they were pushed; without one they are computed again and not pushed.

    Shapes: directions (B, D), a row for each of the batch, or (1, D) for all of them. A row of zeros pushes nothing.
    Guarantee: length 0 leaves every logit as it was, bit for bit; other threads' passes are never touched.
    Raises: ConfigInvalid for a layer that is not there, and within it for a batch of another size.
    """
    import torch

    check_layers(model, list(directions))
    dtype = _core(model).get_input_embeddings().weight.dtype
    pushes = {
        layer: torch.from_numpy(np.float32(lengths[layer]) * unit(direction)).to(dtype)
        for layer, direction in directions.items()
    }

    def push(layer: int, hidden_BTD: Any) -> Any:
        push_BD = pushes[layer]
        if push_BD.shape[0] not in {1, hidden_BTD.shape[0]}:
            raise ConfigInvalid(f"{push_BD.shape[0]} directions for a batch of {hidden_BTD.shape[0]} rows")
        pushed_BTD = hidden_BTD.clone()
        pushed_BTD[:, -1] += push_BD
        return pushed_BTD

    with _after_blocks(model, list(directions), push):
        yield


def unit(directions: Floats) -> Floats:
    """Return each row at length 1, and a row of zeros as it is. Shapes: (..., D) float32, as given."""
    wide = np.asarray(directions, np.float64)
    wide = wide / np.maximum(np.abs(wide).max(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    norms = np.linalg.norm(wide, axis=-1, keepdims=True)
    return (wide / np.where(norms > 0, norms, 1.0)).astype(np.float32)


@contextmanager
def _after_blocks(model: Any, layers: Sequence[int], act: Callable[[int, Any], Any]) -> Generator[None]:
    """Within it, `act(layer, states)` is called after each of the blocks; what it returns, if anything, replaces them.

    Only passes of the thread that entered are seen.
    """
    owner = threading.get_ident()

    def hook_of(layer: int) -> Callable[[Any, Any, Any], Any]:
        def hook(_block: Any, _inputs: Any, output: Any) -> Any:
            if threading.get_ident() != owner:
                return None
            states, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            changed = act(layer, states)
            return changed if changed is None or rest is None else (changed, *rest)

        return hook

    blocks = _blocks(model)
    handles: list[Any] = []
    try:
        for layer in layers:
            handles.append(blocks[layer].register_forward_hook(hook_of(layer)))  # noqa: PERF401 - each is to be removed
        yield
    finally:
        for handle in handles:
            handle.remove()


def _core(model: Any) -> Any:
    """Return the causal language model, without PEFT's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _blocks(model: Any) -> Any:
    decoder = _core(model).get_decoder()
    found = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if found is None:
        raise ConfigInvalid(f"{type(decoder).__name__} keeps its blocks neither in `layers` nor in `h`; not known here")
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start(tokenizer: Any) -> int:
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def _right_padded(tokenizer: Any, rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Return ids and mask. Right, so that a causal model's positions need no telling. Shapes: (B, T) int64."""
    import torch

    longest = max(len(ids) for ids in rows)
    ids_BT = torch.full((len(rows), longest), tokenizer.pad_token_id, dtype=torch.int64)
    mask_BT = torch.zeros((len(rows), longest), dtype=torch.int64)
    for row, ids in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
    return ids_BT, mask_BT
