"""Is it really DP? The layers on this tree, many one-run audits, and mistakes planted in copies of the tree.

    python benchmarks/audit.py              everything: layers, one-run audits, control and mutants; about 15 minutes
    python benchmarks/audit.py --one-run    the one-run audits alone; the last line is their figures
    python benchmarks/audit.py --only TEXT  only the mutants whose name contains TEXT, and nothing is recorded

A mutant is killed by the first layer that fails on it, and it must be the layer that `mutants.toml` names: a layer that
kills for another reason is not the proof it is taken for. One that nobody kills, or that no longer applies, ends the
audit with exit code 1, and so does a layer that fails on the tree as it is.

The last line is one JSON object; a complete run appends it to `results.jsonl` as kind "audit".
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = ROOT / "benchmarks" / "mutants.toml"
LAYERS: dict[str, tuple[str, ...]] = {
    "replay": ("tests/privacy/test_layer1_replay.py", "tests/privacy/test_zeroth_order.py"),
    "round": ("tests/privacy/test_layer1_round.py",),
    "noise": ("tests/privacy/test_gaussian.py", "tests/privacy/test_layer2_noise.py"),
    "one-run": ("tests/privacy/test_layer3_one_run.py",),
    "walls": (
        "tests/privacy/test_noise.py",
        "tests/privacy/test_ledger.py",
        "tests/unit/test_local_round.py",
        "tests/privacy/test_walls.py",
    ),
}
"""Layer 1 is replay and round, layer 2 noise, layer 3 one-run; in the order in which they look at a mutant."""

APART: dict[str, tuple[str, ...]] = {
    "mechanisms": (
        "tests/unit/test_private_decoding.py",
        "tests/unit/test_pe_votes.py",
        "tests/privacy/test_epsvec.py",
        "tests/privacy/test_votes.py",
        "tests/privacy/test_survey.py",
        "tests/privacy/test_joint_decoding.py",
        "tests/contracts/test_writing_learners.py",
        "tests/privacy/test_private_decoding_audit.py",
    ),
}
"""What bounds the other releases: votes, vectors, counts, and texts drawn token by token. Their mutants are judged by
these files alone."""

NOT_FOR_MUTANTS = "not caught and not bfloat16 and not dp_ffa_lora and not dp_rolora and not second"
"""Left out where a mutant runs: twins, which test the tests, and the second type, pool and likes of one engine."""

ACCIDENTS = ("NameError", "SyntaxError", "ImportError", "ModuleNotFoundError", "AttributeError", "TypeError")
"""A mutant that dies of one of these was written wrongly; it shows nothing."""

CLAIMED, DELTA, CANARIES, RANK = (0.5, 1.0, 2.0), 1e-5, 2000, 32
HEALTHY_RUNS = {0.5: 7, 1.0: 7, 2.0: 6}
FAULTY_RUNS = 10
JOBS = 2
TIMEOUT_S = 900
"""For one run of all layers, which take two minutes of a core; a busy machine may need much longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One exact replacement."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A mistake and the layer that must see it; no edits and no layer for the control."""

    name: str
    layer: str
    edits: tuple[Edit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Who killed a mutant: `layer` and `test` are empty when nobody did. `reason`: the first line of its complaint."""

    mutant: Mutant
    layer: str
    test: str
    reason: str
    seconds: float

    @property
    def right(self) -> bool:
        """Whether the layer that must have killed it did, by an assertion and not by accident."""
        return self.layer == self.mutant.layer and not self.reason.startswith(ACCIDENTS)


CONTROL = Mutant(name="control: no edit", layer="", edits=())


def read_mutants() -> list[Mutant]:
    """Return the mutants. Raises: SystemExit naming every edit that does not match exactly once."""
    tree = tomllib.loads(MUTANTS.read_text(encoding="utf-8"))
    mutants = [
        Mutant(name=one["name"], layer=one["layer"], edits=tuple(Edit(**edit) for edit in one["edits"]))
        for one in tree["mutant"]
    ]
    problems = [
        f"{mutant.name}: {edit.file} holds {count} times {edit.old!r}; it must be once"
        for mutant in mutants
        for edit in mutant.edits
        if (count := (ROOT / edit.file).read_text(encoding="utf-8").count(edit.old)) != 1
    ]
    known = LAYERS | APART
    problems += [f"{mutant.name}: no layer {mutant.layer!r}" for mutant in mutants if mutant.layer not in known]
    if problems:
        raise SystemExit("mutants that no longer apply:\n" + "\n".join(problems))
    return mutants


def copy_tree(target: Path) -> None:
    """Copy what git tracks or would track, as it lies in the working tree."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)


def judge(mutant: Mutant, copy: Path) -> Verdict:
    """Apply a mutant to a copy of the tree, run the layers in order until one fails, and take the edits back."""
    touched = {edit.file: (copy / edit.file).read_text(encoding="utf-8") for edit in mutant.edits}
    began = time.monotonic()
    try:
        for edit in mutant.edits:
            path = copy / edit.file
            path.write_text(path.read_text(encoding="utf-8").replace(edit.old, edit.new), encoding="utf-8")
        layers = {mutant.layer: APART[mutant.layer]} if mutant.layer in APART else LAYERS
        output, code = run_layers(copy, _files(layers), "-x", "-k", NOT_FOR_MUTANTS)
    finally:
        for file, text in touched.items():
            (copy / file).write_text(text, encoding="utf-8")
    seconds = time.monotonic() - began
    failed = re.search(r"^FAILED ([^:]+)::(.+?)(?: - (.*))?$", output, re.MULTILINE)
    if failed is None:
        trouble = "" if code == 0 else f"TypeError: exit code {code} without a failed test: {output[-400:]}"
        return Verdict(mutant=mutant, layer="", test="", reason=trouble, seconds=seconds)
    layer = next(name for name, files in layers.items() if failed[1] in files)
    return Verdict(mutant=mutant, layer=layer, test=failed[2], reason=failed[3] or "", seconds=seconds)


def _files(layers: dict[str, tuple[str, ...]]) -> list[str]:
    return [file for files in layers.values() for file in files]


def run_layers(tree: Path, files: list[str], *options: str) -> tuple[str, int]:
    """Run pytest on a tree; return its output and exit code. No bytecode is kept: edits come within one second."""
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-q",
        "-rf",
        "-p",
        "no:cacheprovider",
        "--tb=line",
        *options,
        *files,
    ]
    environment = {**os.environ, "COLUMNS": "400"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT_S} s", -1
    return done.stdout + done.stderr, done.returncode


def one_run_audits() -> dict[str, Any]:
    """Return the figures of all one-run audits, each on a release of the real learner; see `passed` for the bars."""
    from fl_app import models
    from fl_app.privacy.calibrate import noise_multiplier
    from fl_app.seeds import stream
    from simulations.attacks import canaries
    from simulations.attacks.one_run import OneRun

    found = canaries.make(models.load("tiny-random", "float32"), stream(0, "canaries"), count=CANARIES, rank=RANK)
    section = OneRun(kind="one_run", delta=DELTA)
    attack = section.build()
    faults = {**canaries.FAULTS, "noise / 2": canaries.Fault(noise=0.5)}  # the last is beyond this many canaries

    def bound(epsilon: float, run: int, fault: str) -> tuple[float, float, float]:
        noise = noise_multiplier(
            [], sample_rate=1.0, steps=1, rounds=1, clip_norm=1.0, unit="record", epsilon=epsilon, delta=DELTA,
            floor=0.5, ceiling=20.0,
        )  # fmt: skip
        rng = stream(run, "audit", fault, str(epsilon))
        kind = faults.get(fault, canaries.NO_FAULT)
        result = attack(canaries.evidence(found, rng, noise_multiplier=noise, fault=kind), rng)
        return result.lower_bound, result.accuracy, result.ceiling

    healthy = {claim: [bound(claim, run, "") for run in range(runs)] for claim, runs in HEALTHY_RUNS.items()}
    faulty = {fault: [bound(CLAIMED[-1], run, fault) for run in range(FAULTY_RUNS)] for fault in faults}
    claims = {
        str(claim): {
            "runs": len(results),
            "lower_bound_mean": round(sum(low for low, _, _ in results) / len(results), 3),
            "lower_bound_max": round(max(low for low, _, _ in results), 3),
            "accuracy_mean": round(sum(right for _, right, _ in results) / len(results), 3),
        }
        for claim, results in healthy.items()
    }
    power = {
        fault: {
            "caught": sum(low > CLAIMED[-1] for low, _, _ in results),
            "runs": len(results),
            "lower_bound_mean": round(sum(low for low, _, _ in results) / len(results), 3),
        }
        for fault, results in faulty.items()
    }
    within = all(low <= claim for claim, results in healthy.items() for low, _, _ in results)
    return {
        "claimed": CLAIMED[-1],
        "lower_bound": claims[str(CLAIMED[-1])]["lower_bound_mean"],
        "ceiling": round(healthy[CLAIMED[-1]][0][2], 3),
        "power": power,
        "by_claim": claims,
        "passed": within and all(power[fault]["caught"] == FAULTY_RUNS for fault in canaries.FAULTS),
        "setting": {
            "canaries": CANARIES,
            "guesses": list(section.guesses),
            "significance": section.significance,
            "delta": DELTA,
            "coordinates": int(found.gradients.shape[1]),
            "view": "every noised sum as the optimizer receives it; add or remove one record; T = 1, q = 1",
        },
    }


def show(verdicts: list[Verdict]) -> None:
    """Print who killed whom."""
    width = max(len(verdict.mutant.name) for verdict in verdicts)
    for verdict in verdicts:
        killer = f"{verdict.layer:8} {verdict.test}" if verdict.layer else "nobody"
        note = "" if verdict.right else f"   <- expected {verdict.mutant.layer or 'nobody'}; {verdict.reason[:300]}"
        print(f"{verdict.mutant.name:{width}}  {verdict.seconds:5.0f} s  {killer}{note}")


def judge_all(mutants: list[Mutant], copies: list[Path]) -> list[Verdict]:
    """Judge the mutants, each on a copy of the tree that no other is using."""
    free = list(copies)

    def on_a_copy(mutant: Mutant) -> Verdict:
        copy = free.pop()
        try:
            return judge(mutant, copy)
        finally:
            free.append(copy)

    with concurrent.futures.ThreadPoolExecutor(len(copies)) as pool:
        return list(pool.map(on_a_copy, mutants))


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-run", action="store_true")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.one_run:
        figures = one_run_audits()
        print(json.dumps(figures, sort_keys=True))
        return 0 if figures["passed"] else 1

    mutants = [mutant for mutant in read_mutants() if arguments.only in mutant.name]
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / str(job) for job in range(JOBS)]
        for copy in copies:  # of one moment: the tree may change while this runs
            copy_tree(copy)
        if not arguments.only:
            return full(mutants, copies)
        verdicts = judge_all(mutants, copies)
    show(verdicts)
    return 0 if all(verdict.right for verdict in verdicts) else 1


def full(mutants: list[Mutant], copies: list[Path]) -> int:
    """Run everything, record it, and return the exit code."""
    import record  # beside this file; `benchmarks` is also a package that Opacus installs

    began, commit = time.monotonic(), record.commit()
    output, code = run_layers(copies[0], _files(LAYERS | APART), "-n", str(JOBS), "--dist", "loadfile")
    print(f"the layers on this tree, in full: {output.strip().splitlines()[-1]}", flush=True)
    if code != 0:
        print(output)
        return 1
    figures = one_run_audits()
    control, *verdicts = judge_all([CONTROL, *mutants], copies)
    show([control, *verdicts])
    killed = sum(verdict.right for verdict in verdicts)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    line = {
        **figures,
        "kind": "audit",
        "commit": commit,
        "mutants": len(mutants),
        "mutants_killed": killed,
        "control_passes": control.right,
        "verdicts": [{"mutant": v.mutant.name, "layer": v.layer, "test": v.test, "right": v.right} for v in verdicts],
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(sum(one.ru_utime + one.ru_stime for one in usage)),
    }
    print(json.dumps(record.append(line), sort_keys=True))
    return 0 if killed == len(mutants) and control.right and figures["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
