"""Does Private Evolution move a population towards private text? Both halves, without Flower, on the made-up letters.

    PYTHONPATH=. python benchmarks/evolution.py [--rounds 4] [--rows 300] [--population 96] [--keep 24] [--seed 0]

Four houses are four sites of `--rows` letters each; as many others are held out. Texts begin as what the public start
writes, and are varied by it; sites vote with MiniLM over all codes. Figures, per round: the mean cosine between a
held-out letter and the nearest text that was kept. Three settings of the noise:

    drowned    noise multiplier 1e6: what keeping and varying do without being told anything
    epsilon 1  the noise at which all rounds together cost epsilon 1 at delta 1 / (N ln N), N = rows of a site
    quiet      noise multiplier 0.01: no privacy, the ceiling of this population and model

"opening" is the nearest text among the whole first population, before any vote: more texts than are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clients.learners.pe_votes import PeVotes, VoteCounter
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app import embeddings, models
from fl_app.privacy.accountants import pld
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import DpReceipt, Gaussian
from simulations.corpus.codes import build_codes
from simulations.corpus.formulary import build_formulary, build_topics
from simulations.corpus.letters import private_rows
from strategies.coded import fixed_adapter
from strategies.lab import Lab
from strategies.stages import Voices
from strategies.synthesizers.private_evolution import PrivateEvolution

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Floats

START = "simulations/corpus/start"
HOUSES = ("harbour", "court", "farm", "school")


class Remembering:
    """An embedder that embeds no text twice: private letters are the same in every round and setting."""

    def __init__(self, inner: embeddings.Embedder) -> None:
        self._inner = inner
        self._known: dict[str, Floats] = {}

    def __call__(self, texts: Sequence[str], *, alone: bool = False) -> Floats:
        """Return one vector per text; a text first met alone stays as it was then."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known |= dict(zip(new, self._inner(new, alone=alone), strict=True))
        return np.stack([self._known[text] for text in texts])


def calibrated(rounds: int, epsilon: float, delta: float) -> float:
    """Return the noise multiplier at which `rounds` votes cost `epsilon`, by bisection over the certificate."""
    low, high = 0.1, 1000.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        event = Gaussian(noise_multiplier=middle, clip_norm=1.0, count=rounds)
        spent = pld.epsilon([DpReceipt(event=event, unit="record")], delta)
        low, high = (middle, high) if spent > epsilon else (low, middle)
    return high


def played(lab: Lab, section: PrivateEvolution, sites: Any, held: Floats, embed: Any, args: Any, noise: float) -> Any:
    """Play all rounds at one noise; return the figure of every round."""
    start = fixed_adapter(lab, START)
    assert start is not None
    with tempfile.TemporaryDirectory() as folder:
        lab.directory = Path(folder)
        evolve, learner = section.build(lab), PeVotes.model_validate(args.learner).build(1)
        assert isinstance(learner, VoteCounter)
        told = PublicConstants(sample_rate=1.0, expected_batch=1, max_tokens=64, max_rows_per_unit=1, unit="record")
        near: list[float] = []
        for number in range(1, args.rounds + 1):
            material = evolve.prepare(start, (), stream(args.seed, "prepare", number), number)
            if number == 1:
                texts = embed([text.text for text in material.texts])
                near.append(float((held @ texts.T).max(axis=1).mean()))
            releases: dict[str, Any] = {}
            for house, rows in sites.items():
                source = SimulatedNoise(stream(args.seed, "noise", house, number))
                bench = Workbench(model=lab.local, codes={}, noise=source, system="", material=material)
                releases[house] = learner(rows, start, learner.announce(told, noise), told, bench)
            voices = Voices(merged=start, by_site={}, releases=releases, material=material)
            drafts = evolve(voices, stream(args.seed, "synthesise", number), number)
            near.append(float((held @ embed([draft.instruction for draft in drafts]).T).max(axis=1).mean()))
    return [round(value, 4) for value in near]


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 4), ("rows", 300), ("population", 96), ("keep", 24), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    args.learner = {"kind": "pe_votes", "embedder": {"kind": "minilm"}, "within": "all"}
    torch.set_num_threads(1)
    began = time.process_time()
    frozen = models.load("smollm2-135m-instruct", "bfloat16")
    embed: Any = Remembering(embeddings.MiniLm(kind="minilm").build(frozen))
    embeddings.MiniLm.build = lambda *_: embed  # type: ignore[method-assign]  # the learner builds its own
    letters: dict[str, list[dict[str, Any]]] = {house: [] for house in HOUSES}
    topics = build_topics(build_formulary())
    for row in private_rows(topics, seed=0):
        letters[row["house"]].append(row)
    sites = {
        house: PrivateRows(
            [
                PrivateRow(instruction=row["instruction"], output="", code=row["code"], unit=row["id"])
                for row in rows[: args.rows]
            ]
        )
        for house, rows in letters.items()
    }
    held = embed([row["instruction"] for rows in letters.values() for row in rows[args.rows : 2 * args.rows]])
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as codes:
        codes.writelines(json.dumps({"id": code.id, "text": code.text}) + "\n" for code in build_codes(topics))
        codes.flush()
        tree = {"kind": "private_evolution", "codes": codes.name, "population": args.population, "keep": args.keep}
        lab = Lab(
            local=frozen,
            professional=frozen,
            professional_adapter=None,
            professional_name="professional",
            system="",
            threads=1,
            batch_rows=24,
            public_words=frozenset(),
        )
        delta = 1 / (args.rows * math.log(args.rows))
        noises = {"drowned": 1e6, "epsilon 1": calibrated(args.rounds, 1.0, delta), "quiet": 0.01}
        section = PrivateEvolution.model_validate(tree)
        found = {name: played(lab, section, sites, held, embed, args, noise) for name, noise in noises.items()}
    lab.close()
    shown = {
        "benchmark": "evolution",
        "sizes": {name: getattr(args, name) for name in ("rounds", "rows", "population", "keep", "seed")},
        "delta": delta,
        "noise_multiplier": {name: round(noise, 3) for name, noise in noises.items()},
        "opening": found["quiet"][0],
        "nearest_cosine": {name: values[1:] for name, values in found.items()},
        "cpu_s": round(time.process_time() - began),
    }
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
