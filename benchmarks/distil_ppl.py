"""DistilDP's perplexity table in small: who teaches a small student best under epsilon 2, on finance headlines.

    python benchmarks/distil_ppl.py [--seeds 0 1 2] [--cells NAME ...] [--work DIR] [--data DIR]

Teacher: SmolLM2-135M-Instruct, 30 blocks. Student: ten of its blocks, healed as a whole on public questions and answers
that hold no headline. Private: 3000 headlines (all of the source `sentfin` but its test part); test: its 250 others.
Every private learner moves LoRA factors under the same steps, rate and clip; epsilon is PLD's, per record. What the
DP teacher writes, and how often the student reads it, costs no privacy. Settings were chosen on seed 100, not
shown, but on these very test headlines: the figures lean towards what they were chosen for.

    student          as healed                           non_private   plain LoRA on the private headlines
    dp_sgd           DP-LoRA at epsilon 2                teacher, dp_teacher   as it comes; DP-LoRA at epsilon 2
    distil_dp_hard   LoRA on the DP teacher's text       distil_dp_soft   the same, with its distributions
    dpkd             teacher and student at epsilon 1    dp_opd   public teacher, own words, student at epsilon 2

Perplexity twice: over the test headlines joined by blank lines in windows of 128, as DistilDP's script does, and over
single headlines after the prefix that learners see. Not the paper's models or corpora: the order is what is compared.
Finished cells stand in `cells.jsonl` of the work directory and are not computed again; healing is not in their time.

Source: DistilDP (2403.00932) and DP-OPD (2604.04461), tables at epsilon 2; sliding windows as in transformers' guide.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import record
import torch

from clients.learners.dp_distil import DpDistil, TeacherSection
from clients.learners.dp_lora import DpLora
from clients.learners.plain_lora import PlainLora
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app import inference, lora, lora_start, models, peft_files, sequences
from fl_app.config import LoraSection
from fl_app.distillation import DistilLoss, Teacher, Weights
from fl_app.metrics.interval import bootstrap
from fl_app.privacy import calibrate
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from simulations.corpora import read_corpus
from strategies.lab import Lab
from strategies.tuners.sft import Sft
from strategies.tuning import Tuning

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

    Cell = Callable[["Bench", int], dict[str, Any]]

DATA = record.ROOT.parent / "shared" / "data"
SETTING: dict[str, Any] = {
    "prefix": "Financial news headline:\n",
    "teacher": "smollm2-135m-instruct",
    "blocks": [0, 1, 2, 3, 4, 5, 20, 27, 28, 29],
    "heal": {"texts": 1200, "max_tokens": 40, "batch": 16, "learning_rate": 1e-3},
    "rank": 8,
    "first_layer": {"student": 4, "teacher": 20},
    "sample_rate": 0.04,
    "expected_batch": 120,
    "steps": 40,
    "clip_norm": 1.0,
    "learning_rate": 4e-3,
    "epsilon": 2.0,
    "delta": 1e-4,
    "max_tokens": 32,
    "drafts": 2000,
    "epochs": 3,
    "soft_weight": 0.4,
    "window": 128,
}
PREFIX: str = SETTING["prefix"]


def sliding_perplexity(model: Any, ids: Sequence[int], *, window: int, stride: int) -> float:
    """Return exp of the mean loss over all tokens but the first: the sliding evaluation of transformers' guide.

    Where windows overlap every token counts once; with stride = window, as here, the first of each does not count.
    """
    total, count, told = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        part = torch.tensor([ids[begin:end]])
        with torch.inference_mode():
            logits = model(input_ids=part).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="none")
        new = losses[max(0, len(losses) - (end - told)) :] if told else losses
        total, count, told = total + float(new.sum()), count + len(new), end
        if end == len(ids):
            break
    return math.exp(total / count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Headlines that nobody but a private learner may see, those to test on, and public text without any."""

    private: list[str]
    test: list[str]
    public: list[str]


def read_texts(data: Path) -> Texts:
    """Return the three corpora of this comparison."""

    def headlines(name: str) -> list[str]:
        rows = read_corpus(str(data / "finance" / f"{name}.jsonl"), join_input="input_only")
        return [row.instruction for row in rows if row.columns["source"] == "sentfin"]

    test = headlines("eval")
    private = [one for one in (*headlines("private"), *headlines("public")) if one not in set(test)]
    rows = [
        *read_corpus(str(data / "medical" / "public.jsonl"), join_input="input_only"),
        *read_corpus(str(data / "finance" / "public.jsonl"), join_input="input_only"),
    ]
    public = [f"{r.instruction} {r.output}" for r in rows if r.columns["source"] in {"medquad", "ask-cfpb", "tat-qa"}]
    return Texts(private=private, test=test, public=public)


class Bench:
    """Models, texts and adapters of the comparison, in one work directory."""

    def __init__(self, work: Path, data: Path) -> None:
        self.work, self.student_path = work, work / "student"
        self.texts = read_texts(data)
        self.teacher = models.load(SETTING["teacher"], "bfloat16")
        self._make_student()
        self.student = models.load(str(self.student_path), "bfloat16")

    def start(self, which: str, frozen: FrozenModel, seed: int) -> Adapter:
        """Return a fresh adapter of the student or the teacher."""
        targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        first = SETTING["first_layer"][which]
        section = LoraSection(rank=SETTING["rank"], alpha=2.0 * SETTING["rank"], targets=targets, first_layer=first)
        return lora_start.initial(lora.spec_of(frozen, section), stream(seed, "distil ppl", which))

    def saved(self, name: str, seed: int) -> Path:
        """Return the folder of an adapter of a finished cell."""
        return self.work / f"{name}-{seed}"

    def load(self, name: str, seed: int, frozen: FrozenModel) -> Adapter:
        """Return the adapter of a finished cell."""
        return peft_files.load(self.saved(name, seed), base=frozen.resolved.sha256)

    def score(self, model: Any) -> dict[str, Any]:
        """Return both perplexities of the test headlines."""
        tokenizer = self.teacher.tokenizer
        ids = tokenizer("\n\n".join(self.texts.test), add_special_tokens=False)["input_ids"]
        window = SETTING["window"]
        rows = [sequences.encode(tokenizer, PREFIX, f" {one}", max_tokens=64, end=False) for one in self.texts.test]
        totals = np.zeros(len(rows))
        counts = np.array([len(one.ids) - one.loss_from for one in rows])
        with torch.inference_mode():
            for batch in sequences.micro_batches(rows, max_batch_tokens=512, pad_id=0):
                totals[list(batch.rows)] = sequences.example_losses(model, batch).numpy()
        totals *= counts

        def perplexity(items: Any) -> float:
            return math.exp(totals[items].sum() / counts[items].sum())

        interval = bootstrap(perplexity, count=len(rows), rng=stream(0, "distil ppl", "interval"))
        return {
            "stream": sliding_perplexity(model, ids, window=window, stride=window),
            "headline": perplexity(np.arange(len(rows))),
            "low": interval.low,
            "high": interval.high,
        }

    def _make_student(self) -> None:
        """Write ten of the teacher's blocks, healed on public text as a whole, unless they are there already."""
        from transformers import AutoModelForCausalLM

        if (self.student_path / "config.json").is_file():
            return
        heal = SETTING["heal"]
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.teacher.resolved.path, dtype=torch.float32, attn_implementation="eager"
        )
        chosen = [model.model.layers[n] for n in SETTING["blocks"]]
        for number, block in enumerate(chosen):
            block.self_attn.layer_idx = number
        model.model.layers = torch.nn.ModuleList(chosen)
        model.config.num_hidden_layers = len(chosen)
        model.get_input_embeddings().weight.requires_grad_(requires_grad=False)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=heal["learning_rate"], weight_decay=0.0)
        order = stream(0, "distil ppl", "heal").permutation(len(self.texts.public))[: heal["texts"]]
        encoded = [
            sequences.encode(self.teacher.tokenizer, "", self.texts.public[i], max_tokens=heal["max_tokens"])
            for i in order
        ]
        steps = [encoded[n : n + heal["batch"]] for n in range(0, len(encoded), heal["batch"])]
        for number, chunk in enumerate(steps):
            (batch,) = sequences.micro_batches(chunk, max_batch_tokens=1 << 20, pad_id=0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = sequences.scored(model, batch)
                logits = model.get_output_embeddings()(found.hidden_ND)
            loss = torch.nn.functional.cross_entropy(logits.float(), found.targets_N)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = heal["learning_rate"] * min(1.0, (number + 1) / 8) * (1 - 0.9 * number / len(steps))
            optimizer.step()
            optimizer.zero_grad()
            if number % 10 == 0:
                print(f"healing: step {number + 1} of {len(steps)}, loss {float(loss.detach()):.3f}", flush=True)
        model.to(torch.bfloat16).save_pretrained(self.student_path)
        self.teacher.tokenizer.save_pretrained(self.student_path)


def round_at(bench: Bench, which: str, seed: int, name: str, section: Any, epsilon: float) -> dict[str, Any]:
    """Let a learner run one round on all private headlines, keep its adapter, and return what it cost and scores."""
    frozen = bench.teacher if which == "teacher" else bench.student
    told = PublicConstants(
        sample_rate=SETTING["sample_rate"],
        expected_batch=SETTING["expected_batch"],
        max_tokens=SETTING["max_tokens"],
        max_rows_per_unit=1,
        unit="record",
    )
    multiplier = math.inf
    learner = section.build(1)
    if learner.private:
        multiplier = calibrate.noise_multiplier(
            [],
            sample_rate=told.sample_rate,
            steps=section.steps,
            rounds=1,
            clip_norm=section.clip_norm,
            unit="record",
            epsilon=epsilon,
            delta=SETTING["delta"],
            floor=0.3,
            ceiling=64.0,
        )
    rows = PrivateRows(
        [
            PrivateRow(instruction=f" {text}", output="", code="news", unit=str(n))
            for n, text in enumerate(bench.texts.private)
        ]
    )
    noise = SimulatedNoise(stream(seed, "distil ppl", name, "noise"))
    desk = Workbench(model=frozen, codes={"news": PREFIX}, noise=noise, system="")
    start = bench.start(which, frozen, seed)
    found = learner(rows, start, learner.announce(told, multiplier), told, desk).adapter
    peft_files.save(found, bench.saved(name, seed), base_name=which)
    shown = {"epsilon": epsilon, "noise_multiplier": multiplier} if learner.private else {}
    return {**shown, **bench.score(lora.attach(frozen, found))}


def steps(section: Any, **how: Any) -> Any:
    """Return a learner's section under the steps that all have in common."""
    common = {key: SETTING[key] for key in ("steps", "learning_rate")}
    clip = {} if section is PlainLora else {"clip_norm": SETTING["clip_norm"]}
    return section(**common, **clip, micro_batch_tokens=512, **how)


def drafts(bench: Bench, seed: int) -> list[str]:
    """Return headlines that the DP teacher has written after the public prefix, written once."""
    path = bench.work / f"drafts-{seed}.jsonl"
    if not path.is_file():
        model = lora.attach(bench.teacher, bench.load("dp_teacher", seed, bench.teacher))
        written: list[str] = []
        for part in range(0, SETTING["drafts"], 40):
            rng = stream(seed, "distil ppl", "drafts", part)
            count = min(40, SETTING["drafts"] - part)
            written += inference.generate(
                model,
                bench.teacher.tokenizer,
                [PREFIX] * count,
                max_new_tokens=24,
                temperature=1.0,
                top_p=0.95,
                rng=rng,
            )
        path.write_text("".join(json.dumps(one) + "\n" for one in written), encoding="utf-8")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def distilled(bench: Bench, seed: int, soft_weight: float) -> dict[str, Any]:
    """Tune the student on the DP teacher's headlines, with its distributions at `soft_weight`: no privacy is spent."""
    tokenizer = bench.student.tokenizer
    texts = [one.strip().split("\n")[0] for one in drafts(bench, seed)]
    examples = [
        sequences.encode(tokenizer, PREFIX, f" {one}", max_tokens=SETTING["max_tokens"]) for one in texts if one
    ]
    section = Sft(
        kind="sft", epochs=SETTING["epochs"], learning_rate=SETTING["learning_rate"], batch_size=32, max_tokens=32
    )
    losses = None
    if soft_weight:
        teacher = Teacher(lora.attach(bench.teacher, bench.load("dp_teacher", seed, bench.teacher)))
        teacher.keep(examples)
        told = Weights(hard=1 - soft_weight, soft=soft_weight)
        losses = DistilLoss(teacher=teacher, weigh=lambda _: told)
    lab = Lab(
        local=bench.student,
        professional=bench.teacher,
        professional_adapter=None,
        professional_name="teacher",
        system="",
        threads=1,
        batch_rows=32,
        public_words=frozenset(),
    )
    tuning = Tuning(section=section, lab=lab, losses=losses)
    start = bench.start("student", bench.student, seed)
    found = tuning.fit(start, examples, stream(seed, "distil ppl", "tune"))
    lab.close()
    return {"epsilon": SETTING["epsilon"], "drafts": len(examples), **bench.score(lora.attach(bench.student, found))}


def taught(bench: Bench, seed: int, *, on_policy: bool) -> dict[str, Any]:
    """Let the student learn under DP by a teacher: the public one on its own words, or a DP one of half the budget."""
    where = SETTING["teacher"]
    if on_policy:
        section = steps(DpDistil, kind="dp_distil", teacher=TeacherSection(model=where), on_policy=True)
        return round_at(bench, "student", seed, "dp_opd", section, SETTING["epsilon"])
    folder = str(bench.saved("half_teacher", seed))
    teacher = TeacherSection(model=where, adapter=folder)
    section = steps(DpDistil, kind="dp_distil", teacher=teacher, soft_weight=SETTING["soft_weight"])
    return {**round_at(bench, "student", seed, "dpkd", section, SETTING["epsilon"] / 2), "epsilon": SETTING["epsilon"]}


CELLS: dict[str, Cell] = {
    "student": lambda bench, _: bench.score(bench.student.model),
    "teacher": lambda bench, _: bench.score(bench.teacher.model),
    "non_private": lambda bench, seed: round_at(
        bench, "student", seed, "non_private", steps(PlainLora, kind="plain_lora"), math.inf
    ),
    "dp_sgd": lambda bench, seed: round_at(
        bench, "student", seed, "dp_sgd", steps(DpLora, kind="dp_lora"), SETTING["epsilon"]
    ),
    "dp_teacher": lambda bench, seed: round_at(
        bench, "teacher", seed, "dp_teacher", steps(DpLora, kind="dp_lora"), SETTING["epsilon"]
    ),
    "distil_dp_hard": lambda bench, seed: distilled(bench, seed, 0.0),
    "distil_dp_soft": lambda bench, seed: distilled(bench, seed, SETTING["soft_weight"]),
    "dp_opd": lambda bench, seed: taught(bench, seed, on_policy=True),
    "half_teacher": lambda bench, seed: round_at(
        bench, "teacher", seed, "half_teacher", steps(DpLora, kind="dp_lora"), SETTING["epsilon"] / 2
    ),
    "dpkd": lambda bench, seed: taught(bench, seed, on_policy=False),
}
"""In this order: a teacher's cell comes before those that learn from it."""


def run(work: Path, data: Path, seeds: Sequence[int], cells: Sequence[str]) -> dict[str, Any]:
    """Compute these cells where they are not there, and append one line over all that are. Returns that line."""
    work.mkdir(parents=True, exist_ok=True)
    began, path = record.commit(), work / "cells.jsonl"
    done = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    bench = Bench(work, data)
    for seed in seeds:
        for name in cells:
            if any((one["cell"], one["seed"]) == (name, seed) for one in done):
                continue
            clock, cpu = time.monotonic(), time.process_time()
            line = {"cell": name, "seed": seed, "commit": began, **CELLS[name](bench, seed)}
            line |= {"seconds": round(time.monotonic() - clock), "cpu_seconds": round(time.process_time() - cpu)}
            done.append(line)
            with path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    texts = {name: len(value) for name, value in dataclasses.asdict(bench.texts).items()}
    return record.append({"kind": "distil_ppl", "commit": began, "setting": SETTING, "texts": texts, "cells": done})


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    key = hashlib.sha256(json.dumps(SETTING, sort_keys=True).encode()).hexdigest()[:12]
    parser.add_argument("--work", type=Path, default=models.cache_root() / "distil_ppl" / key)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with finance/ and medical/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cells", choices=list(CELLS), nargs="+", default=list(CELLS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(arguments.work, arguments.data, arguments.seeds, arguments.cells)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
