"""The fused LoRA layer and the chunked loss against the plain arithmetic they replace, in three kinds of model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from clients import per_example
from fl_app import kernels, lora, lora_linear, lora_start, sequences, token_loss
from fl_app.config import LoraSection
from fl_app.errors import AdapterMismatch
from fl_app.models import FrozenModel, ResolvedModel
from fl_app.sequences import TokenSequence

if TYPE_CHECKING:
    from pathlib import Path

TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gemma3": ("q_proj", "v_proj", "o_proj", "down_proj"),
    "gemma2": ("q_proj", "v_proj", "gate_proj"),
}
FAMILIES = tuple(TARGETS)
CUTTABLE = {"llama", "gemma2"}
"""GPT-2 adds positions to whatever it is given, Gemma 3 asks a block's number for its kind: both are trained whole."""

common = {"vocab_size": 131, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
decoder = {
    **common,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def make(family: str, dtype: str = "float32") -> FrozenModel:
    """Return a three-layer model of a family with fixed random weights."""
    import torch
    import transformers as hf

    configs: dict[str, Any] = {
        "llama": lambda: hf.LlamaConfig(**decoder),
        "gpt2": lambda: hf.GPT2Config(**common, n_embd=32, n_layer=3, n_head=4, n_positions=128, resid_pdrop=0.0),
        "gemma3": lambda: hf.Gemma3TextConfig(
            **decoder, sliding_window=8, layer_types=["sliding_attention"] * 2 + ["full_attention"]
        ),
        "gemma2": lambda: hf.Gemma2Config(**decoder, sliding_window=8, final_logit_softcapping=3.0),
    }
    config = configs[family]()
    config._attn_implementation = "eager"
    model: Any = hf.AutoModelForCausalLM.from_config(config)
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            spread = 0.6 / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 0.1
            weight.copy_(torch.from_numpy(rng.normal(0, spread, tuple(weight.shape)) + (weight.ndim == 1)))
    model = model.to(getattr(torch, dtype)).eval().requires_grad_(False)

    class Tokenizer:
        pad_token_id = 0

    return FrozenModel(
        resolved=ResolvedModel(name=family, path=_nowhere(), sha256=family), tokenizer=Tokenizer(), model=model
    )


def _nowhere() -> Path:
    from pathlib import Path

    return Path("nowhere")


def adapted(family: str, dtype: str = "float32", first_layer: int = 0) -> Any:
    """Return a model of a family with an adapter that has learned something."""
    frozen = make(family, dtype)
    section = LoraSection(rank=3, alpha=6.0, targets=TARGETS[family], first_layer=first_layer)
    spec = lora.spec_of(frozen, section)
    rng = np.random.default_rng(6)
    start = lora_start.initial(spec, rng)
    for factors in start.layers.values():
        factors.b[:] = rng.normal(0, 0.2, factors.b.shape)
    return lora.attach(frozen, start)


def some_examples(count: int = 7, seed: int = 0) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 41, count)
    return [TokenSequence(ids=tuple(rng.integers(3, 131, n).tolist()), loss_from=max(1, int(n) // 3)) for n in lengths]


def by_loop(model: Any, examples: list[TokenSequence]) -> np.ndarray:
    """Return each example's gradient by PEFT's own layers, transformers' own loss and autograd, one by one."""
    import torch

    weights = list(lora.parameters(model).values())
    rows = []
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = torch.tensor([[-100] * example.loss_from + list(example.ids[example.loss_from :])])
        loss = model(input_ids=ids, labels=labels).loss
        gradients = torch.autograd.grad(loss, weights)
        rows.append(np.concatenate([gradient.double().numpy().ravel() for gradient in gradients]))
    return np.array(rows)


def clipped(model: Any, examples: list[TokenSequence], clip: float, **options: Any) -> np.ndarray:
    found = per_example.clipped_sum(model, examples, clip_norm=clip, max_batch_tokens=96, pad_id=0, **options)
    return np.concatenate([tensor.ravel() for tensor in found.tensors])


def distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_clipped_sum_is_that_of_a_loop(family: str) -> None:
    model = adapted(family)
    examples = some_examples()
    gradients = by_loop(model, examples)
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    clip = float(np.median(norms))
    expected = (gradients * np.minimum(1, clip / norms)).sum(0)
    assert distance(clipped(model, examples, clip), expected) <= 1e-5
    assert distance(clipped(model, examples, clip, engine="opacus"), expected) <= 1e-5
    assert distance(gradients.sum(0), expected) > 1e-2  # the twin: the clip matters here


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_sum_is_that_of_a_loop(family: str) -> None:
    model = adapted(family)
    examples = some_examples()
    found = per_example.plain_sum(model, examples, max_batch_tokens=96, pad_id=0)
    assert distance(np.concatenate([t.ravel() for t in found]), by_loop(model, examples).sum(0)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_factors_that_are_trained(family: str) -> None:
    model = adapted(family)
    whole = per_example.clipped_sum(model, some_examples(), clip_norm=1e9, max_batch_tokens=96, pad_id=0).tensors
    names = list(lora.parameters(model))
    for name, weight in lora.parameters(model).items():
        weight.requires_grad_(name.endswith(".b"))
    found = per_example.clipped_sum(model, some_examples(), clip_norm=1e9, max_batch_tokens=96, pad_id=0).tensors
    expected = [tensor for name, tensor in zip(names, whole, strict=True) if name.endswith(".b")]
    assert len(found) == len(names) // 2
    assert all(np.allclose(one, other, rtol=1e-6, atol=1e-9) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_in_any_company(family: str, dtype: str) -> None:
    """What "one example moves the sum by its own clipped gradient" means when nothing is rounded in between."""
    model = adapted(family, dtype)
    mine = some_examples(1, seed=3)
    alone = clipped(model, mine, 0.1)
    for seed in range(4):
        company = some_examples(9, seed=10 + seed)
        without = clipped(model, company, 0.1)
        for place in (0, 4, 9):
            together = clipped(model, [*company[:place], *mine, *company[place:]], 0.1)
            assert np.abs((together - without) - alone).max() <= 1e-15


def test_a_loss_over_the_batchs_tokens_would_change_other_peoples_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: with transformers' own mean over all tokens of a batch, a new row moves the others' gradients."""
    model = adapted("llama")
    mine, company = some_examples(1, seed=3), some_examples(9, seed=10)
    alone = clipped(model, mine, 50.0)
    own = sequences.example_losses

    def token_mean(model: Any, batch: Any, frozen: Any) -> Any:
        counts = batch.loss_mask_BT.sum(1)
        return own(model, batch, frozen) * counts / counts.sum().clamp(min=1)

    monkeypatch.setattr(sequences, "example_losses", token_mean)
    moved = (clipped(model, [*company, *mine], 50.0) - clipped(model, company, 50.0)) - alone
    assert np.abs(moved).max() > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_states_change_nothing_where_they_are_used(family: str) -> None:
    model = adapted(family, first_layer=2)
    assert sequences.can_be_cut(model, 2) == (family in CUTTABLE)
    assert not sequences.can_be_cut(model, 0)
    if family not in CUTTABLE:
        return
    examples = some_examples(9)
    frozen = sequences.FrozenPrefix(first_block=2)
    whole = clipped(model, examples, 0.1)
    assert np.array_equal(clipped(model, examples, 0.1, frozen=frozen), whole)  # computed
    assert np.array_equal(
        clipped(model, examples[::-1], 0.1, frozen=frozen), clipped(model, examples[::-1], 0.1)
    )  # kept
    assert len(frozen.states) == len(examples)
    full = sequences.FrozenPrefix(first_block=2, most_bytes=0)
    assert np.array_equal(clipped(model, examples, 0.1, frozen=full), whole)
    assert not full.states
    wrong = sequences.FrozenPrefix(first_block=1, states={key: state * 1.01 for key, state in frozen.states.items()})
    assert distance(clipped(model, examples, 0.1, frozen=wrong), whole) > 1e-4  # the twin: they are used


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_compute_what_peft_computes_and_are_put_back(family: str) -> None:
    import torch

    model = adapted(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with lora_linear.fused(model, lambda *_: None) as layers:
            found = model(input_ids=ids).logits
            assert {f"{name}.{factor}" for name in layers for factor in "ab"} == set(lora.parameters(model))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_is_not_plain_lora_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    for options in ({"lora_dropout": 0.1}, {"use_dora": True}):
        model = get_peft_model(make("llama").model, LoraConfig(r=2, target_modules=["q_proj"], **options))
        with pytest.raises(AdapterMismatch, match="is not plain LoRA"), lora_linear.fused(model, lambda *_: None):
            pass
        assert not any("forward" in module.__dict__ for module in model.modules())


HEADS = {"plain": {}, "capped": {"softcap": 2.0}, "scaled": {"scale": 0.25}, "both": {"softcap": 1.5, "scale": 3.0}}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 16, 17, 40])
def test_chunked_losses_and_slopes_are_autograds(
    kind: str, bias: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(token_loss, "CHUNK", 16)
    rng = np.random.default_rng(1)
    weight, hidden = (torch.from_numpy(rng.normal(0, 1, s)).float() for s in ((50, 6), (count, 6)))
    targets = torch.from_numpy(rng.integers(0, 50, count))
    offset = torch.from_numpy(rng.normal(0, 1, 50)).float() if bias else None
    upstream = torch.from_numpy(rng.normal(0, 1, count)).float()
    options: dict[str, Any] = {"scale": 1.0, "softcap": None, **HEADS[kind]}
    head = token_loss.Head(weight=weight, bias=offset, **options)

    def plain(states: Any) -> Any:
        logits = torch.nn.functional.linear(states.double(), weight.double(), offset.double() if bias else None)
        logits = logits * options["scale"]
        logits = options["softcap"] * torch.tanh(logits / options["softcap"]) if options["softcap"] else logits
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    found, expected = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ours, theirs = token_loss.token_losses(found, targets, head), plain(expected)
    assert ours.detach().numpy() == pytest.approx(theirs.detach().numpy(), rel=1e-5, abs=1e-6)
    (slopes,) = torch.autograd.grad(ours, found, upstream)
    (reference,) = torch.autograd.grad(theirs, expected, upstream.double())
    assert slopes.numpy() == pytest.approx(reference.numpy(), rel=1e-4, abs=1e-6)


def test_a_target_beyond_float32s_reach_still_has_its_loss() -> None:
    import torch

    head = token_loss.Head(weight=torch.tensor([[0.0], [300.0]]), bias=None, scale=1.0, softcap=None)
    loss = token_loss.token_losses(torch.ones(1, 1), torch.tensor([0]), head)
    assert loss.tolist() == [300.0]  # its probability, e^-300, is zero in float32


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_models_own(family: str) -> None:
    import torch

    model = adapted(family)
    for example in some_examples(4):
        (batch,) = sequences.isolated_batches([example], max_batch_tokens=1, pad_id=0)
        labels = torch.tensor([[-100] * example.loss_from + list(example.ids[example.loss_from :])])
        with torch.no_grad():
            expected = float(model(input_ids=torch.tensor([example.ids]), labels=labels).loss)
        assert float(sequences.example_losses(model, batch)[0].detach()) == pytest.approx(expected, rel=1e-5)


def test_the_check_of_kernels_can_say_no(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that rounds by the height of its batch, by as little as float32 can show, is found."""
    import torch

    model = adapted("llama")
    assert kernels.keep_rows_apart(model, 512)
    product = torch.Tensor.__matmul__

    def by_height(left: Any, right: Any) -> Any:
        return product(left, right) * (1 + 2.0**-22 * left.shape[0])

    kernels._agree.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__matmul__", by_height)
    assert not kernels.keep_rows_apart(model, 512)
    kernels._agree.cache_clear()
    assert (kernels.draws(2048, torch.float32), kernels.draws(2048, torch.bfloat16)) == (1, 128)


@pytest.mark.parametrize("found", [True, False])
def test_rows_share_a_batch_only_where_kernels_keep_them_apart(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = adapted("llama"), some_examples(9)
    expected = clipped(model, examples, 0.1)
    asked: list[int] = []
    own = sequences.isolated_batches

    def watched(rows: Any, *, max_batch_tokens: int, pad_id: int) -> Any:
        if len(rows) == len(examples):
            asked.append(max_batch_tokens)
        return own(rows, max_batch_tokens=max_batch_tokens, pad_id=pad_id)

    per_example._verdicts.cache_clear()
    monkeypatch.setattr(kernels, "keep_rows_apart", lambda *_: found)
    monkeypatch.setattr(sequences, "isolated_batches", watched)
    assert np.array_equal(clipped(model, examples, 0.1), expected)
    assert asked == [96 if found else 1]
    per_example._verdicts.cache_clear()


def test_a_map_that_gets_no_rows_of_tokens_is_refused() -> None:
    import torch

    model = adapted("llama")
    with lora_linear.fused(model, lambda *_: None):
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        with pytest.raises(AdapterMismatch, match="leave it out of lora"):
            layer(torch.zeros(6, 32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_silent_row_moves_nothing_in_many_tries(dtype: str) -> None:
    """Rounding hides most differences in bfloat16, so many rows have to be tried: one in 100 moved before."""
    model = adapted("llama", dtype)
    silent = TokenSequence(ids=(5, 6, 7), loss_from=3)
    for seed in range(150 if dtype == "bfloat16" else 5):
        mine = some_examples(1, seed=1000 + seed)
        assert np.array_equal(clipped(model, [*mine, silent], 0.1), clipped(model, mine, 0.1))
