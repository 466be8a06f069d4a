"""Steering adds what it says, where it says, to whom it says; and looking changes nothing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_app import inference, lora, steering
from fl_app.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

PROMPTS = ["A cough:", "A rather long letter about a rash:\n", "", "A knee:"]
TEXTS = ["dry since Monday", "it itches", "fever", ""]
LAYERS = (0, 1)


@pytest.fixture(params=["bare", "peft"])
def model(request: pytest.FixtureRequest, frozen: FrozenModel, learned: Callable[[int], Adapter]) -> Any:
    return frozen.replica().model if request.param == "bare" else lora.attach(frozen, learned(7))


def core(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def looks(model: Any, frozen: FrozenModel, rows: int | None = None, **changes: Any) -> dict[int, np.ndarray]:
    settings = {"layers": LAYERS, "max_text_tokens": 24, "batch_rows": 4, **changes}
    return steering.representations(model, frozen.tokenizer, PROMPTS[:rows], TEXTS[:rows], **settings)


def directions(rows: int, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {layer: rng.normal(0, 3, (rows, 64)).astype(np.float32) for layer in LAYERS}


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def batch(frozen: FrozenModel) -> dict[str, Any]:
    ids, mask = inference._left_padded(frozen.tokenizer, [frozen.tokenizer(p)["input_ids"] for p in PROMPTS])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@contextmanager
def recorded(model: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Record what block 0 computes, before anybody changes it, and what block 1 then reads, pass by pass."""
    made: list[Any] = []
    read: list[Any] = []
    first, second = core(model).model.layers
    handles = [
        first.register_forward_hook(lambda _m, _i, out: made.append(out.clone())),
        second.register_forward_pre_hook(lambda _m, args: read.append(args[0].clone())),
    ]
    try:
        yield made, read
    finally:
        for handle in handles:
            handle.remove()


def bits(tensor: Any) -> bytes:
    return tensor.numpy().tobytes()


# --- looking


def test_a_representation_is_the_mean_of_the_stream_after_the_block(model: Any, frozen: FrozenModel) -> None:
    """The oracle: transformers' own hidden states of each text alone, without padding or batch.

    The text's tokens count and the prompt's do not; of the empty text the prompt's do.
    """
    import torch

    found = looks(model, frozen)
    for row, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True)):
        begin = frozen.tokenizer(prompt)["input_ids"] or [frozen.tokenizer.bos_token_id]
        ids = begin + frozen.tokenizer(text)["input_ids"]
        counts = slice(len(begin) if text else 0, None)
        with torch.inference_mode():
            states = core(model).model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        assert found[0][row] == pytest.approx(states[1][0, counts].mean(0).numpy(), abs=1e-5)
        assert found[0][row] != pytest.approx(states[0][0, counts].mean(0).numpy(), abs=1e-2)  # not before it
        if text:
            assert found[0][row] != pytest.approx(states[1][0].mean(0).numpy(), abs=1e-2)
    assert {one.dtype for one in found.values()} == {np.dtype(np.float32)}
    assert found[1].shape == (len(TEXTS), 64)


def test_the_last_block_is_read_before_the_final_norm(model: Any, frozen: FrozenModel) -> None:
    """Of one token the mean is the state itself, and the norm of it is what the decoder gives."""
    import torch

    token = [frozen.tokenizer.bos_token_id, *frozen.tokenizer("a")["input_ids"]]
    looked = steering.representations(
        model, frozen.tokenizer, [""], ["a"], layers=[1], max_text_tokens=4, batch_rows=1
    )[1]
    with torch.inference_mode():
        final = core(model).model(input_ids=torch.tensor([token]))[0][0, 1].numpy()
        normed = core(model).model.norm(torch.from_numpy(looked))[0].numpy()
    assert normed == pytest.approx(final, abs=1e-5)
    assert looked[0] != pytest.approx(final, abs=1e-2)


def test_rows_read_one_at_a_time_are_nobody_elses_business(frozen: FrozenModel) -> None:
    together, fewer = (looks(frozen.model, frozen, rows, batch_rows=1) for rows in (4, 2))
    batched = looks(frozen.model, frozen)
    for layer in LAYERS:
        assert together[layer][:2].tobytes() == fewer[layer].tobytes()
        assert batched[layer] == pytest.approx(together[layer], abs=1e-5)


def test_a_text_is_cut_and_a_prompt_is_not(frozen: FrozenModel) -> None:
    def of(prompt: str, text: str, limit: int) -> bytes:
        found = steering.representations(
            frozen.model, frozen.tokenizer, [prompt], [text], layers=[0], max_text_tokens=limit, batch_rows=1
        )
        return found[0].tobytes()

    assert of("A cough:", "dry for days", 3) == of("A cough:", "dry", 50)
    assert of("A cough:", "dry for days", 4) != of("A cough:", "dry", 50)
    assert of("", "", 3) != of("", "a", 3)  # nothing at all still has a beginning


def test_a_narrow_model_gives_wide_means(frozen: FrozenModel) -> None:
    import torch

    narrow = looks(frozen.replica(own_weights=True).model.to(torch.bfloat16), frozen)
    wide = looks(frozen.model, frozen)
    for layer in LAYERS:
        assert narrow[layer].dtype == np.float32
        assert np.linalg.norm(narrow[layer] - wide[layer]) < 0.03 * np.linalg.norm(wide[layer])


def test_looking_leaves_no_hook_and_changes_no_logit(model: Any, frozen: FrozenModel) -> None:
    import torch

    before = hooks(model)
    with torch.inference_mode():
        first = model(**batch(frozen)).logits
        looks(model, frozen)
        assert bits(model(**batch(frozen)).logits) == bits(first)
    assert hooks(model) == before


# --- pushing


@pytest.mark.parametrize("layer", LAYERS)
def test_the_last_token_moves_by_length_times_unit_and_nothing_else_does(
    model: Any, frozen: FrozenModel, layer: int
) -> None:
    import torch

    chosen = {layer: directions(len(PROMPTS))[layer]}
    expected = 2.5 * chosen[layer] / np.linalg.norm(chosen[layer], axis=1, keepdims=True)
    with torch.inference_mode(), recorded(model) as (made, read), steering.steer(model, chosen, {layer: 2.5}):
        hidden = core(model).model(**batch(frozen), output_hidden_states=False)[0]
    with torch.inference_mode():
        plain = core(model).model(**batch(frozen))[0]
    there = batch(frozen)["attention_mask"][:, :-1] > 0  # padding attends to anything, and nobody to it
    assert bits(hidden[:, :-1][there]) == bits(plain[:, :-1][there])  # former tokens never
    assert bits(hidden[:, -1]) != bits(plain[:, -1])
    assert bits(read[0][:, :-1]) == bits(made[0][:, :-1])
    moved = read[0][:, -1].numpy() - made[0][:, -1].numpy()
    assert moved == pytest.approx(expected if layer == 0 else np.zeros_like(expected), abs=1e-6)  # the other one not
    if layer == 0:
        assert bits(read[0][:, -1]) == bits(made[0][:, -1] + torch.from_numpy(2.5 * steering.unit(chosen[0])))


@pytest.mark.parametrize("use_cache", [True, False])
def test_every_decoding_step_is_pushed(model: Any, frozen: FrozenModel, *, use_cache: bool) -> None:
    import torch

    chosen = directions(len(PROMPTS))
    inputs = {key: value for key, value in batch(frozen).items() if key != "position_ids"}
    with recorded(model) as (made, read), steering.steer(model, chosen, {0: 4.0, 1: 4.0}), torch.inference_mode():
        model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=use_cache)
    assert len(made) == len(read) == 5
    widths = [one.shape[1] for one in read]
    start = inputs["input_ids"].shape[1]
    assert widths == ([start, 1, 1, 1, 1] if use_cache else [start + n for n in range(5)])
    for before, after in zip(made, read, strict=True):
        assert bits(after[:, :-1]) == bits(before[:, :-1])
        assert bits(after[:, -1]) == bits(before[:, -1] + torch.from_numpy(4.0 * steering.unit(chosen[0])))


@pytest.mark.parametrize("use_cache", [True, False])
def test_length_zero_leaves_every_logit_bit_for_bit(model: Any, frozen: FrozenModel, *, use_cache: bool) -> None:
    import torch

    def logits(length: float) -> list[bytes]:
        inputs = {key: value for key, value in batch(frozen).items() if key != "position_ids"}
        asked = {"do_sample": False, "use_cache": use_cache, "output_logits": True, "return_dict_in_generate": True}
        with steering.steer(model, directions(len(PROMPTS)), dict.fromkeys(LAYERS, length)), torch.inference_mode():
            return [bits(one) for one in model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **asked).logits]

    def plain() -> list[bytes]:
        inputs = {key: value for key, value in batch(frozen).items() if key != "position_ids"}
        asked = {"do_sample": False, "use_cache": use_cache, "output_logits": True, "return_dict_in_generate": True}
        with torch.inference_mode():
            return [bits(one) for one in model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **asked).logits]

    assert logits(0.0) == plain()
    assert logits(1e-2) != plain()  # the twin: a hundredth would be seen


def test_each_row_is_pushed_its_own_way(frozen: FrozenModel) -> None:
    """Each row of a batch says what it says alone; a row of zeros what the bare model says; (1, D) goes for all."""
    import torch

    inputs, ways = batch(frozen), directions(len(PROMPTS))
    for layer in LAYERS:
        ways[layer][1] = 0
    lengths = dict.fromkeys(LAYERS, 3.0)

    def logits(rows: list[int], chosen: dict[int, np.ndarray]) -> Any:
        with torch.inference_mode(), steering.steer(frozen.model, chosen, lengths):
            return frozen.model(**{key: value[rows] for key, value in inputs.items()}).logits[:, -1]

    with torch.inference_mode():
        bare = frozen.model(**inputs).logits[:, -1]
    together = logits([0, 1, 2, 3], ways)
    for row in range(4):
        alone = logits([row], {layer: ways[layer][[row]] for layer in LAYERS})
        assert together[row].numpy() == pytest.approx(alone[0].numpy(), abs=1e-4)
    assert bits(together[1]) == bits(bare[1])
    assert all(float((together[row] - bare[row]).abs().max()) > 0.5 for row in (0, 2, 3))
    one_way = logits([0, 1, 2, 3], {layer: ways[layer][:1] for layer in LAYERS})
    assert one_way[0].numpy() == pytest.approx(together[0].numpy(), abs=1e-4)
    assert float((one_way[1] - bare[1]).abs().max()) > 0.5


def test_threads_are_steered_apart_on_one_model(frozen: FrozenModel) -> None:
    """Three threads at once, two of them pushed opposite ways and one not at all, round after round."""
    import torch

    inputs, ways = batch(frozen), directions(len(PROMPTS))
    lengths = dict.fromkeys(LAYERS, 5.0)
    gate = threading.Barrier(3)

    def passes(sign: float, *, alone: bool = False) -> set[bytes]:
        found: set[bytes] = set()
        for _ in range(1 if alone else 25):
            if not alone:
                gate.wait(timeout=60)
            with torch.inference_mode():
                if sign:
                    with steering.steer(frozen.model, {layer: sign * way for layer, way in ways.items()}, lengths):
                        found |= {bits(frozen.model(**inputs).logits) for _ in range(1 if alone else 3)}
                else:
                    found |= {bits(frozen.model(**inputs).logits) for _ in range(1 if alone else 3)}
        return found

    expected = [passes(sign, alone=True) for sign in (1.0, -1.0, 0.0)]
    before = hooks(frozen.model)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(passes, (1.0, -1.0, 0.0)))
    assert found == expected
    assert len(set.union(*expected)) == 3
    assert hooks(frozen.model) == before


def test_hooks_go_when_something_breaks(model: Any, frozen: FrozenModel) -> None:
    before = hooks(model)

    def broken() -> None:
        with steering.steer(model, directions(4), dict.fromkeys(LAYERS, 1.0)):
            assert hooks(model) == before + 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert hooks(model) == before
    with (
        pytest.raises(ConfigInvalid, match="3 directions for a batch of 4 rows"),
        steering.steer(model, directions(3), dict.fromkeys(LAYERS, 1.0)),
    ):
        model(**batch(frozen))
    assert hooks(model) == before


@pytest.mark.parametrize("layers", [(2,), (-1,), (), (0, 0)])
def test_layers_that_are_not_there_are_refused(frozen: FrozenModel, layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigInvalid, match=r"layers \[.*\]: name one or more of 0 to 1, each once"):
        looks(frozen.model, frozen, layers=layers)
    if len(set(layers)) == len(layers):
        chosen = {layer: np.ones((1, 64), np.float32) for layer in layers}
        with pytest.raises(ConfigInvalid), steering.steer(frozen.model, chosen, dict.fromkeys(layers, 1.0)):
            pytest.fail("entered")


def test_the_width_is_that_of_the_stream(model: Any) -> None:
    assert steering.width(model) == 64


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=False), min_size=1, max_size=6))
def test_a_unit_has_length_one_unless_it_is_nothing(values: list[float]) -> None:
    given_vector = np.array(values, np.float32)
    found = steering.unit(given_vector)
    assert found.dtype == np.float32
    if not given_vector.any():
        assert not found.any()
    else:
        assert np.linalg.norm(found.astype(np.float64)) == pytest.approx(1, abs=1e-6)
        big = int(np.abs(given_vector).argmax())
        assert np.sign(found[big]) == np.sign(given_vector[big])
