"""What a token costs when a bucket of private prompts writes it, against plain `generate` over as many rows.

    PYTHONPATH=. python benchmarks/private_decoding.py [--rows 16] [--new-tokens 24] [--repeats 3] [--dtype float32]

One bucket of `rows` prompts, one adapter, one torch thread; reading the prompts is in the clock, laying out the model
is not. Figures are row-tokens per CPU second, so that they compare with plain decoding of the same batch, and ratios
turn by turn. `apart` says whether this machine computes a row to the same bits in any company; where it does not, rows
go through the model one by one, and so they do here.

    plain                transformers' `generate`, greedy, one adapter on all rows
    private_prediction   clip, sum, draw over the whole vocabulary
    with_drafter         the same with a public prompt and the sparse vector
    invisible_ink        a public prompt, top-k+, differences, draw

`DECODERS` maps a name to a function of a bench (`frozen`, `prompts`, `adapters`, `new_tokens`) that returns what is to
be timed, as in decoding.py. The last line is one JSON object; it is appended to results.jsonl with the commit.
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

from clients.learners import invisible_ink, private_prediction
from clients.token_stream import Stream, rows_keep_apart
from fl_app import lora, lora_start, models
from fl_app.config import LoraSection
from fl_app.privacy.noise import SecureNoise

if TYPE_CHECKING:
    from collections.abc import Callable

    from clients.decoding import Pen
    from fl_app.types import Adapter

PROMPT_TOKENS = 96


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One model, a bucket of prompts of equal length, an adapter."""

    frozen: Any
    prompts: list[list[int]]
    adapters: list[Adapter]
    new_tokens: int


Decoder: TypeAlias = "Callable[[Bench], Callable[[], None]]"


def plain(bench: Bench) -> Callable[[], None]:
    """The yardstick."""
    model = lora.attach(bench.frozen, bench.adapters[0])
    ids = torch.tensor(bench.prompts)

    def run() -> None:
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=bench.new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=bench.frozen.tokenizer.pad_token_id,
                eos_token_id=-1,
            )
        assert out.shape[1] == len(bench.prompts[0]) + bench.new_tokens

    return run


def _writing(bench: Bench, make: Callable[[int], Pen], *, public: bool) -> Callable[[], None]:
    model = lora.attach(bench.frozen, bench.adapters[0])
    rows, width = len(bench.prompts), len(bench.prompts[0])
    together = rows if rows_keep_apart(model, rows) else 1
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    noise = SecureNoise()

    def run() -> None:
        private = Stream(model, bench.prompts, [0] * rows, width=width, together=together)
        shot = Stream(model, bench.prompts[:1], [0], width=width, together=together) if public else None
        pen = make(vocabulary)
        for _ in range(bench.new_tokens):
            pen.begin(next(iter(shot.scores({0})))[1][0] if shot else None)
            for _, scores_RV in private.scores({0}):
                pen.add(scores_RV)
            drawn = {0: pen.draw(noise)}
            private.append(drawn)
            if shot:
                shot.append(drawn)

    return run


def _amin(bench: Bench, threshold: float) -> private_prediction.PrivatePrediction:
    return private_prediction.PrivatePrediction(
        kind="private_prediction",
        buckets_per_code=1,
        expected_units=float(len(bench.prompts)),
        tokens_per_bucket=bench.new_tokens,
        threshold=threshold,
    )


def private_tokens(bench: Bench) -> Callable[[], None]:
    """Amin et al. without a drafter."""
    made = _amin(bench, 0.0)
    return _writing(
        bench,
        lambda size: private_prediction.Pen(section=made, span=1.0, vocabulary=size, row_weight=1.0),
        public=False,
    )


def with_drafter(bench: Bench) -> Callable[[], None]:
    """Amin et al. with one."""
    made = _amin(bench, 0.5)
    return _writing(
        bench,
        lambda size: private_prediction.Pen(section=made, span=1.0, vocabulary=size, row_weight=1.0),
        public=True,
    )


def ink(bench: Bench) -> Callable[[], None]:
    """InvisibleInk."""
    made = invisible_ink.InvisibleInk(
        kind="invisible_ink",
        buckets_per_code=1,
        expected_units=float(len(bench.prompts)),
        max_new_tokens=bench.new_tokens,
    )
    return _writing(bench, lambda _: invisible_ink.Pen(section=made, span=1.0, row_weight=1.0), public=True)


DECODERS: dict[str, Decoder] = {
    "plain": plain,
    "private_prediction": private_tokens,
    "with_drafter": with_drafter,
    "invisible_ink": ink,
}


def make_bench(name: str, dtype: Any, rows: int, new_tokens: int) -> Bench:
    """Return a bench with random prompts and a fresh adapter."""
    frozen = models.load(name, dtype)
    spec = lora.spec_of(frozen, LoraSection(rank=8, alpha=16.0, targets=("q_proj", "v_proj")))
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, frozen.model.config.vocab_size, (rows, PROMPT_TOKENS)).tolist()
    return Bench(frozen=frozen, prompts=prompts, adapters=[lora_start.initial(spec, rng)], new_tokens=new_tokens)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    begun = record.commit()
    bench = make_bench(arguments.model, arguments.dtype, arguments.rows, arguments.new_tokens)
    runs = {name: build(bench) for name, build in DECODERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(arguments.repeats + 1):  # the first is not counted
        for name, run in runs.items():
            began = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - began)
    tokens = arguments.rows * arguments.new_tokens
    base = np.array(seconds["plain"])
    line = {
        "kind": "private_decoding",
        "commit": begun,
        "model": arguments.model,
        "dtype": arguments.dtype,
        "rows": arguments.rows,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": arguments.new_tokens,
        "repeats": arguments.repeats,
        "apart": rows_keep_apart(lora.attach(bench.frozen, bench.adapters[0]), arguments.rows),
        "row_tokens_per_s": {name: round(tokens / float(np.median(one)), 1) for name, one in seconds.items()},
        "over_plain": {
            name: [round(float(f(np.array(one) / base)), 3) for f in (np.median, np.min, np.max)]
            for name, one in seconds.items()
        },
    }
    if not arguments.no_record:
        line = record.append(line)
    print(json.dumps(line, sort_keys=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
