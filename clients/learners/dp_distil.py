"""DP distillation at the site: DP-AdamW on a student's adapter, held to a teacher's distributions. Two comparisons.

    DPKD      on_policy = false   (1 - w) * CE + w * t^2 * KL(teacher || student) on the row's own words
    DP-OPD    on_policy = true    t^2 * KL(teacher || student) on the student's own continuation of the row

Clip, sampling, noise, normaliser and accounting are those of `clients.dp_steps`: only the loss of a row, and the text
it is taken on, are other, and both are functions of that row, the noised student and public values (`clients.rollouts`
derives a continuation's random numbers from the row and a public seed). The receipt therefore stands as it is.

It covers the student alone. A teacher that is public costs nothing. A teacher that learned from these very rows must
itself be a DP release of them whose receipts stand on the same ledger, as in DPKD, where each gets half of epsilon;
nothing here can check that, and a teacher trained on the rows without noise voids the receipt.

Source: DPKD as the baseline of DistilDP (Flemings & Annavaram 2024, 2403.00932); DP-OPD (Khadem et al. 2026,
2604.04461): frozen public teacher, generalised distillation (Agarwal et al. 2023, 2306.13649) on continuations, forward
KL, DP on the student alone. Ours differs in a LoRA student, Poisson sampling, the mean over tokens, and in our own
choice of where a row is cut (`prompt_share`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from clients.dp_steps import DpAdapterLearner, DpStepsSection
from clients.rollouts import continued, stream_of
from fl_app import lora, models, peft_files
from fl_app.config import Section
from fl_app.distillation import DistilLoss, Teacher, Weights, check_pair
from fl_app.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clients.stages import Learner, Workbench
    from fl_app.sequences import TokenSequence
    from fl_app.types import Adapter

OWN_WORDS = Weights(hard=0.0, soft=1.0)


class TeacherSection(Section):
    """[client.learner.teacher]: a model as in [model] name, empty for the student's base; a PEFT adapter, or none."""

    model: str = ""
    adapter: str = ""


class DpDistil(DpStepsSection):
    """[client.learner] kind = "dp_distil".

    With `on_policy` a share `own_share` of the sampled rows, chosen anew in every step, goes on in the student's own
    words after `prompt_share` of its text; the others keep their words, as all do without.
    """

    kind: Literal["dp_distil"]
    teacher: TeacherSection = TeacherSection()
    soft_weight: Annotated[float, Field(gt=0, le=1)] = 0.4
    temperature: Annotated[float, Field(ge=0.1, le=100)] = 1.0
    on_policy: bool = False
    own_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    prompt_share: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def build(self, round_number: int) -> Learner:
        """Return the stage for one round."""
        return DpAdapterLearner(
            section=self,
            schedule="both",
            round_number=round_number,
            guide=functools.partial(Course, self),
            ready=functools.partial(_check_here, self.teacher.model, self.teacher.adapter),
        )


class Course:
    """A `Guidance` by one teacher, for one round.

    Raises: ConfigInvalid when the teacher's tokens are not the student's; ModelMissing, AdapterMismatch.
    """

    def __init__(self, section: DpDistil, start: Adapter, bench: Workbench) -> None:
        dtype: Any = str(bench.model.model.dtype).removeprefix("torch.")
        told = section.teacher
        frozen = models.load(told.model, dtype) if told.model else bench.model
        adapter = peft_files.load(Path(told.adapter), base=frozen.resolved.sha256) if told.adapter else None
        tokenizer = bench.model.tokenizer
        check_pair(bench.model.model, tokenizer, frozen.model, frozen.tokenizer, where="client.learner.teacher")
        self._section = section
        self._seed = lora.sha256(start).encode()
        self._end_id = int(tokenizer.eos_token_id)
        self._words = Weights(hard=1 - section.soft_weight, soft=section.soft_weight)
        self._own: dict[int, TokenSequence] = {}
        self._teacher = Teacher(frozen.model if adapter is None else lora.attach(frozen, adapter))
        teaches = frozen.resolved.sha256 if adapter is None else lora.sha256(adapter)
        self._losses = DistilLoss(
            teacher=self._teacher,
            weigh=lambda one: OWN_WORDS if id(one) in self._own else self._words,
            temperature=section.temperature,
            name=f"distil {teaches} {section.soft_weight} {section.temperature}",
        )

    @property
    def losses(self) -> DistilLoss:
        """Return the loss of every row."""
        return self._losses

    @property
    def rewrites(self) -> bool:
        """Return whether rows go on in the student's words."""
        return self._section.on_policy

    def meet(self, known: Sequence[TokenSequence]) -> None:
        """Let what the teacher says of these rows be kept, where it will be asked of them again."""
        if not self.rewrites:
            self._teacher.keep(known)

    def texts(self, model: Any, examples: Sequence[TokenSequence], step: int) -> Sequence[TokenSequence]:
        """Return the rows, or those that were chosen in the student's own words."""
        if not self.rewrites:
            return examples
        section, seed = self._section, self._seed + b" %d " % step
        chosen = [n for n, one in enumerate(examples) if stream_of(seed + b"own", one).random() < section.own_share]
        written = continued(
            model,
            [examples[n] for n in chosen],
            prompt_share=section.prompt_share,
            seed=seed,
            end_id=self._end_id,
        )
        self._own = {id(one): one for one in written}
        found = list(examples)
        for n, one in zip(chosen, written, strict=True):
            found[n] = one
        return found


@functools.cache
def _check_here(model: str, adapter: str) -> None:
    """Return when the teacher is on this machine; looked for once per process, before anything is reserved for it.

    Raises: ModelMissing, ConfigInvalid.
    """
    if adapter and not (Path(adapter) / "adapter_config.json").is_file():
        raise ConfigInvalid(
            f"client.learner.teacher.adapter: no PEFT adapter in {adapter}; put it there, or leave it empty"
        )
    if model:
        models.resolve(model)
