"""The lab: the same text and likelihoods whatever the threads, in the order of the prompts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fl_app import inference, lora, lora_start
from fl_app.config import LoraSection
from fl_app.errors import AdapterMismatch
from fl_app.seeds import stream
from fl_app.types import Adapter, LoraFactors
from strategies.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fl_app.models import FrozenModel

PROMPTS = [
    "A rather long question about fevers and what may be done against them?",
    "Hm?",
    "",
    "What helps a cough?",
    "Why is willow bark bitter, and why does it help?",
    "Hm?",
    "Sage!",
]
OPTIONS = [["yes", "no"], ["thyme"], ["a", "bb", "ccc"], ["no", "yes"], ["thyme tea"], ["x", "y", "z"], ["1", "22"]]
"""Two, one and three options: three widths, interleaved."""


def _lab(frozen: FrozenModel, *, threads: int, adapter: Adapter | None = None, batch_rows: int = 3) -> Lab:
    return Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=adapter,
        professional_name="Dr. Sage",
        system="Be brief.",
        threads=threads,
        batch_rows=batch_rows,
        public_words=frozenset(),
    )


@pytest.fixture(scope="module")
def alone(frozen: FrozenModel) -> Iterator[Lab]:
    lab = _lab(frozen, threads=1)
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def pair(frozen: FrozenModel) -> Iterator[Lab]:
    lab = _lab(frozen, threads=2)
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def bent(frozen: FrozenModel) -> Adapter:
    """An adapter that changes what the model says."""
    start = lora_start.initial(
        lora.spec_of(frozen, LoraSection(rank=2, alpha=4.0, targets=("q_proj",))), stream(0, "start")
    )
    layers = {name: LoraFactors(a=20 * f.a, b=np.ones_like(f.b)) for name, f in start.layers.items()}
    return Adapter(layers=layers, alpha=start.alpha, base=start.base)


def _write(lab: Lab, prompts: list[str], *, seed: int = 0, temperature: float = 1.0) -> list[str]:
    model = lab.local_with(None, "base")
    return model.generate(prompts, max_new_tokens=6, temperature=temperature, top_p=1.0, rng=stream(seed, "write"))


# --- threads and order


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_does_not_depend_on_threads(alone: Lab, pair: Lab, temperature: float) -> None:
    texts = _write(alone, PROMPTS, temperature=temperature)

    assert _write(pair, PROMPTS, temperature=temperature) == texts
    assert len(set(texts)) > 1


def test_another_stream_gives_another_text_but_not_when_greedy(alone: Lab) -> None:
    assert _write(alone, PROMPTS, seed=0) != _write(alone, PROMPTS, seed=1)
    assert _write(alone, PROMPTS, seed=0, temperature=0.0) == _write(alone, PROMPTS, seed=1, temperature=0.0)


def test_likelihoods_do_not_depend_on_threads(alone: Lab, pair: Lab) -> None:
    one, other = (lab.local_with(None, "base").option_likelihood(PROMPTS, OPTIONS) for lab in (alone, pair))

    assert one == other


def test_greedy_texts_stand_in_the_order_of_their_prompts(alone: Lab) -> None:
    """Batches are cut by length, so most prompts are computed out of turn; each answer finds its way back."""
    one_by_one = [_write(alone, [prompt], temperature=0.0)[0] for prompt in PROMPTS]

    assert _write(alone, PROMPTS, temperature=0.0) == one_by_one
    assert len(set(one_by_one)) > 3


def test_nothing_asked_nothing_said(alone: Lab) -> None:
    assert _write(alone, []) == []
    assert alone.local_with(None, "base").option_likelihood([], []) == []


def test_equal_prompts_of_a_batch_are_sampled_apart(alone: Lab) -> None:
    assert len(set(_write(alone, ["Hm?"] * 6))) > 1


# --- steered


def _steered(lab: Lab, prompts: list[str], directions: dict[int, np.ndarray], length: float = 30.0) -> list[str]:
    model = lab.local_with(None, "base").steered(directions, dict.fromkeys(directions, length))
    return model.generate(prompts, max_new_tokens=6, temperature=1.0, top_p=1.0, rng=stream(0, "write"))


def _directions() -> dict[int, np.ndarray]:
    rng = np.random.default_rng(3)
    return {layer: rng.normal(size=(len(PROMPTS), 64)).astype(np.float32) for layer in (0, 1)}


def test_steered_text_does_not_depend_on_threads_and_leaves_the_model_as_it_was(alone: Lab, pair: Lab) -> None:
    before = _write(pair, PROMPTS)
    texts = _steered(alone, PROMPTS, _directions())

    assert _steered(pair, PROMPTS, _directions()) == texts != before
    assert _write(pair, PROMPTS) == before


def test_a_push_of_length_zero_is_none(alone: Lab) -> None:
    assert _steered(alone, PROMPTS, _directions(), length=0.0) == _write(alone, PROMPTS)


def test_each_prompt_is_pushed_along_its_own_row(alone: Lab) -> None:
    """Batches are cut by length, so most prompts are computed out of turn: rows of zeros show whose is whose."""
    plain = _write(alone, PROMPTS)
    for row in range(len(PROMPTS)):
        directions = {layer: np.zeros_like(one) for layer, one in _directions().items()}
        for layer, one in _directions().items():
            directions[layer][row] = one[row]
        texts = _steered(alone, PROMPTS, directions)
        assert [n for n, text in enumerate(texts) if text != plain[n]] == [row]


# --- likelihoods of options of several widths


@pytest.mark.parametrize("batch_rows", [3, 12], ids=["one prompt a batch", "all prompts of a width"])
def test_options_of_mixed_widths_are_those_of_each_prompt_alone(frozen: FrozenModel, batch_rows: int) -> None:
    lab = _lab(frozen, threads=1, batch_rows=batch_rows)
    try:
        table = lab.local_with(None, "base").option_likelihood(PROMPTS, OPTIONS)
    finally:
        lab.close()

    assert [len(row) for row in table] == [len(row) for row in OPTIONS]
    for prompt, options, row in zip(PROMPTS, OPTIONS, table, strict=True):
        (single,) = inference.option_likelihood(frozen.model, frozen.tokenizer, [prompt], [options])
        assert [one.bytes for one in row] == [len(option.encode()) for option in options]
        assert [one.tokens for one in row] == [one.tokens for one in single]
        assert [one.log_prob for one in row] == pytest.approx([one.log_prob for one in single], abs=1e-3)


def test_a_likelihood_is_the_sum_of_the_tokens_log_probabilities(alone: Lab, frozen: FrozenModel) -> None:
    """The oracle: one plain forward pass over prompt and option, without cache, padding or batches."""
    import torch

    tokenizer: Any = frozen.tokenizer
    prompt, option = "What helps a cough?", "thyme"
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    option_ids = tokenizer(option, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = frozen.model(input_ids=torch.tensor([[*prompt_ids, *option_ids]])).logits[0].double()
    chances = logits.log_softmax(-1)
    expected = sum(float(chances[len(prompt_ids) - 1 + i, token]) for i, token in enumerate(option_ids))

    ((found,),) = alone.local_with(None, "base").option_likelihood([prompt], [[option]])

    assert found.log_prob == pytest.approx(expected, abs=1e-3)
    assert found.tokens == len(option_ids)
    assert found.log_prob < -math.log(2)


# --- models and adapters


def test_an_adapter_is_on_its_own_model_and_on_no_other(alone: Lab, bent: Adapter) -> None:
    bare = alone.local_with(None, "base").option_likelihood(PROMPTS, OPTIONS)

    with_it = alone.local_with(bent, "bent").option_likelihood(PROMPTS, OPTIONS)

    assert with_it != bare
    assert alone.local_with(None, "base").option_likelihood(PROMPTS, OPTIONS) == bare
    assert alone.professional.option_likelihood(PROMPTS, OPTIONS) == bare


def test_the_professional_may_have_its_own_adapter(frozen: FrozenModel, alone: Lab, bent: Adapter) -> None:
    lab = _lab(frozen, threads=1, adapter=bent)
    try:
        assert lab.professional.name == "Dr. Sage"
        assert lab.professional.option_likelihood(["Hm?"], [["a"]]) == alone.local_with(bent, "x").option_likelihood(
            ["Hm?"], [["a"]]
        )
        assert lab.professional_sha256 == lora.sha256(bent)
    finally:
        lab.close()
    assert alone.professional_sha256 == frozen.resolved.sha256


def test_an_adapter_of_another_base_is_refused(alone: Lab, bent: Adapter) -> None:
    foreign = Adapter(layers=bent.layers, alpha=bent.alpha, base="0" * 64)

    with pytest.raises(AdapterMismatch, match="adapter is for base 000000000000"):
        alone.local_with(foreign, "foreign")


def test_a_chat_prompt_holds_system_and_user(alone: Lab) -> None:
    prompt = alone.professional.chat("What helps?")

    assert prompt.index("Be brief.") < prompt.index("What helps?")
    assert prompt.endswith("assistant\n")


# --- a writer per row


def _row_adapters(bent: Adapter) -> dict[str, Adapter]:
    return {
        name: Adapter(
            layers={n: LoraFactors(a=times * f.a, b=f.b) for n, f in bent.layers.items()},
            alpha=bent.alpha,
            base=bent.base,
        )
        for name, times in (("abbey", 1.0), ("brook", -0.5), ("cliff", 0.1))
    }


VOICES = ["cliff", "abbey", "abbey", "brook", "abbey", "cliff", "brook"]


def _write_rows(lab: Lab, adapters: dict[str, Adapter], *, temperature: float, seed: int = 0) -> list[str]:
    return lab.local_with_rows(adapters).generate(
        PROMPTS, VOICES, max_new_tokens=6, temperature=temperature, top_p=1.0, rng=stream(seed, "write")
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_of_many_writers_does_not_depend_on_threads(
    alone: Lab, pair: Lab, bent: Adapter, temperature: float
) -> None:
    texts = _write_rows(alone, _row_adapters(bent), temperature=temperature)

    assert _write_rows(pair, _row_adapters(bent), temperature=temperature) == texts
    assert len(set(texts)) > 4


def test_each_prompt_is_answered_by_the_adapter_of_its_voice(alone: Lab, bent: Adapter) -> None:
    adapters = _row_adapters(bent)
    expected = [
        alone.local_with(adapters[voice], voice).generate(
            [prompt], max_new_tokens=6, temperature=0.0, top_p=1.0, rng=stream(0, "unused")
        )[0]
        for prompt, voice in zip(PROMPTS, VOICES, strict=True)
    ]

    assert _write_rows(alone, adapters, temperature=0.0) == expected


def test_another_adapter_or_another_batch_leaves_a_row_s_text_alone(
    frozen: FrozenModel, alone: Lab, bent: Adapter
) -> None:
    adapters = _row_adapters(bent)
    before = _write_rows(alone, adapters, temperature=1.0)
    wide = _lab(frozen, threads=1, batch_rows=7)
    try:
        assert _write_rows(wide, adapters, temperature=1.0) == before
    finally:
        wide.close()

    after = _write_rows(alone, {**adapters, "brook": adapters["abbey"]}, temperature=1.0)

    changed = {voice for voice, one, other in zip(VOICES, before, after, strict=True) if one != other}
    assert changed == {"brook"}
    assert _write_rows(alone, adapters, temperature=1.0, seed=1) != before


def test_no_prompts_for_many_writers(alone: Lab, bent: Adapter) -> None:
    rows = alone.local_with_rows(_row_adapters(bent))

    assert rows.generate([], [], max_new_tokens=6, temperature=1.0, top_p=1.0, rng=stream(0, "write")) == []


def test_work_side_by_side_comes_back_in_order(pair: Lab) -> None:
    assert pair.side_by_side(lambda number: number**2, range(20)) == [number**2 for number in range(20)]


def test_progress_tells_of_every_batch(alone: Lab) -> None:
    told: list[tuple[int, int]] = []
    alone.progress = lambda done, total: told.append((done, total))
    try:
        _write(alone, PROMPTS)
    finally:
        alone.progress = lambda _done, _total: None

    assert told == [(1, 3), (2, 3), (3, 3)]
