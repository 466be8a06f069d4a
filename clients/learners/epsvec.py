"""EPSVec, the site's half: by class and layer, how its rows lie from public text inside the model. One Gaussian.

    for every row    h_l = mean over its tokens, read after a public prompt, of the residual stream after block l
                     z   = (h_l - centre_l) / (scale_l * sqrt(len(layers))), all layers one vector
                     add   z cut to clip_norm * sqrt(1 - count_share^2), and clip_norm * count_share to the count,
                           to the row's class
    release          the sums and counts of all classes, as one vector with one Gaussian noise

A class is a control code. Its prompt, its centres and the scales come from the server (`bench.material`), made of
public text. They are constants of the mechanism: whatever a server sends, the receipt holds.

Why one clip for all layers. A row adds (cut z, count) to the block of one class and nothing to others, and the L2 norm
of that is at most sqrt(clip_norm^2 (1 - count_share^2) + clip_norm^2 count_share^2) = clip_norm. So the whole release,
all classes, layers and counts together, is *one* sum of sensitivity clip_norm under add-or-remove of a row, and
`Gaussian(noise_multiplier, clip_norm)` says all of it: k releases with a clip each at ratio 1/m would be the same
Gaussian of mu = sqrt(k) / m. For equal mu and noise this clip is the weaker one: rows that keep clip_norm / sqrt(k) in
every layer keep clip_norm jointly, so none is cut here that is not cut there. A row has one code, so classes are
disjoint. Replacing a row moves the sum by up to 2 clip_norm; the receipt does not speak of that relation.

A unit with up to k rows: each is cut to clip_norm / k, its share of the count too, so that all of them together, in
whatever classes, stay within clip_norm.

Rows are read one at a time: in a batch a row moves others by rounding, which no clip bounds. All rows are used in every
round; nothing is sampled, so nothing hangs on a secret sample. A row whose state is not finite, or whose code the
server does not ask for, contributes zero.

What leaves: `<code>/<layer>`, in the model's own units again (scaling a noised number is post-processing), and
`<code>/count`, in rows. Sites add up: the sum of their releases is a release of the union of their rows.

Source: EPSVec (2602.21218) and its code. Ours differs. (1) Theirs subtracts from the i-th private text the i-th of n
public ones; ours subtracts the public mean: the same expectation before clipping, without the second text's variance,
and a row that leaves shifts no other row's partner. (2) Theirs samples n rows without replacement under a public seed
and charges C/n, which is add-or-remove, with an amplification that holds for replace-one: noise short by 2. Ours uses
all rows under add-or-remove. (3) Theirs draws noise from seed 42; ours from the site's `NoiseSource`. (4) Layers share
one clip. (5) Theirs judges public texts by a second model; ours takes them as they are. (6) Which tokens the mean is
over: `fl_app.steering`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from fl_app import models, steering
from fl_app.config import Section
from fl_app.errors import PolicyRefusal
from fl_app.privacy import gaussian
from fl_app.types import DpReceipt, Gaussian, VectorRelease

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from clients.private_rows import PrivateRow, PrivateRows
    from clients.stages import Learner, PublicConstants, Workbench
    from fl_app.types import Adapter, Floats, Material, ReleaseKind

    Doubles = npt.NDArray[np.float64]

MIN_SCALE, MAX_SCALE = 1e-6, 1e6
"""Scales beyond these are no scale of a residual stream, and float32 would not hold what they scale."""


class EpsVec(Section):
    """[client.learner] kind = "epsvec".

    `layers` as in [server.synthesizer]. `clip_norm` is in units of the usual distance of a public text from its
    centre. `count_share` of it goes to the count: a row's count has noise noise_multiplier / count_share.
    """

    kind: Literal["epsvec"]
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    count_share: Annotated[float, Field(ge=0.01, le=0.99)] = 0.2

    def build(self, round_number: int) -> Learner:
        """Return the stage for one round."""
        return EpsVecLearner(section=self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Class:
    """A class as the server describes it. Shapes: centres (k * D,), the layers one after the other."""

    code: str
    prompt: str
    centres: Doubles


@dataclass(frozen=True, slots=True, kw_only=True)
class EpsVecLearner:
    """A `Learner` of one Gaussian release."""

    section: EpsVec
    release_kind: ReleaseKind = "vector"
    private: bool = True
    steps: int = 1
    noise: float | None = None

    @property
    def clip_norm(self) -> float:
        """L2 bound on what one unit adds to all sums and counts together."""
        return self.section.clip_norm

    def announce(self, constants: PublicConstants, noise: float) -> tuple[DpReceipt, ...]:
        """Return the receipt of one round."""
        event = Gaussian(noise_multiplier=noise, clip_norm=self.section.clip_norm, count=1)
        return (DpReceipt(event=event, unit=constants.unit),)

    def __call__(
        self,
        rows: PrivateRows,
        start: Adapter,
        receipts: tuple[DpReceipt, ...],
        constants: PublicConstants,
        bench: Workbench,
    ) -> VectorRelease:
        """Return the noised sums and counts; `start` is not used, the bare model reads.

        A text is cut at `constants.max_tokens` tokens; the public prompt comes on top.

        Guarantee: `receipts`, for units of `constants.unit`, under add-or-remove of one unit; names and lengths depend
        on the material alone.
        Raises: PolicyRefusal when the receipts are not those that this learner announced, or the material does not
        describe its classes at these layers; ConfigInvalid for a layer that the model has not.
        """
        event = receipts[0].event if receipts else None
        if not isinstance(event, Gaussian) or receipts != self.announce(constants, event.noise_multiplier):
            raise PolicyRefusal(f"receipts {receipts} were not announced by this learner")
        model, layers = bench.model.model, self.section.layers
        steering.check_layers(model, layers)
        width = steering.width(model)
        scales = _scales(bench.material, layers)
        classes = _classes(bench.material, layers, width)
        for one in classes:
            prompt = bench.model.tokenizer(one.prompt, add_special_tokens=False, verbose=False)["input_ids"]
            models.check_positions(bench.model, len(prompt) + 1 + constants.max_tokens)
        totals: list[Doubles] = []
        for one in classes:
            states = self._states([row for row in rows.examples if row.code == one.code], one, constants, bench)
            added = contributions(
                (states - one.centres) / (np.repeat(scales, width) * math.sqrt(len(layers))),
                clip_norm=gaussian.usable_clip(event.clip_norm) / constants.max_rows_per_unit,
                count_share=self.section.count_share,
            )
            totals.append(added.sum(axis=0))
            del states, added
        noisy = gaussian.release(
            totals, clip_norm=event.clip_norm, noise_multiplier=event.noise_multiplier, noise=bench.noise
        )
        del totals
        per_row = gaussian.usable_clip(event.clip_norm) / constants.max_rows_per_unit * self.section.count_share
        vectors: dict[str, Floats] = {}
        for one, sums in zip(classes, noisy, strict=True):
            stretched = sums[:-1].reshape(len(layers), width) * (scales[:, None] * math.sqrt(len(layers)))
            for layer, vector in zip(layers, stretched, strict=True):
                vectors[steering.vector_name(one.code, layer)] = vector.astype(np.float32)
            vectors[steering.count_name(one.code)] = (sums[-1:] / per_row).astype(np.float32)
        return VectorRelease(vectors=vectors)

    def _states(self, rows: Sequence[PrivateRow], one: _Class, constants: PublicConstants, bench: Workbench) -> Doubles:
        """Return the rows' states. Shapes: (len(rows), k * D)."""
        found = steering.representations(
            bench.model.model,
            bench.model.tokenizer,
            [one.prompt] * len(rows),
            [row.instruction for row in rows],
            layers=self.section.layers,
            max_text_tokens=constants.max_tokens,
            batch_rows=1,
        )
        return np.concatenate([found[layer] for layer in self.section.layers], axis=1).astype(np.float64)


def contributions(differences: Doubles, *, clip_norm: float, count_share: float) -> Doubles:
    """Return what each row adds: its difference, cut, and its share of the count.

    Shapes: differences (N, K) -> (N, K + 1).
    Guarantee: the L2 norm of a row is at most clip_norm; a row that is not finite is zero altogether.
    """
    most = clip_norm * math.sqrt(1 - count_share**2)
    norms = np.linalg.norm(differences, axis=1, keepdims=True)
    kept = np.isfinite(norms)
    cut = np.where(kept, differences, 0.0) * (most / np.maximum(np.where(kept, norms, 1.0), most))
    return np.concatenate([cut, np.where(kept, clip_norm * count_share, 0.0)], axis=1)


def _scales(material: Material, layers: Sequence[int]) -> Doubles:
    """Return the layers' scales. Shapes: (k,). Raises: PolicyRefusal."""
    found = [float(_vector(material.vectors, steering.scale_name(layer), 1)[0]) for layer in layers]
    if not all(MIN_SCALE <= scale <= MAX_SCALE for scale in found):
        raise PolicyRefusal(f"scales {found} of layers {list(layers)} are outside [{MIN_SCALE:g}, {MAX_SCALE:g}]")
    return np.array(found)


def _classes(material: Material, layers: Sequence[int], width: int) -> list[_Class]:
    """Return the classes in the order of the material. Raises: PolicyRefusal when there is none, or one twice."""
    codes = [one.code for one in material.texts]
    if not codes or len(set(codes)) != len(codes):
        raise PolicyRefusal(f"the server's material has {len(codes)} prompts for {len(set(codes))} classes")
    return [
        _Class(
            code=one.code,
            prompt=one.text,
            centres=np.concatenate(
                [_vector(material.vectors, steering.centre_name(one.code, layer), width) for layer in layers]
            ).astype(np.float64),
        )
        for one in material.texts
    ]


def _vector(vectors: Mapping[str, Floats], name: str, length: int) -> Floats:
    found = vectors.get(name)
    if found is None or found.shape != (length,) or not np.isfinite(found).all():
        told = "is missing" if found is None else f"is of shape {found.shape}, or not finite"
        raise PolicyRefusal(
            f"the server's material: {name!r} {told}, expected {length} numbers; do [client.learner] and "
            "[server.synthesizer] name the same layers?"
        )
    return found
