"""Seeded sampling is a draw from softmax, and likelihoods are what a plain forward pass says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import stats

from fl_app import inference, lora
from fl_app.seeds import stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

LOGITS = [2.0, 1.0, 0.5, 0.0, -0.5, -3.0]
DRAWS = 20_000
PROMPTS = ["A cough:", "Tell me of the rash on my arm, please", ""]
OPTIONS = [["yes", "no way", "x"], ["I do not know", "a", "bb"], ["yes", "Ünïcode", "."]]


@pytest.fixture(scope="module")
def model(frozen: FrozenModel, learned: Callable[[int], Adapter]) -> Any:
    return lora.attach(frozen, learned(7))


def softmax(temperature: float) -> np.ndarray:
    weights = np.exp(np.array(LOGITS) / temperature)
    return weights / weights.sum()


def counts(temperature: float, top_p: float, seed: int = 0) -> np.ndarray:
    """Return how often each of six tokens is drawn, over rows and calls of one processor."""
    import torch

    processor = inference._seeded_sampling(temperature, top_p, stream(seed, "draws"))
    scores = torch.tensor([LOGITS] * (DRAWS // 10))
    drawn = torch.cat([processor(None, scores).argmax(-1) for _ in range(10)])
    return np.bincount(drawn.numpy(), minlength=len(LOGITS))


def text(
    model: Any, frozen: FrozenModel, seed: int, prompts: list[str] = PROMPTS, temperature: float = 1.0
) -> list[str]:
    return inference.generate(
        model,
        frozen.tokenizer,
        prompts,
        max_new_tokens=8,
        temperature=temperature,
        top_p=0.95,
        rng=stream(seed, "text"),
    )


# --- the loop


class Ending:
    """The tokenizer, with another end token, and with tokens handed out as they are."""

    def __init__(self, inner: Any, end: int) -> None:
        self.inner, self.eos_token_id = inner, end

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self.inner(*args, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def batch_decode(self, ids_BT: Any, **_: Any) -> list[list[int]]:
        return ids_BT.tolist()


LONG = ["A cough:", "Tell me of the rash on my arm, please", "", "Sage?", "And then", "Hm", "No", "Why willow bark?"]


def ids(model: Any, tokenizer: Any, rng: Any = None, *, prompts: list[str] = LONG) -> Any:
    """Tokens of a batch; greedy without a stream."""
    temperature = 0.0 if rng is None else 1.0
    return inference.generate(
        model, tokenizer, prompts, max_new_tokens=24, temperature=temperature, top_p=0.95, rng=rng
    )


def sizes(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that takes down how many rows each pass of the model had."""
    seen: list[int] = []
    before = model.forward

    def forward(*args: Any, **settings: Any) -> Any:
        seen.append(len(settings["input_ids"]))
        return before(*args, **settings)

    monkeypatch.setattr(model, "forward", forward)
    return seen


def by_generate(model: Any, tokenizer: Any) -> list[list[int]]:
    """The oracle: transformers' own greedy decoding of the same batch, no row taken out."""
    import torch

    ids_BT, mask_BT = inference._left_padded(tokenizer, [tokenizer(p)["input_ids"] for p in LONG])
    with torch.inference_mode():
        out_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=24,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    return out_BT[:, ids_BT.shape[1] :].tolist()


def ends(model: Any, frozen: FrozenModel) -> list[int]:
    """Return tokens that end some rows early and others late, and one that ends none."""
    endless = by_generate(model, Ending(frozen.tokenizer, -1))
    first = {token: [row.index(token) for row in endless if token in row] for row in endless for token in row}
    return [*sorted(first, key=lambda token: -len(set(first[token])))[:4], -1]


def test_greedy_tokens_are_those_of_generate_though_rows_leave_the_batch(
    model: Any, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = ends(model, frozen)
    expected = {end: by_generate(model, Ending(frozen.tokenizer, end)) for end in tokens}
    seen = sizes(model, monkeypatch)

    for end in tokens:
        assert ids(model, Ending(frozen.tokenizer, end)) == expected[end]

    assert min(seen) < max(seen) == len(LONG)


@pytest.mark.parametrize("own", [False, True], ids=["one stream", "a stream per row"])
def test_rows_that_leave_do_not_change_what_is_drawn_for_the_others(
    model: Any, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    def rng(seed: int) -> Any:
        return [stream(seed, "row", row) for row in range(len(LONG))] if own else stream(seed, "batch")

    tokens = ends(model, frozen)[:4]
    seen = sizes(model, monkeypatch)
    shrinking = [ids(model, Ending(frozen.tokenizer, end), rng(seed)) for seed, end in enumerate(tokens * 3)]
    assert min(seen) < len(LONG)

    monkeypatch.setattr(inference, "SHRINK", 0.0)
    seen.clear()
    assert [ids(model, Ending(frozen.tokenizer, end), rng(seed)) for seed, end in enumerate(tokens * 3)] == shrinking
    assert set(seen) == {len(LONG)}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_softmax(temperature: float) -> None:
    expected = softmax(temperature) * DRAWS
    assert stats.chisquare(counts(temperature, 1.0), expected).pvalue > 1e-4


def test_draws_do_not_follow_another_temperature() -> None:
    """The twin: the same test tells 1.0 from 1.1."""
    assert stats.chisquare(counts(1.1, 1.0), softmax(1.0) * DRAWS).pvalue < 1e-4


def test_rows_and_calls_draw_independently() -> None:
    import torch

    processor = inference._seeded_sampling(1.0, 1.0, stream(0, "x"))
    first = processor(None, torch.tensor([LOGITS] * 2000)).argmax(-1).numpy()
    second = processor(None, torch.tensor([LOGITS] * 2000)).argmax(-1).numpy()
    for left, right in ((first[:1000], first[1000:]), (first, second)):
        table = np.histogram2d(left, right, bins=[[0, 1, 2, 6], [0, 1, 2, 6]])[0]
        assert stats.chi2_contingency(table).pvalue > 1e-4


def test_a_stream_per_row_draws_from_softmax_and_rows_draw_apart() -> None:
    import torch

    streams = [stream(0, "row", row) for row in range(4)]
    processor = inference._seeded_sampling(1.0, 1.0, streams)
    drawn = np.array([processor(None, torch.tensor([LOGITS] * 4)).argmax(-1).tolist() for _ in range(DRAWS // 4)])

    assert stats.chisquare(np.bincount(drawn.ravel(), minlength=6), softmax(1.0) * DRAWS).pvalue > 1e-4
    for left, right in ((0, 1), (2, 3)):
        table = np.histogram2d(drawn[:, left], drawn[:, right], bins=[[0, 1, 2, 6], [0, 1, 2, 6]])[0]
        assert stats.chi2_contingency(table).pvalue > 1e-4


def test_a_row_with_a_stream_of_its_own_draws_the_same_in_any_batch() -> None:
    import torch

    def drawn(rows: list[int]) -> list[list[int]]:
        processor = inference._seeded_sampling(1.0, 1.0, [stream(0, "row", row) for row in rows])
        return np.array(
            [processor(None, torch.tensor([LOGITS] * len(rows))).argmax(-1).tolist() for _ in range(30)]
        ).T.tolist()

    together = drawn([0, 1, 2])
    assert together == [drawn([row])[0] for row in range(3)]
    assert together[0] != together[1]
    shared = inference._seeded_sampling(1.0, 1.0, stream(0, "row", 0))  # the twin: one stream for the batch
    first = [int(shared(None, torch.tensor([LOGITS] * 3)).argmax(-1)[0]) for _ in range(30)]
    assert first != together[0]


def test_streams_for_another_number_of_rows_are_noticed() -> None:
    import torch

    processor = inference._seeded_sampling(1.0, 1.0, [stream(0, "row")])
    with pytest.raises(AssertionError, match="1 streams for 2 rows"):
        processor(None, torch.tensor([LOGITS] * 2))


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    # softmax(LOGITS) = .507, .186, .113, ... at temperature 1: cumulative .551, .754, .877, .951, ...
    cumulative = softmax(1.0).cumsum()
    for top_p in (0.1, 0.6, 0.8, 0.9):
        kept = int((cumulative < top_p).sum()) + 1
        found = counts(1.0, top_p)
        assert (found[:kept] > 0).all()
        assert not found[kept:].any()
        expected = softmax(1.0)[:kept] / softmax(1.0)[:kept].sum() * DRAWS
        assert kept == 1 or stats.chisquare(found[:kept], expected).pvalue > 1e-4


def test_the_processor_leaves_one_finite_score_per_row() -> None:
    import torch

    out = inference._seeded_sampling(1.0, 0.9, stream(0, "x"))(None, torch.tensor([LOGITS] * 5))
    assert torch.isfinite(out).sum(-1).tolist() == [1] * 5


def test_same_stream_same_text_whatever_torch_was_seeded_with(model: Any, frozen: FrozenModel) -> None:
    import torch

    first = text(model, frozen, 1)
    torch.manual_seed(123)
    assert text(model, frozen, 1) == first
    assert text(model, frozen, 2) != first
    assert len(first) == len(PROMPTS)


def test_temperature_zero_is_greedy_and_draws_nothing(model: Any, frozen: FrozenModel) -> None:
    import torch

    rng = stream(0, "unused")
    before = rng.bit_generator.state
    (found,) = inference.generate(
        model, frozen.tokenizer, ["A cough:"], max_new_tokens=3, temperature=0.0, top_p=1.0, rng=rng
    )
    assert rng.bit_generator.state == before
    ids = frozen.tokenizer("A cough:", add_special_tokens=False)["input_ids"]
    for _ in range(3):
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == frozen.tokenizer.eos_token_id:
            break
    assert found == frozen.tokenizer.decode(ids[len("A cough:") :], skip_special_tokens=True)


def test_greedy_text_does_not_depend_on_the_other_prompts(model: Any, frozen: FrozenModel) -> None:
    together = text(model, frozen, 0, temperature=0.0)
    assert together == [text(model, frozen, 0, [prompt], temperature=0.0)[0] for prompt in PROMPTS]


def test_no_prompts_no_text(model: Any, frozen: FrozenModel) -> None:
    assert text(model, frozen, 0, []) == []
    assert inference.option_likelihood(model, frozen.tokenizer, [], []) == []


def directly(model: Any, frozen: FrozenModel, prompt: str, option: str) -> float:
    """Return log p(option | prompt) from one forward pass over the whole sequence, without padding or cache."""
    import torch

    start = frozen.tokenizer(prompt, add_special_tokens=False)["input_ids"] or [frozen.tokenizer.bos_token_id]
    ids = [*start, *frozen.tokenizer(option, add_special_tokens=False)["input_ids"]]
    with torch.inference_mode():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[place - 1, ids[place]]) for place in range(len(start), len(ids)))


def test_option_likelihood_is_that_of_the_whole_sequence(model: Any, frozen: FrozenModel) -> None:
    found = inference.option_likelihood(model, frozen.tokenizer, PROMPTS, OPTIONS)
    for prompt, options, row in zip(PROMPTS, OPTIONS, found, strict=True):
        for option, likelihood in zip(options, row, strict=True):
            assert likelihood.log_prob == pytest.approx(directly(model, frozen, prompt, option), rel=1e-4)
            assert likelihood.bytes == likelihood.tokens == len(option.encode())  # the tiny model's tokens are bytes


def test_left_padding_does_not_matter(model: Any, frozen: FrozenModel) -> None:
    together = inference.option_likelihood(model, frozen.tokenizer, PROMPTS, OPTIONS)
    for index, prompt in enumerate(PROMPTS):
        (alone,) = inference.option_likelihood(model, frozen.tokenizer, [prompt], [OPTIONS[index]])
        expected = [likelihood.log_prob for likelihood in alone]
        assert [likelihood.log_prob for likelihood in together[index]] == pytest.approx(expected, rel=1e-4)


def test_an_empty_option_is_certain(model: Any, frozen: FrozenModel) -> None:
    ((empty, other),) = inference.option_likelihood(model, frozen.tokenizer, ["A"], [["", "b"]])
    assert (empty.log_prob, empty.tokens, empty.bytes) == (0.0, 0, 0)
    assert other.log_prob < 0
