"""What a token costs under each decoder, against plain `generate` of the same model, interleaved in one process.

    PYTHONPATH=. python benchmarks/decoding.py [--repeats 3] [--cases float32-qv,...] [--decoders plain,...]

Every decoder writes the same number of tokens after the same prompts: no row ends before its time. Figures are ratios
of CPU seconds turn by turn, so that a machine whose speed drifts drifts for all; medians with the lowest and highest.
One torch thread. Our layers are put on the model for each batch, as in a round, and the clock counts that; PEFT's are
put on before the clock runs, as in a round.

    plain         transformers' `generate`, greedy, the bare model
    plain_static  the same with a static key-value cache
    seeded        our sampling: Gumbel noise of one stream for the batch
    seeded_rows   the same with a stream per row
    one_adapter   plain, one PEFT adapter for all rows
    own_one       plain, one adapter for all rows by our layers
    per_row       plain, an adapter of its own for every row
    peft_mixed    PEFT's mixed batch (`adapter_names`), the same adapters
    steered       our sampling, each row pushed along its own direction after one block
    one_by_one    one adapter after another, each with its own rows as a batch

A decoder is a line in `DECODERS`: name -> function of a `Bench` that returns what is to be timed. The last line is one
JSON object; it is appended to results.jsonl with the commit, from which docs/performance.md is made.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import record
import torch
import transformers

from fl_app import inference, lora, models, row_adapters, steering
from fl_app.config import LoraSection
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
CASES = {
    "float32-qv": ("float32", "qv", 8),
    "float32-all": ("float32", "all", 8),
    "bfloat16-all": ("bfloat16", "all", 8),
    "bfloat16-all-32": ("bfloat16", "all", 32),
}
"""Precision, maps with LoRA of rank 8, rows of the batch. There are eight adapters; 32 rows share them, four each."""

ADAPTERS, RANK, PROMPT_TOKENS = 8, 8, 32


@dataclass(frozen=True, slots=True)
class Endless:
    """A tokenizer whose prompts are token ids already and whose end token is never written."""

    inner: Any

    @property
    def eos_token_id(self) -> int:
        """No token."""
        return -1

    def __call__(self, prompt: Sequence[int], **_: Any) -> dict[str, Sequence[int]]:
        """Return the ids that came in."""
        return {"input_ids": prompt}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One model, a batch of prompts of equal length, and adapters to write with."""

    frozen: Any
    prompts: list[list[int]]
    adapters: list[Adapter]
    new_tokens: int

    @property
    def index(self) -> list[int]:
        """Which adapter writes which row."""
        return [row * len(self.adapters) // len(self.prompts) for row in range(len(self.prompts))]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer under which no row ends."""
        return Endless(self.frozen.tokenizer)

    def plain(self, model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """Return what transformers' `generate` decodes greedily, token ids without the prompt."""
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                **options,
            )
        assert out.shape == (len(prompts), PROMPT_TOKENS + self.new_tokens)
        return out[:, PROMPT_TOKENS:].tolist()


Decode: TypeAlias = "Callable[[], Any]"
"""What is timed. A decoder without randomness returns the token ids of its rows, so that a test can compare them."""

Decoder: TypeAlias = "Callable[[Bench], Decode]"


def make(name: str, dtype: str, targets: str, rows: int, new_tokens: int) -> Bench:
    """Return a bench with random prompts, and adapters that are small enough to keep the model sane."""
    frozen = models.load(name, dtype)
    spec = lora.spec_of(frozen, LoraSection(rank=RANK, alpha=2.0 * RANK, targets=TARGETS[targets]))
    rng = np.random.default_rng(0)
    adapters = [
        Adapter(
            layers={
                layer: LoraFactors(
                    a=rng.normal(0, d_in**-0.5, (RANK, d_in)).astype(np.float32),
                    b=rng.normal(0, 0.01, (d_out, RANK)).astype(np.float32),
                )
                for layer, (d_in, d_out) in spec.shapes.items()
            },
            alpha=spec.alpha,
            base=spec.base,
        )
        for _ in range(ADAPTERS)
    ]
    prompts = rng.integers(5, frozen.model.config.vocab_size, (rows, PROMPT_TOKENS)).tolist()
    return Bench(frozen=frozen, prompts=prompts, adapters=adapters, new_tokens=new_tokens)


def plain(bench: Bench) -> Decode:
    """The yardstick."""
    return lambda: bench.plain(bench.frozen.model, bench.prompts)


def plain_static(bench: Bench) -> Decode:
    """The yardstick with a cache that is laid out at once."""
    return lambda: bench.plain(bench.frozen.model, bench.prompts, cache_implementation="static")


def _seeded(bench: Bench, rng_of: Callable[[], Any]) -> Decode:
    def run() -> None:
        prompts: Any = bench.prompts
        options = {"max_new_tokens": bench.new_tokens, "temperature": 0.8, "top_p": 0.95}
        inference.generate(bench.frozen.model, bench.tokenizer, prompts, rng=rng_of(), **options)

    return run


def seeded(bench: Bench) -> Decode:
    """Sampling as the lab does it with one adapter."""
    return _seeded(bench, lambda: np.random.default_rng(0))


def seeded_rows(bench: Bench) -> Decode:
    """Sampling as the lab does it with an adapter per row."""
    return _seeded(bench, lambda: [np.random.default_rng(row) for row in range(len(bench.prompts))])


def one_adapter(bench: Bench) -> Decode:
    """PEFT as it is."""
    model = lora.attach(bench.frozen, bench.adapters[0])
    return lambda: bench.plain(model, bench.prompts)


def own_one(bench: Bench) -> Decode:
    """Our layers, all rows under the same adapter."""
    index = [0] * len(bench.prompts)
    return lambda: bench.plain(row_adapters.attach(bench.frozen, bench.adapters, index), bench.prompts)


def per_row(bench: Bench) -> Decode:
    """Our layers, every adapter in the batch."""
    return lambda: bench.plain(row_adapters.attach(bench.frozen, bench.adapters, bench.index), bench.prompts)


def peft_mixed(bench: Bench) -> Decode:
    """PEFT with all adapters loaded."""
    model: Any = lora.attach(bench.frozen, bench.adapters[0])
    names = ["default"]
    for number, adapter in enumerate(bench.adapters[1:], start=1):
        names.append(f"site{number}")
        model.add_adapter(names[-1], model.peft_config["default"])
        for layer, factors in adapter.layers.items():
            module = model.base_model.model.get_submodule(layer)
            with torch.no_grad():
                module.lora_A[names[-1]].weight.copy_(torch.from_numpy(factors.a))
                module.lora_B[names[-1]].weight.copy_(torch.from_numpy(factors.b))
    chosen = [names[one] for one in bench.index]
    return lambda: bench.plain(model.eval(), bench.prompts, adapter_names=chosen)


def one_by_one(bench: Bench) -> Decode:
    """One site after another, each with its rows."""
    models_by_adapter = [lora.attach(bench.frozen, adapter) for adapter in bench.adapters]
    batches: dict[int, list[list[int]]] = {}
    for prompt, own in zip(bench.prompts, bench.index, strict=True):
        batches.setdefault(own, []).append(prompt)

    def run() -> list[list[int]]:
        return [ids for own, prompts in batches.items() for ids in bench.plain(models_by_adapter[own], prompts)]

    return run


def steered(bench: Bench) -> Decode:
    """Our sampling, every row pushed along a direction of its own after one block (EPSVec)."""
    width, layer = steering.width(bench.frozen.model), 0
    directions = np.random.default_rng(1).normal(size=(len(bench.prompts), width)).astype(np.float32)
    plain_seeded = seeded(bench)

    def run() -> None:
        with steering.steer(bench.frozen.model, {layer: directions}, {layer: 0.1}):
            plain_seeded()

    return run


DECODERS: dict[str, Decoder] = {
    "plain": plain,
    "plain_static": plain_static,
    "seeded": seeded,
    "seeded_rows": seeded_rows,
    "steered": steered,
    "one_adapter": one_adapter,
    "own_one": own_one,
    "per_row": per_row,
    "peft_mixed": peft_mixed,
    "one_by_one": one_by_one,
}


def interleaved(decoders: dict[str, Decode], repeats: int) -> dict[str, list[float]]:
    """Return CPU seconds of each decoder, taken in turn, after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(repeats + 1):
        for name, decode in decoders.items():
            began = time.process_time()
            decode()
            if turn:
                seconds[name].append(time.process_time() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Return median, lowest and highest of the ratios turn by turn."""
    ratios = np.array(seconds[name]) / np.array(seconds[to])
    return {"median": round(float(np.median(ratios)), 4), "low": round(ratios.min(), 4), "high": round(ratios.max(), 4)}


def case(model: str, which: str, chosen: Sequence[str], repeats: int, new_tokens: int) -> dict[str, Any]:
    """Return one case: tokens per second, and ratios to plain and to one adapter."""
    dtype, targets, rows = CASES[which]
    bench = make(model, dtype, targets, rows, new_tokens)
    seconds = interleaved({name: DECODERS[name](bench) for name in chosen}, repeats)
    tokens = rows * new_tokens
    found: dict[str, Any] = {
        "rows": rows,
        "tokens_per_s": {name: round(tokens / float(np.median(one)), 1) for name, one in seconds.items()},
        "over_plain": {name: ratio(seconds, name, "plain") for name in chosen if name != "plain"},
    }
    adapted = [name for name in ("per_row", "peft_mixed", "one_by_one") if name in seconds]
    for yardstick in ("one_adapter", "own_one"):
        if yardstick in seconds:
            found[f"over_{yardstick}"] = {name: ratio(seconds, name, yardstick) for name in adapted}
    return found


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--decoders", default=",".join(DECODERS))
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # it warns of the end token that is none
    begun = record.commit()
    chosen = ["plain", *(name for name in arguments.decoders.split(",") if name != "plain")]
    cases: dict[str, Any] = {}
    for which in arguments.cases.split(","):
        cases[which] = case(arguments.model, which, chosen, arguments.repeats, arguments.new_tokens)
        print(f"{which}: {json.dumps(cases[which])}", flush=True)
    line = {
        "kind": "decoding",
        "commit": begun,
        "model": arguments.model,
        "repeats": arguments.repeats,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": arguments.new_tokens,
        "adapters": ADAPTERS,
        "cases": cases,
    }
    if not arguments.no_record:
        line = record.append(line)
    print(json.dumps(line, sort_keys=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
