"""Which bandwidth and how many features tell private text from other text, under how much noise?

    PYTHONPATH=. python benchmarks/kernel_density.py [--texts 1200] [--repeats 20]

The made-up letters of four sites are summed; 200 held-out letters are to be told from 200 public questions about the
same topics. Figures: the area under the ROC curve by the exact Gaussian kernel density, and by the noisy sum of
features; and the correlation of the two densities. Noise is that of four sites' sums.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch

from fl_app import embeddings, models
from fl_app.kernel_features import densities, kernel_features, noise_std
from fl_app.seeds import stream
from simulations.corpus.desk import public_rows
from simulations.corpus.formulary import build_formulary, build_topics
from simulations.corpus.letters import private_rows

BANDWIDTHS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0)
DIMS = (256, 1024, 4096)
NOISES = (0.0, 4.0, 16.0)
SITES, ASKED = 4, 200


def area(scores: np.ndarray) -> float:
    """Return the chance that one of the first half scores above one of the second."""
    half = len(scores) // 2
    ranks = np.argsort(np.argsort(scores)) + 1
    return float((ranks[:half].sum() - half * (half + 1) / 2) / half**2)


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1200)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    embed = embeddings.MiniLm(kind="minilm").build(models.load("tiny-random", "float32"))
    topics, rng = build_topics(build_formulary()), stream(0, "kernel_density")
    letters = [str(row["instruction"]) for row in private_rows(topics, seed=0)]
    public = [str(row["instruction"]) for row in public_rows(topics, seed=0)]
    order = rng.permutation(len(letters))
    private = embed([letters[i] for i in order[: args.texts]])
    held = [letters[i] for i in order[args.texts : args.texts + ASKED]]
    asked = embed([*held, *(public[i] for i in rng.permutation(len(public))[:ASKED])])
    squared = 2 - 2 * (asked @ private.T)
    found: dict[str, dict[str, float]] = {}
    for bandwidth in BANDWIDTHS:
        exact = np.exp(-squared / (2 * bandwidth**2)).sum(axis=1)
        found[f"{bandwidth:g}"] = {"exact": round(area(exact), 3)}
        for dim in DIMS:
            features = kernel_features(asked, dim, bandwidth, 0)
            total = kernel_features(private, dim, bandwidth, 0).sum(axis=0, dtype=np.float64)
            for noise in NOISES:
                std = noise_std(noise, 1.0, sites=SITES)
                areas, fits = [], []
                for _ in range(args.repeats if noise else 1):
                    density = densities(features, (total + std * rng.standard_normal(dim)).astype(np.float32))
                    areas.append(area(density))
                    fits.append(float(np.corrcoef(density, exact)[0, 1]))
                key = f"dim {dim}, noise {noise:g}"
                found[f"{bandwidth:g}"] |= {
                    key: round(float(np.mean(areas)), 3),
                    f"{key}, correlation": round(float(np.mean(fits)), 2),
                }
    print(json.dumps({"benchmark": "kernel_density", "texts": args.texts, "sites": SITES, "found": found}))


if __name__ == "__main__":
    main()
