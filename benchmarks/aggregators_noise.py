"""How much noise a merged product takes, by method: drawn, and by formula. The table's own shapes, and its aggregators.

    PYTHONPATH=. python benchmarks/aggregators_noise.py

K sites start from the same (a, b); to each number that a site trains a Gaussian of deviation t is added, as by one
noised step at equal noise multiplier, clip and batch. The energy is E |delta_W(merged) - delta_W(start)|^2 over all
layers, in units of (s t)^2, s = alpha / r. A row with a, a column with b, r the rank:

    factors averaged  (FedIT)         sum of  (d_out |a|^2 + d_in |b|^2) / K  +  t^2 r d_out d_in / K^2
    products averaged (FLoRA, FedEx)  sum of  (d_out |a|^2 + d_in |b|^2) / K  +  t^2 r d_out d_in / K
    b alone, orthonormal a (FFA)      sum of  d_out r / K
    cores, orthonormal a and b        sum of  r^2 / K                         (Fed-SB)

So the exact sum keeps more of the noise that two noisy factors make of each other than their means do. The published
formulas are those of one site: K = 1. AdamW divides by what it sees, so this is about what is released, not about steps
that adapt to it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import record
from aggregators import ALPHA, CORPORA, RANK, SITES
from cells import TARGETS

from fl_app import lora, lora_start, models
from fl_app.config import LoraSection
from fl_app.seeds import stream
from fl_app.types import Adapter, AdapterRelease, Broadcast, LoraFactors, Upload
from strategies import products
from strategies.aggregators.mean_factors import MeanFactors
from strategies.aggregators.residual import Residual
from strategies.stages import Setting

if TYPE_CHECKING:
    from fl_app.lora import LoraSpec
    from fl_app.types import Factor
    from strategies.stages import Aggregator

FACTORS, PRODUCTS = MeanFactors(kind="mean_factors"), Residual(kind="residual")
DRAWS = 40
DEVIATION = 0.02
"""t; about an entry of a, so that the term of t^2 shows. Not taken from a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A method: the factors that take noise, and how its uploads are summed. Every a is orthonormal."""

    name: str
    noisy: tuple[Factor, ...]
    sums: MeanFactors | Residual = FACTORS


CASES = (
    Case(name="factors averaged", noisy=("a", "b")),
    Case(name="products averaged", noisy=("a", "b"), sums=PRODUCTS),
    Case(name="b alone", noisy=("b",)),
    Case(name="cores", noisy=("core",)),
)


def started(spec: LoraSpec, rng: np.random.Generator) -> Adapter:
    """Return an adapter in the middle of training: b, or the core, is as large as a."""
    fresh = lora_start.initial(spec, rng, "orthonormal")
    layers: dict[str, LoraFactors] = {}
    for name, one in fresh.layers.items():
        told = {"core": np.eye(spec.rank, dtype=np.float32)} if one.core is not None else {}
        drawn = rng.standard_normal(one.b.shape)
        b = one.b if told else (drawn * np.linalg.norm(one.a) / np.linalg.norm(drawn)).astype(np.float32)
        layers[name] = LoraFactors(a=one.a, b=b, **told)
    return dataclasses.replace(fresh, layers=layers)


def noised(start: Adapter, noisy: tuple[Factor, ...], rng: np.random.Generator) -> Adapter:
    """Return the adapter with a Gaussian of deviation t on every number of the noisy factors."""
    layers: dict[str, LoraFactors] = {}
    for name, one in start.layers.items():
        moved: dict[str, Any] = {}
        for factor in noisy:
            values = getattr(one, factor)
            moved[factor] = (values + rng.normal(0, DEVIATION, values.shape)).astype(np.float32)
        layers[name] = dataclasses.replace(one, **moved)
    return dataclasses.replace(start, layers=layers)


def formula(case: Case, start: Adapter, sites: int) -> float:
    """Return the energy that the table above gives, in units of (s t)^2."""
    total = 0.0
    for one in start.layers.values():
        r, d_in = one.a.shape
        d_out = one.b.shape[0]
        a, b = (float(np.sum(np.square(part, dtype=np.float64))) for part in (one.a, one.b))
        match case.noisy:
            case ("a", "b"):
                share = sites if case.sums is PRODUCTS else sites**2
                total += (d_out * a + d_in * b) / sites + DEVIATION**2 * r * d_out * d_in / share
            case ("b",):
                total += d_out * a / sites
            case _:
                total += r**2 / sites
    return total


def energy(case: Case, start: Adapter, sites: int, rng: np.random.Generator) -> list[float]:
    """Return the energy of every draw, in units of (s t)^2, of what the method's own aggregator makes of K sites."""
    setting = Setting(run="noise", mode="simulation", seed=0, rounds=1, sites=sites, directory=Path())
    aggregator: Aggregator = case.sums.build(setting)
    broadcast = Broadcast(run="noise", round=1, adapter=start, config_digest="")
    unit = start.alpha / lora.rank_of(start) * DEVIATION
    found: list[float] = []
    for _ in range(DRAWS):
        uploads = [
            Upload(
                site=f"site-{site}",
                round=1,
                release=AdapterRelease(adapter=noised(start, case.noisy, rng)),
                receipts=None,
                spent=0.0,
            )
            for site in range(sites)
        ]
        merged = aggregator(uploads, broadcast)
        found.append((products.distance(lora.plain(merged.adapter), lora.plain(start)) / unit) ** 2)
    return found


def main() -> int:
    """Measure every case on both models' shapes; one line of `results.jsonl`."""
    commit = record.commit()
    rows: list[dict[str, Any]] = []
    for corpus in ("small", "finance"):
        one = CORPORA[corpus].base
        frozen = models.load(one.name, one.dtype)
        section = LoraSection(rank=RANK, alpha=ALPHA, targets=tuple(TARGETS), first_layer=one.first_layer)
        spec = lora.spec_of(frozen, section)
        for sites in (1, SITES):
            for case in CASES:
                rng = stream(0, "noise energy", corpus, sites, case.name)
                start = started(dataclasses.replace(spec, core="core" in case.noisy), rng)
                drawn = energy(case, start, sites, rng)
                rows.append(
                    {
                        "model": corpus,
                        "sites": sites,
                        "case": case.name,
                        "drawn": float(np.mean(drawn)),
                        "error": float(np.std(drawn, ddof=1) / np.sqrt(DRAWS)),
                        "formula": formula(case, start, sites),
                    }
                )
                sys.stdout.write(json.dumps(rows[-1]) + "\n")
    record.append({"kind": "aggregators_noise", "commit": commit, "rows": rows, "rank": RANK, "deviation": DEVIATION})
    return 0


if __name__ == "__main__":
    sys.exit(main())
