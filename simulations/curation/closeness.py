"""MAUVE: how far synthetic texts spread over the same places of a feature space as public reference texts do.

Features come from outside, one row per text, L2-normalised; they are cut into buckets by k-means and the two histograms
compared along a divergence curve. Every setting moves the value, so all stand beside it and figures of two settings are
not comparable. The interval is a range over seeds, each with its own draw of equally many texts from both sides and
its own clustering: it covers these two, not the run that wrote the texts.

Beside it stands the same figure of the reference against itself, halves that share no text: what is within reach at
this number of texts.

Source: Pillutla et al. 2021 (2102.01454), by the authors' package; buckets n / 10 and scaling 5 are its defaults.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fl_app.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from fl_app.types import Floats

    Places = npt.NDArray[np.intp]

SEEDS = 5
SCALING = 5.0
EXPLAINED = 0.9
LEAST = 20
"""Texts a side below which there are no two buckets of ten; no figure then."""

MOST = 2000
"""Texts a side beyond which more cost minutes and change little. Assumption."""

INSTALL = "pip install mauve-text faiss-cpu scikit-learn"


class Features(Protocol):
    """Texts -> one unit vector each; `fl_app.embeddings.Embedder` is one."""

    @property
    def name(self) -> str:
        """Name for people."""
        ...

    def __call__(self, texts: Sequence[str]) -> Floats:
        """Shapes: (len(texts), d) float32, rows of L2 norm 1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean, least and largest over the seeds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Closeness:
    """MAUVE with everything that must be read with it; `value` None says by `why` that there is no figure."""

    value: Spread | None
    ceiling: Spread | None
    texts_a_side: int
    buckets: int
    scaling: float
    explained_variance: float
    seeds: int
    features: str
    why: str = ""


def mauve(synthetic: Sequence[str], reference: Sequence[str], features: Features, seed: int) -> Closeness:
    """Return MAUVE of synthetic against reference texts.

    Without the package, or with too few texts, there is no figure, and `why` says so.
    Raises: ConfigInvalid when features are not one unit vector per text.
    """
    side = min(len(synthetic), len(reference), MOST)
    settings: dict[str, Any] = {
        "texts_a_side": side,
        "buckets": max(2, round(side / 10)),
        "scaling": SCALING,
        "explained_variance": EXPLAINED,
        "seeds": SEEDS,
        "features": features.name,
    }
    why = f"{side} texts on the smaller side; MAUVE needs {LEAST}" if side < LEAST else ""
    if any(importlib.util.find_spec(name) is None for name in ("mauve", "faiss", "sklearn")):
        why = f"mauve-text with faiss and scikit-learn is not installed: {INSTALL}"
    if why:
        return Closeness(value=None, ceiling=None, why=why, **settings)
    rngs = [np.random.default_rng([seed, number]) for number in range(SEEDS)]
    own = [rng.permutation(len(synthetic))[:side] for rng in rngs]
    others = [rng.permutation(len(reference))[:side] for rng in rngs]
    twice = [rng.permutation(len(reference))[: 2 * side] for rng in rngs] if len(reference) >= 2 * side else []
    ours = _Rows.of(features, synthetic, own)
    theirs = _Rows.of(features, reference, [*others, *twice])  # of a long reference only what some seed drew
    buckets = settings["buckets"]
    pairs = zip(own, others, strict=True)
    values = [_one(ours[left], theirs[right], buckets, number) for number, (left, right) in enumerate(pairs)]
    limits = [_one(theirs[two[:side]], theirs[two[side:]], buckets, number) for number, two in enumerate(twice)]
    return Closeness(value=_spread(values), ceiling=_spread(limits) if limits else None, **settings)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """Features of the texts that were drawn, found by the place of a text among all."""

    places: Places
    rows: Floats

    @classmethod
    def of(cls, features: Features, texts: Sequence[str], draws: Sequence[Places]) -> _Rows:
        places = np.unique(np.concatenate(draws))
        return cls(places=places, rows=_checked(features, [texts[int(place)] for place in places]))

    def __getitem__(self, draw: Places) -> Floats:
        return self.rows[np.searchsorted(self.places, draw)]


def _spread(values: Sequence[float]) -> Spread:
    return Spread(value=float(np.mean(values)), low=min(values), high=max(values))


def _checked(features: Features, texts: Sequence[str]) -> Floats:
    rows = np.asarray(features(texts), np.float32)
    norms = np.linalg.norm(rows, axis=1) if rows.ndim == 2 else np.zeros(0)  # noqa: PLR2004 - texts, dimensions
    if len(norms) != len(texts) or not bool((np.abs(norms - 1) < 1e-3).all()):  # noqa: PLR2004 - float32 rounding
        raise ConfigInvalid(
            f"features {features.name!r} gave shape {rows.shape} for {len(texts)} texts, norms from "
            f"{min(norms, default=0):.3g}; expected one row of L2 norm 1 per text"
        )
    return rows


def _one(left: Floats, right: Floats, buckets: int, seed: int) -> float:
    compute: Any = importlib.import_module("mauve").compute_mauve
    found = compute(
        p_features=right,
        q_features=left,
        num_buckets=buckets,
        kmeans_explained_var=EXPLAINED,
        mauve_scaling_factor=SCALING,
        seed=seed,
        verbose=False,
    )
    return float(found.mauve)
