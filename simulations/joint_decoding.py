"""Several sites in one process write texts together: the mathematics of `fl_app.joint_decoding`, run over real rows.

A driver, not a deployment: in every step the server reads the public prompts, each site sends one noisy sum for every
bucket that is still writing, the server adds them up and draws. Over the wire that would be a wave per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clients.decoding import Bucket, Prompts, sorted_into_buckets
from clients.token_stream import Stream, rows_keep_apart
from fl_app import joint_decoding, lora, private_decoding
from fl_app.types import CodedText, DpReceipt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from clients.private_rows import PrivateRows
    from clients.stages import Workbench
    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

    Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class JointPlan:
    """Public constants of a joint text; `expected_units` counts the units of all sites in one bucket."""

    buckets_per_code: int
    expected_units: float
    clip_norm: float
    noise_multiplier: float
    max_new_tokens: int
    max_text: int
    unit: str = "record"
    rows_per_unit: int = 1
    temperature: float = 1.0
    top_k: int = 100
    template: str = "{code}{text}\n\n{code}"
    placeholder: str = "..."
    batch_rows: int = 16

    @property
    def receipt(self) -> DpReceipt:
        """What every site pays: a Gaussian for each token of a bucket."""
        return joint_decoding.receipt(
            noise_multiplier=self.noise_multiplier,
            clip_norm=self.clip_norm,
            tokens=self.max_new_tokens,
            unit=self.unit,
        )


class JointSite:
    """A site's half: it is told public scores and tokens, and sends noisy sums. `sent` counts them by bucket."""

    def __init__(self, model: Any, rows: PrivateRows, plan: JointPlan, bench: Workbench) -> None:
        buckets = sorted_into_buckets(rows, bench, per_code=plan.buckets_per_code, unit=plan.unit)
        prompts = _prompts(bench.model, plan)
        asked = [
            (prompts.around(bench.codes[bucket.code], row.instruction), place)
            for place, bucket in enumerate(buckets)
            for row in bucket.rows
        ]
        together = plan.batch_rows if rows_keep_apart(model, plan.batch_rows) else 1
        width = prompts.width(bench.codes.values())
        self._stream = Stream(model, [p for p, _ in asked], [o for _, o in asked], width=width, together=together)
        self._plan, self._noise = plan, bench.noise
        self.sent = [0] * len(buckets)

    def sums(self, told: Mapping[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]) -> dict[int, Doubles]:
        """Return a noisy sum for every bucket told of (mask, public scores on it), rows or none."""
        plan = self._plan
        totals = {place: np.zeros(len(mask)) for place, (mask, _) in told.items()}
        for place, scores_RV in self._stream.scores(set(told)):
            mask, public_K = told[place]
            totals[place] += joint_decoding.clipped_sum(
                scores_RV[:, mask], public_K, clip_norm=plan.clip_norm, rows_per_unit=plan.rows_per_unit
            )
        for place in told:
            self.sent[place] += 1
        return {
            place: joint_decoding.noisy_sum(
                total, clip_norm=plan.clip_norm, noise_multiplier=plan.noise_multiplier, noise=self._noise
            )
            for place, total in totals.items()
        }

    def append(self, tokens: dict[int, int]) -> None:
        """Take the tokens that the server drew."""
        self._stream.append(tokens)


def write_jointly(
    frozen: FrozenModel,
    start: Adapter,
    sites: Sequence[JointSite],
    codes: Mapping[str, str],
    plan: JointPlan,
    rng: np.random.Generator,
) -> tuple[CodedText, ...]:
    """Return one text of every bucket, drawn by the server from the sums of all sites; empty ones left out."""
    model = lora.attach(frozen, start)
    prompts = _prompts(frozen, plan)
    places = [Bucket(code=code, number=n, rows=()) for code in sorted(codes) for n in range(plan.buckets_per_code)]
    public = Stream(
        model,
        [prompts.around(codes[bucket.code], plan.placeholder) for bucket in places],
        range(len(places)),
        width=prompts.width(codes.values()),
        together=plan.batch_rows,
    )
    ids: dict[int, list[int]] = {place: [] for place in range(len(places))}
    margin = 2 * plan.clip_norm / plan.expected_units
    active = set(ids)
    for _ in range(plan.max_new_tokens):
        told: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = {}
        for place, scores_RV in public.scores(active):
            mask = private_decoding.public_mask(scores_RV[0], plan.top_k, margin)
            told[place] = (mask, scores_RV[0][mask])
        sent = [site.sums(told) for site in sites]
        drawn: dict[int, int] = {}
        for place in sorted(active):
            mask, public_K = told[place]
            scores_K = joint_decoding.joint_scores(public_K, [one[place] for one in sent], expected=plan.expected_units)
            drawn[place] = int(mask[joint_decoding.sampled(scores_K, plan.temperature, rng)])
            ids[place].append(drawn[place])
        active = {place for place in active if drawn[place] != frozen.tokenizer.eos_token_id}
        if not active:
            break
        for one in (public, *sites):
            one.append(drawn)
    texts = [frozen.tokenizer.decode(ids[place], skip_special_tokens=True).strip() for place in sorted(ids)]
    return tuple(CodedText(code=bucket.code, text=text) for bucket, text in zip(places, texts, strict=True) if text)


def _prompts(frozen: FrozenModel, plan: JointPlan) -> Prompts:
    return Prompts(tokenizer=frozen.tokenizer, template=plan.template, max_text=plan.max_text)
