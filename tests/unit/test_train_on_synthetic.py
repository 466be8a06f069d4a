"""Train on synthetic, test on real: the optimum of a convex loss, held against other optimisers and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from fl_app.metrics.train_on_synthetic import fit, train_on_synthetic


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def cloud(seed: int, count: int, spread: float = 0.4) -> tuple[np.ndarray, list[str]]:
    """Three classes around three corners of the unit sphere."""
    draw = np.random.default_rng(seed)
    places = draw.integers(3, size=count)
    rows = np.eye(5)[places] + spread * draw.normal(size=(count, 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), ["abc"[place] for place in places]


def test_two_points_by_hand() -> None:
    """x = +1 is "b", x = -1 is "a": with w_b = -w_a = w the loss is 2 log(1 + exp(-2 w)) + l2 w^2, b = 0.

    Its slope is zero where 2 / (1 + exp(2 w)) = l2 w.
    """
    for l2 in (0.5, 1.0, 4.0):
        model = fit(np.array([[1.0], [-1.0]], np.float32), ["b", "a"], l2=l2)

        w = optimize.brentq(lambda w, l2=l2: 2 / (1 + math.exp(2 * w)) - l2 * w, 0, 10)
        assert model.labels == ("a", "b")
        assert model.weights == pytest.approx(np.array([[-w, w]]), abs=1e-6)
        assert model.bias == pytest.approx(np.zeros(2), abs=1e-6)


def test_the_bias_is_not_shrunk() -> None:
    """All vectors zero: only the biases speak, and they say the shares, 3 : 1, whatever l2 is."""
    model = fit(np.zeros((4, 2), np.float32), ["a", "a", "b", "a"], l2=1e6)

    assert math.exp(model.bias[0] - model.bias[1]) == pytest.approx(3, rel=1e-4)


def test_torch_finds_the_same_optimum_from_elsewhere() -> None:
    import torch

    vectors, labels = cloud(1, 80)
    model = fit(vectors, labels, l2=0.3)
    x, y = torch.from_numpy(vectors).double(), torch.tensor(["abc".index(label) for label in labels])
    weights = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bias = torch.ones(3, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weights + bias, y, reduction="sum") + 0.15 * (weights**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)

    found = weights.detach().numpy()
    assert model.weights == pytest.approx(found, abs=1e-4)
    other = bias.detach().numpy()  # biases are known up to a constant
    assert model.bias - model.bias.mean() == pytest.approx(other - other.mean(), abs=1e-4)


def test_the_same_text_gives_the_same_fit_in_any_order() -> None:
    vectors, labels = cloud(2, 60)
    order = np.random.default_rng(0).permutation(60)

    one, same = fit(vectors, labels), fit(vectors, labels)
    other = fit(vectors[order], [labels[n] for n in order])

    assert np.array_equal(one.weights, same.weights)
    assert other.weights == pytest.approx(one.weights, abs=1e-5)


def test_text_of_the_same_kind_teaches_and_shuffled_labels_do_not() -> None:
    real = cloud(3, 400)
    vectors, labels = cloud(4, 300)
    shuffled = [labels[n] for n in np.random.default_rng(1).permutation(300)]

    taught = train_on_synthetic((vectors, labels), real, rng=rng())
    untaught = train_on_synthetic((vectors, shuffled), real, rng=rng())

    for name in ("accuracy", "macro_f1"):
        assert taught[name].low > 0.75
        assert untaught[name].high < 0.5
        assert taught[name].low < taught[name].value < taught[name].high
        assert taught[name].count == 400
        assert taught[name].higher_is_better


def test_scores_by_hand() -> None:
    """Synthetic text knows "a" and "b" on two axes; the real text has "c" as well, which nobody can predict.

    Predictions a, a, b, b against a, b, b, c: accuracy 2/4; F1 of a 2/3, of b 2/4, of c 0.
    """
    axes = np.array([[1, 0], [0, 1]], np.float32)
    real = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], np.float32)

    scores = train_on_synthetic((axes, ["a", "b"]), (real, ["a", "b", "b", "c"]), rng=rng())

    assert scores["accuracy"].value == 0.5
    assert scores["macro_f1"].value == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


def test_one_class_is_always_said() -> None:
    assert fit(np.ones((3, 2), np.float32), ["a"] * 3)(np.zeros((2, 2), np.float32)) == ["a", "a"]


@pytest.mark.parametrize(
    ("count", "labels", "l2", "message"),
    [(2, 1, 1.0, "2 items against 1"), (0, 0, 1.0, "no items"), (2, 2, 0.0, "l2 = 0.0"), (2, 2, math.nan, "l2 = nan")],
)
def test_what_cannot_be_fitted_is_refused(count: int, labels: int, l2: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(np.ones((count, 2), np.float32), ["a", "b"][:labels], l2=l2)


def test_an_empty_test_is_refused() -> None:
    with pytest.raises(ValueError, match="no items"):
        train_on_synthetic(cloud(0, 9), (np.zeros((0, 5), np.float32), []), rng=rng())
