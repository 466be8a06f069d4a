"""What a DP-LoRA step costs: ours, peft's without privacy, Opacus', interleaved in one process; then a site's round.

    PYTHONPATH=. python benchmarks/dp_step.py [--repeats 5] [--parts step,memory,round] [--model NAME] [--no-record]

Figures are ratios of CPU seconds, step by step in turn, so that a machine whose speed drifts drifts for all; medians
with the lowest and the highest. One torch thread. Same model, same rows, same tokens, every token but the first
carries loss, all variants take an AdamW step. Peak memory is that of a process of its own per variant.

    step     peft, Opacus hooks, Opacus ghost clipping, ours without privacy, ours; q and v, all linear maps
    memory   the largest resident size of each
    round    a site's whole round, from peft and Opacus hooks to ours by adding one idea at a time

The last line is one JSON object; it is appended to results.jsonl with the commit, from which docs/performance.md is
made. fastDP and private-transformers are on no package registry that we install from and are not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import record
import round_ladder
import torch

from clients import per_example
from fl_app import lora, lora_linear, lora_start, models, sequences
from fl_app.config import LoraSection
from fl_app.privacy import gaussian
from fl_app.privacy.noise import SecureNoise
from fl_app.sequences import TokenSequence

if TYPE_CHECKING:
    from collections.abc import Callable

QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"qv": QV, "all": ALL}
CASES = (("qv", 8, 128), ("all", 8, 128), ("qv", 16, 256))
"""Targets, rows, tokens a row. The last is the large step, where the base model's products are everything; there ghost
clipping, nearly twice as slow, is left out."""

CLIP, NOISE_MULTIPLIER = 1.0, 1.0


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One adapted model and the rows of a step."""

    model: Any
    rows: tuple[TokenSequence, ...]
    pad_id: int

    @property
    def ids(self) -> Any:
        """Token ids as one tensor: rows of equal length."""
        return torch.tensor([row.ids for row in self.rows])


def adapted(name: str, targets: str, dtype: str = "float32", first_layer: int = 0) -> Any:
    """Return a model with a fresh rank-8 adapter whose B is not zero, so that every factor has a gradient."""
    frozen = models.load(name, dtype)
    section = LoraSection(rank=8, alpha=16.0, targets=TARGETS[targets], first_layer=first_layer)
    start = lora_start.initial(lora.spec_of(frozen, section), np.random.default_rng(0))
    for factors in start.layers.values():
        factors.b[:] = np.random.default_rng(1).normal(0, 1e-3, factors.b.shape)
    return lora.attach(frozen, start)


def make(name: str, targets: str, rows: int, tokens: int, dtype: str = "float32") -> Bench:
    """Return a bench with random rows of equal length."""
    rng = np.random.default_rng(2)
    ids = rng.integers(5, models.load(name, dtype).model.config.vocab_size, (rows, tokens))
    return Bench(
        model=adapted(name, targets, dtype),
        rows=tuple(TokenSequence(ids=tuple(row), loss_from=1) for row in ids.tolist()),
        pad_id=0,
    )


def optimizer_of(model: Any) -> Any:
    """Return the same optimizer for every variant."""
    return torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4, fused=True)


def peft_step(bench: Bench) -> Callable[[], None]:
    """The yardstick: peft's layers, transformers' own loss, no privacy."""
    optimizer, ids = optimizer_of(bench.model), bench.ids

    def step() -> None:
        bench.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def example_losses(model: Any, ids: Any) -> Any:
    """Return each row's mean loss from all logits at once, as one writes it with transformers. Shape: (B,)."""
    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(1)


def opacus_hooks_step(bench: Bench) -> Callable[[], None]:
    """Opacus' grad-sample hooks on peft's layers; clip, noise and step as its DPOptimizer takes them."""
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    optimizer, ids = optimizer_of(bench.model), bench.ids
    weights = [weight for weight in bench.model.parameters() if weight.requires_grad]
    bench.model.train()
    GradSampleHooks(bench.model, batch_first=True, loss_reduction="sum", strict=False)

    def step() -> None:
        example_losses(bench.model, ids).sum().backward()
        norms = torch.stack([weight.grad_sample.flatten(1).norm(2, dim=1) for weight in weights]).norm(2, dim=0)
        scales = (CLIP / (norms + 1e-6)).clamp(max=1.0)
        for weight in weights:
            total = torch.einsum("i,i...", scales, weight.grad_sample)
            weight.grad = (total + torch.normal(0, NOISE_MULTIPLIER * CLIP, total.shape)) / len(ids)
            weight.grad_sample = None
        optimizer.step()
        optimizer.zero_grad()

    return step


def opacus_ghost_step(bench: Bench) -> Callable[[], None]:
    """Opacus' ghost clipping: norms from a first backward pass, the clipped sum from a second."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping

    optimizer, ids = optimizer_of(bench.model), bench.ids
    weights = [weight for weight in bench.model.parameters() if weight.requires_grad]
    bench.model.train()
    hooks: Any = GradSampleHooksFastGradientClipping(
        bench.model, batch_first=True, loss_reduction="sum", strict=False, max_grad_norm=CLIP, use_ghost_clipping=True
    )

    def step() -> None:
        losses = example_losses(bench.model, ids)
        losses.sum().backward(retain_graph=True)
        optimizer.zero_grad()
        scales = hooks.get_clipping_coef()
        hooks.disable_hooks()
        (scales * losses).sum().backward()
        hooks.enable_hooks()
        for weight in weights:
            weight.grad = (weight.grad + torch.normal(0, NOISE_MULTIPLIER * CLIP, weight.shape)) / len(ids)
        optimizer.step()
        optimizer.zero_grad()

    return step


def own_plain_step(bench: Bench) -> Callable[[], None]:
    """Our layers and loss without clip and noise: gradients are summed as they are formed."""
    optimizer = optimizer_of(bench.model)
    tokens = sum(len(row.ids) for row in bench.rows)

    def sink(layer: Any, x_BTI: Any, low_BTr: Any, u_BTr: Any, slope_BTO: Any, *_: Any) -> None:
        layer.a.grad = (u_BTr.flatten(0, 1).t() @ x_BTI.flatten(0, 1)).float()
        layer.b.grad = (slope_BTO.flatten(0, 1).t() @ low_BTr.flatten(0, 1)).float()

    def step() -> None:
        with lora_linear.fused(bench.model, sink):
            for batch in sequences.isolated_batches(bench.rows, max_batch_tokens=tokens, pad_id=bench.pad_id):
                sequences.example_losses(bench.model, batch).mean().backward()
        optimizer.step()

    return step


def own_dp_step(bench: Bench) -> Callable[[], None]:
    """Ours, exactly what `clients.dp_steps` does in a step, production noise included."""
    optimizer, noise = optimizer_of(bench.model), SecureNoise()
    tokens = sum(len(row.ids) for row in bench.rows)

    def step() -> None:
        summed = per_example.clipped_sum(
            bench.model,
            bench.rows,
            clip_norm=gaussian.usable_clip(CLIP),
            max_batch_tokens=tokens,
            pad_id=bench.pad_id,
        )
        noisy = gaussian.release(summed.tensors, clip_norm=CLIP, noise_multiplier=NOISE_MULTIPLIER, noise=noise)
        for weight, total in zip(per_example.trained(bench.model).values(), noisy, strict=True):
            weight.grad = torch.from_numpy((total / len(bench.rows)).astype(np.float32))
        optimizer.step()

    return step


VARIANTS: dict[str, Callable[[Bench], Callable[[], None]]] = {
    "peft": peft_step,
    "opacus_hooks": opacus_hooks_step,
    "opacus_ghost": opacus_ghost_step,
    "own_plain": own_plain_step,
    "own_dp": own_dp_step,
}


def interleaved(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Return CPU seconds of each variant, taken in turn, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if turn:
                seconds[name].append(time.process_time() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Return median, lowest and highest of the ratios turn by turn."""
    ratios = np.array(seconds[name]) / np.array(seconds[to])
    return {"median": round(float(np.median(ratios)), 4), "low": round(ratios.min(), 4), "high": round(ratios.max(), 4)}


def gemm_peak(dtype: Any, size: int = 1024) -> float:
    """Return the best GFLOP/s of one thread on square products."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = math.inf
    for _ in range(12):
        began = time.process_time()
        left @ right
        best = min(best, time.process_time() - began)
    return 2 * size**3 / best / 1e9


def flops(step: Callable[[], None]) -> float:
    """Return the floating point operations in matrix products of one step, counted as they are dispatched."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def step_part(model: str, repeats: int) -> dict[str, Any]:
    """Return ratios of every case, and how much of the machine's peak our step reaches."""
    peak = {name: gemm_peak(getattr(torch, name)) for name in ("float32", "bfloat16")}
    found: dict[str, Any] = {"gemm_peak_gflops": {name: round(value, 1) for name, value in peak.items()}, "cases": {}}
    for targets, rows, tokens in CASES:
        chosen = [name for name in VARIANTS if rows * tokens <= 1024 or name != "opacus_ghost"]  # noqa: PLR2004
        steps = {name: VARIANTS[name](make(model, targets, rows, tokens)) for name in chosen}
        seconds = interleaved(steps, repeats)
        mine = float(np.median(seconds["own_dp"]))
        work = flops(steps["own_dp"])
        case = {f"{name}_over_peft": ratio(seconds, name, "peft") for name in chosen if name != "peft"}
        case["own_dp_over_own_plain"] = ratio(seconds, "own_dp", "own_plain")
        case["peft_s"] = round(float(np.median(seconds["peft"])), 3)
        case["own_dp_tokens_per_s"] = round(rows * tokens / mine, 1)
        case["own_dp_gflops"] = round(work / mine / 1e9, 1)
        case["own_dp_share_of_peak"] = round(work / mine / 1e9 / peak["float32"], 3)
        found["cases"][f"{targets} {rows}x{tokens}"] = case
        print(f"{targets} {rows}x{tokens}: {json.dumps(case)}", flush=True)
    found["bfloat16"] = _bfloat16(model, repeats, peak["bfloat16"])
    print(f"bfloat16 {json.dumps(found['bfloat16'])}", flush=True)
    return found


def _bfloat16(model: str, repeats: int, peak: float) -> dict[str, Any]:
    """Return our step in bfloat16 against peft's in float32 and in bfloat16, all linear maps, 8 rows of 128."""
    steps = {
        "peft": peft_step(make(model, "all", 8, 128)),
        "peft_bf16": peft_step(make(model, "all", 8, 128, "bfloat16")),
        "own_dp_bf16": own_dp_step(make(model, "all", 8, 128, "bfloat16")),
    }
    seconds = interleaved(steps, repeats)
    mine, work = float(np.median(seconds["own_dp_bf16"])), flops(steps["own_dp_bf16"])
    return {
        "own_dp_bf16_over_peft": ratio(seconds, "own_dp_bf16", "peft"),
        "own_dp_bf16_over_peft_bf16": ratio(seconds, "own_dp_bf16", "peft_bf16"),
        "own_dp_tokens_per_s": round(1024 / mine, 1),
        "own_dp_gflops": round(work / mine / 1e9, 1),
        "own_dp_share_of_peak": round(work / mine / 1e9 / peak, 3),
    }


def memory_part(model: str) -> dict[str, Any]:
    """Return the peak resident megabytes of each variant after two steps, each in a process of its own."""
    found: dict[str, Any] = {}
    for targets, rows, tokens in CASES[:2]:  # the large ones say the same and take a quarter of an hour
        case: dict[str, int] = {}
        for name in VARIANTS:
            asked = ["--model", model, "--one", f"{name},{targets},{rows},{tokens}"]
            command = [sys.executable, __file__, *asked]
            said = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, check=True).stdout
            case[name] = int(said.splitlines()[-1])
        found[f"{targets} {rows}x{tokens}"] = case
        print(f"peak MB {targets} {rows}x{tokens}: {json.dumps(case)}", flush=True)
    return found


def one(model: str, which: str) -> None:
    """Take two steps of one variant and print the peak resident size of this process in megabytes."""
    name, targets, rows, tokens = which.split(",")
    step = VARIANTS[name](make(model, targets, int(rows), int(tokens)))
    step()
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def headline(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the figures under their agreed names."""
    line: dict[str, Any] = {}
    if "step" in parts:
        cases = parts["step"]["cases"]
        line |= {
            "dp_over_peft_all": cases["all 8x128"]["own_dp_over_peft"]["median"],
            "dp_over_peft_qv": cases["qv 8x128"]["own_dp_over_peft"]["median"],
            "dp_over_peft_large": cases["qv 16x256"]["own_dp_over_peft"]["median"],
            "dp_over_own_nonprivate": cases["all 8x128"]["own_dp_over_own_plain"]["median"],
            "opacus_hooks_over_peft_all": cases["all 8x128"]["opacus_hooks_over_peft"]["median"],
            "opacus_ghost_over_peft_all": cases["all 8x128"]["opacus_ghost_over_peft"]["median"],
        }
    if "memory" in parts:
        peaks = parts["memory"]["all 8x128"]
        line |= {"peak_mb_dp": peaks["own_dp"], "peak_mb_opacus": peaks["opacus_hooks"], "peak_mb_peft": peaks["peft"]}
    if "round" in parts:
        line["site_round_speedup"] = parts["round"]["speedup"]["median"]
    return line


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", default="step,memory,round")
    parser.add_argument("--one", default="", help="internal: one variant, for its peak memory")
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        one(arguments.model, arguments.one)
        return 0
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "step": lambda: step_part(arguments.model, arguments.repeats),
        "memory": lambda: memory_part(arguments.model),
        "round": lambda: round_ladder.run(lambda **options: adapted(arguments.model, **options), arguments.repeats),
    }
    parts = {name: runs[name]() for name in arguments.parts.split(",")}
    line = {"kind": "dp_step", "model": arguments.model, "repeats": arguments.repeats, **headline(parts), **parts}
    if not arguments.no_record:
        line = record.append(line)
    print(json.dumps(line, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
