"""A site's whole round, from peft's layers and Opacus' hooks to our engine, one idea at a time.

The work is fixed: 128 letters of the embedded corpus after their control codes, 8 Poisson steps at rate 1/4 (about 32
letters a step, so each letter is met twice), LoRA of rank 8 on all linear maps of the upper third, one noise draw and
one AdamW step per step. Rungs take every step in turn; a rung's time is the sum over its steps.

    opacus hooks       float32, physical batches of 8 letters padded to their longest, all logits, plain loss
    + one node         each LoRA layer one node of the graph that forms per-example gradients in its backward
    + chunked loss     logits only where a loss is due, 512 positions at a time
    + by length        letters batched with letters of their own width
    + bfloat16         base model and products in bfloat16, gradients added in float64
    + frozen states    activations below the first adapted block computed once per letter
"""

from __future__ import annotations

import itertools
import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

from clients import per_example
from fl_app import sequences
from fl_app.models import load
from fl_app.privacy import gaussian
from fl_app.privacy.noise import SecureNoise
from fl_app.sequences import FrozenPrefix, MicroBatch, TokenSequence
from simulations.corpus.codes import build_codes
from simulations.corpus.formulary import build_formulary, build_topics
from simulations.corpus.letters import private_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    Step = Callable[[Sequence[TokenSequence]], None]

LETTERS, RATE, STEPS, FIRST_LAYER, MICRO_TOKENS, PHYSICAL_ROWS = 128, 0.25, 8, 20, 512, 8
CLIP, NOISE_MULTIPLIER, EXPECTED = 1.0, 1.0, 32


def letters(tokenizer: Any) -> list[TokenSequence]:
    """Return the letters of one house after their control codes."""
    topics = build_topics(build_formulary())
    codes = {code.id: code.text for code in build_codes(topics)}
    rows = [row for row in private_rows(topics, seed=0) if row["house"] == "court"][:LETTERS]
    return [sequences.encode(tokenizer, codes[row["code"]], row["instruction"], max_tokens=96) for row in rows]


def unsorted_batches(examples: Sequence[TokenSequence], *, pad_id: int, **_: int) -> list[MicroBatch]:
    """Return the rows as they were drawn, 8 to a batch, each as long as its longest: Opacus' physical batches."""
    batches: list[MicroBatch] = []
    for first in range(0, len(examples), PHYSICAL_ROWS):
        batches += sequences.micro_batches(
            examples[first : first + PHYSICAL_ROWS], max_batch_tokens=1 << 30, pad_id=pad_id
        )
    return batches


def full_logit_losses(model: Any, batch: MicroBatch, *_: Any) -> Any:
    """Return each row's mean loss from all logits of the batch. Shape: (B,)."""
    logits = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.ids_BT[:, 1:], reduction="none")
    counts = batch.loss_mask_BT.sum(1).clamp(min=1)
    return (losses * batch.loss_mask_BT).sum(1) / counts


@contextmanager
def plainly(*, loss: bool, batches: bool) -> Generator[None]:
    """Take our loss, our batches, or both away from the engine."""
    own_loss, own_batches = sequences.example_losses, sequences.isolated_batches
    with (
        mock.patch.object(sequences, "example_losses", own_loss if loss else full_logit_losses),
        mock.patch.object(sequences, "isolated_batches", own_batches if batches else unsorted_batches),
    ):
        yield


def step_of(model: Any, *, engine: str, loss: bool, batches: bool, frozen: bool, micro_tokens: int) -> Step:
    """Return a function that takes one DP step on some letters."""
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4, fused=True)
    noise = SecureNoise()
    prefix = FrozenPrefix(first_block=FIRST_LAYER) if frozen else None

    def step(examples: Sequence[TokenSequence]) -> None:
        with plainly(loss=loss, batches=batches):
            summed = per_example.clipped_sum(
                model,
                examples,
                clip_norm=gaussian.usable_clip(CLIP),
                max_batch_tokens=micro_tokens,
                pad_id=0,
                engine=engine,  # type: ignore[arg-type]
                frozen=prefix,
            )
        noisy = gaussian.release(summed.tensors, clip_norm=CLIP, noise_multiplier=NOISE_MULTIPLIER, noise=noise)
        for weight, total in zip(per_example.trained(model).values(), noisy, strict=True):
            weight.grad = torch.from_numpy((total / EXPECTED).astype(np.float32))
        optimizer.step()

    return step


RUNGS: dict[str, dict[str, Any]] = {
    "opacus hooks": {"engine": "opacus", "loss": False, "batches": False, "frozen": False},
    "+ one node": {"engine": "fused", "loss": False, "batches": False, "frozen": False},
    "+ chunked loss": {"engine": "fused", "loss": True, "batches": False, "frozen": False},
    "+ by length": {"engine": "fused", "loss": True, "batches": True, "frozen": False},
    "+ bfloat16": {"engine": "fused", "loss": True, "batches": True, "frozen": False, "dtype": "bfloat16"},
    "+ frozen states": {"engine": "fused", "loss": True, "batches": True, "frozen": True, "dtype": "bfloat16"},
}


def run(adapted: Callable[..., Any], repeats: int, name: str = "smollm2-135m-instruct") -> dict[str, Any]:
    """Return seconds per rung, the gain of each, and the speed-up of the whole. `adapted` makes a model."""
    examples = letters(load(name, "float32").tokenizer)
    totals: dict[str, list[float]] = {rung: [] for rung in RUNGS}
    check_s = 0.0
    for repeat in range(max(1, repeats // 2)):
        steps: dict[str, Step] = {}
        for rung, options in RUNGS.items():
            rest = {key: value for key, value in options.items() if key != "dtype"}
            model = adapted(targets="all", dtype=options.get("dtype", "float32"), first_layer=FIRST_LAYER)
            steps[rung] = step_of(model, micro_tokens=MICRO_TOKENS, **rest)
            began = time.process_time()
            steps[rung]([])  # what is asked once per process: do kernels keep rows apart
            if (
                options.get("dtype") == "bfloat16"
            ):  # the float32 rungs have a check of their own, which ours never makes
                check_s = max(check_s, time.process_time() - began)
        rng = np.random.default_rng(repeat)
        seconds = dict.fromkeys(RUNGS, 0.0)
        for _ in range(STEPS):
            chosen = [one for one in examples if rng.random() < RATE]
            for rung, step in steps.items():
                began = time.process_time()
                step(chosen)
                seconds[rung] += time.process_time() - began
        for rung in RUNGS:
            totals[rung].append(seconds[rung])
        print(f"round {repeat}: {json.dumps({k: round(v, 2) for k, v in seconds.items()})}", flush=True)
    first, last = totals["opacus hooks"], totals["+ frozen states"]
    ups = np.array(first) / (np.array(last) + check_s)
    names = list(RUNGS)
    return {
        "letters": len(examples),
        "mean_tokens": round(float(np.mean([len(one.ids) for one in examples])), 1),
        "loss_share": round(
            sum(len(one.ids) - one.loss_from for one in examples) / sum(len(one.ids) for one in examples), 3
        ),
        "seconds": {rung: round(float(np.median(values)), 2) for rung, values in totals.items()},
        "gain": {
            rung: round(float(np.median(np.array(totals[before]) / np.array(totals[rung]))), 3)
            for before, rung in itertools.pairwise(names)
        },
        "kernel_check_s": round(check_s, 2),
        "speedup": {
            "median": round(float(np.median(ups)), 3),
            "low": round(float(ups.min()), 3),
            "high": round(float(ups.max()), 3),
        },
    }
