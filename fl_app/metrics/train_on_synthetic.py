"""Train on synthetic text, test on real text: how well a classifier does that has never seen a real one.

A multinomial logistic regression over embeddings, trained to the optimum of a convex loss, so the figure has no seed,
no epochs and no early stopping in it: what it measures is the text. Its ceiling is the same fit on real training text,
its floors are the majority class and the fit on `public_only` text.

    minimise over W (D, K), b (K):  sum of negative log-likelihoods + l2 / 2 * |W|^2     (b is not shrunk)

The real test text is public, or the figure is a query of private text: whoever calls this knows which.

Source: the downstream columns of Kurakin et al. 2023 (2306.01684) and Aug-PE (2403.01749), which fine-tune RoBERTa;
ours is a linear model over a fixed embedding, which a CPU fits in a second and which repeats to the digit.
Legend of shapes: N = texts, D = width of the embedding, K = classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fl_app.metrics.accuracy import accuracy
from fl_app.metrics.interval import paired_count
from fl_app.metrics.macro_f1 import macro_f1

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from fl_app.types import Floats, Score

    Doubles = npt.NDArray[np.float64]

TOLERANCE = 1e-7
"""Largest partial derivative of the mean loss that we ask for; a fit is refused above a hundred times that."""

STEPS = 5000
"""Most steps of the optimiser; clouds of some hundred texts take a few dozen."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearClassifier:
    """A fitted model. Shapes: weights (D, K), bias (K,), float64; `labels` are the K classes, sorted."""

    labels: tuple[str, ...]
    weights: Doubles
    bias: Doubles

    def __call__(self, vectors: Floats) -> list[str]:
        """Return the most likely class of every vector, the first of equals. Shapes: vectors (N, D)."""
        scores_NK = vectors.astype(np.float64) @ self.weights + self.bias
        return [self.labels[place] for place in scores_NK.argmax(axis=1)]


def fit(vectors: Floats, labels: Sequence[str], *, l2: float = 1.0) -> LinearClassifier:
    """Return the classifier of the texts whose embeddings are `vectors`; deterministic.

    With one class only, it always says that one.
    Shapes: vectors (N, D).
    Raises: ValueError when there are no texts, the lengths differ, l2 is not positive, or the fit does not converge.
    """
    from scipy.optimize import minimize

    count = paired_count("train_on_synthetic", vectors, labels)
    if not l2 > 0:
        raise ValueError(f"train_on_synthetic: l2 = {l2} must be positive, or separable text has no best fit")
    classes = sorted(set(labels))
    place = {label: number for number, label in enumerate(classes)}
    target_NK = np.eye(len(classes))[[place[label] for label in labels]]
    x_ND = vectors.astype(np.float64)
    width = x_ND.shape[1]

    def loss(flat: Doubles) -> tuple[float, Doubles]:
        weights_DK, bias_K = _parted(flat, width)
        scores_NK = x_ND @ weights_DK + bias_K
        scores_NK -= scores_NK.max(axis=1, keepdims=True)
        log_total_N1 = np.log(np.exp(scores_NK).sum(axis=1, keepdims=True))
        value = float((target_NK * (log_total_N1 - scores_NK)).sum() + l2 / 2 * (weights_DK**2).sum())
        error_NK = np.exp(scores_NK - log_total_N1) - target_NK
        slope = np.concatenate([x_ND.T @ error_NK + l2 * weights_DK, error_NK.sum(axis=0, keepdims=True)]).ravel()
        return value / count, slope / count

    start = np.zeros((width + 1) * len(classes))
    options = {"maxiter": STEPS, "gtol": TOLERANCE, "ftol": 0.0, "maxfun": 2 * STEPS}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    slope = float(np.abs(loss(found.x)[1]).max())
    if not slope <= 100 * TOLERANCE:  # the line search may stop short of gtol at the end of float64
        raise ValueError(f"train_on_synthetic: no optimum after {found.nit} steps, slope {slope:.1e}; raise l2 = {l2}")
    weights_DK, bias_K = _parted(found.x, width)
    return LinearClassifier(labels=tuple(classes), weights=weights_DK, bias=bias_K)


def train_on_synthetic(
    synthetic: tuple[Floats, Sequence[str]],
    real: tuple[Floats, Sequence[str]],
    *,
    rng: np.random.Generator,
    l2: float = 1.0,
) -> Mapping[str, Score]:
    """Return accuracy and macro F1 on real text of a classifier fitted to synthetic text, with intervals over items.

    Both arguments are embeddings and labels. A label that the synthetic text lacks is never predicted, and counts as
    the miss that it is. `rng` draws the bootstrap of macro F1; the interval of accuracy is Wilson's.

    Raises: ValueError as `fit`, also when there is nothing to test on.
    """
    paired_count("train_on_synthetic", *real)
    classifier = fit(*synthetic, l2=l2)
    named = {label: number for number, label in enumerate(sorted({*synthetic[1], *real[1]}))}
    predicted = [named[label] for label in classifier(real[0])]
    true = [named[label] for label in real[1]]
    return {"accuracy": accuracy(predicted, true), "macro_f1": macro_f1(predicted, true, rng=rng)}


def _parted(flat: Doubles, width: int) -> tuple[Doubles, Doubles]:
    rows = flat.reshape(width + 1, -1)
    return rows[:-1], rows[-1]
