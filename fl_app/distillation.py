"""A student held to a teacher's distributions: the teacher, what is asked of the student, and its loss row by row.

    loss of a row = mean over its scored tokens of  hard * CE + soft * t^2 * KL(teacher || student)
                    + hidden_weight * MSE(projection of the student's last state, the teacher's)

The server's tuner uses it on released text, a site's learner on private rows: the loss of a row is a function of that
row, the student and the teacher. The teacher computes each row by itself, padded by its own length alone, so that
neither company nor threads move a bit of what it says.

Legend of shapes: B = rows, N = positions that carry loss, D and E = widths of student and teacher.
Source: DistilDP (Flemings & Annavaram 2024, 2403.00932) for the loss. Its published code sums the KL over positions
where the cross entropy is a mean over them, so that its lambda of 0.4 weighs like 0.988 at 123 positions a row;
`normalise = "token"` takes the mean of both, "paper" sums as published. It also learns padding; we never do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fl_app import sequences, soft_loss, token_loss
from fl_app.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.sequences import FrozenPrefix, MicroBatch, Scored, TokenSequence
    from fl_app.token_loss import Head

Normalise = Literal["token", "paper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What a row's losses weigh: `hard` its cross entropy, `soft` its KL to the teacher, `hidden` its states' MSE."""

    hard: float = 1.0
    soft: float = 0.0
    hidden: float = 0.0

    @property
    def teacher_needed(self) -> bool:
        """Whether the teacher has a say."""
        return self.soft > 0 or self.hidden > 0


class Teacher:
    """A frozen causal language model; its states of the sequences given to `keep` are computed once.

    Guarantee: states of a sequence depend on that sequence alone. No parameter asks for a gradient or is changed.
    """

    def __init__(self, model: Any, *, most_bytes: int = 1 << 30) -> None:
        self._model = model
        core = sequences.core_of(model)
        head = token_loss.head_of(core)
        if head is None:
            raise ConfigInvalid(f"{type(core).__name__} as a teacher: its head is no frozen linear map; take another")
        self.head: Head = head
        self.width = int(head.weight.shape[1])
        self._most_bytes = most_bytes
        self._kept_bytes = 0
        self._kept: dict[int, tuple[TokenSequence, Any]] = {}

    def keep(self, known: Sequence[TokenSequence]) -> None:
        """Let the states of these sequences, and no others, be kept when they are first met, up to `most_bytes`."""
        self._kept = {id(one): (one, None) for one in known}
        self._kept_bytes = 0

    def states(self, sequence: TokenSequence) -> Any:
        """Return the last states at the positions of a sequence that carry loss. Shape: (n, E)."""
        import torch

        _, kept = self._kept.get(id(sequence), (None, None))
        if kept is not None:
            return kept
        (batch,) = sequences.isolated_batches([sequence], max_batch_tokens=1, pad_id=0)
        with torch.inference_mode():
            computed_NE = sequences.scored(self._model, batch).hidden_ND
        states_NE = computed_NE.clone()  # outside of inference mode: a tensor that a graph may hold
        if id(sequence) in self._kept and self._kept_bytes + states_NE.nbytes <= self._most_bytes:
            self._kept[id(sequence)] = (sequence, states_NE)
            self._kept_bytes += states_NE.nbytes
        return states_NE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DistilLoss:
    """A loss for every row of a micro-batch, in the place of `sequences.example_losses`.

    `weigh` says what counts for a row; `projection` (E, D) maps the student's states to the teacher's width, and is
    None where both are as wide or no state is compared.
    """

    teacher: Teacher
    weigh: Callable[[TokenSequence], Weights]
    temperature: float = 1.0
    normalise: Normalise = "token"
    projection: Any = None
    name: str = field(default="distil", kw_only=True)

    def __call__(self, model: Any, batch: MicroBatch, frozen: FrozenPrefix | None = None) -> Any:
        """Return each row's loss. Shape: (B,) float32. Rows that no teacher is asked about are plain cross entropy."""
        weights = [self.weigh(key) for key in batch.keys]
        if not any(one.teacher_needed for one in weights) and all(one.hard == 1 for one in weights):
            return sequences.example_losses(model, batch, frozen)
        found = sequences.scored(model, batch, frozen)
        taught_NE = self._taught(batch, weights)
        losses_N = self._token_losses(model, found, taught_NE, batch, weights)
        if any(one.hidden > 0 for one in weights):
            states_NE = found.hidden_ND.float()
            if self.projection is not None:
                states_NE = states_NE @ self.projection.t()
            hidden_N = _per_position([one.hidden for one in weights], found)
            losses_N = losses_N + hidden_N * (states_NE - taught_NE.float()).square().mean(1)
        return found.means(losses_N, batch)

    def _taught(self, batch: MicroBatch, weights: list[Weights]) -> Any:
        """Return the teacher's states at the batch's scored positions, zeros where it has no say. Shape: (N, E)."""
        import torch

        head = self.teacher.head.weight
        counts = batch.loss_mask_BT.sum(1).tolist()
        rows = [
            self.teacher.states(key) if one.teacher_needed else head.new_zeros(count, head.shape[1])
            for key, one, count in zip(batch.keys, weights, counts, strict=True)
        ]
        return torch.cat(rows)

    def _token_losses(
        self, model: Any, found: Scored, taught_NE: Any, batch: MicroBatch, weights: list[Weights]
    ) -> Any:
        core = sequences.core_of(model)
        head = token_loss.head_of(core)
        if head is None:
            raise ConfigInvalid(f"{type(core).__name__} as a student: its head is no frozen linear map; take another")
        counts = batch.loss_mask_BT.sum(1).tolist() if self.normalise == "paper" else [1] * len(weights)
        square = self.temperature**2
        soft = soft_loss.SoftTargets(
            hidden_NE=taught_NE,
            head=self.teacher.head,
            hard_N=_per_position([one.hard for one in weights], found),
            soft_N=_per_position([one.soft * square * n for one, n in zip(weights, counts, strict=True)], found),
            temperature=self.temperature,
        )
        return soft_loss.mixed_losses(found.hidden_ND, found.targets_N, head, soft)


def check_pair(student: Any, student_tokenizer: Any, teacher: Any, teacher_tokenizer: Any, *, where: str) -> None:
    """Return when both models speak of the same tokens. Raises: ConfigInvalid naming the difference."""
    way_out = "soft labels need one vocabulary: take a teacher of the student's family, or soft_weight = 0"
    if student_tokenizer is not teacher_tokenizer:
        ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        if odd := sorted(ours.items() ^ theirs.items())[:2]:
            raise ConfigInvalid(
                f"{where}: teacher and student differ in {len(ours.items() ^ theirs.items())} tokens, e.g. "
                f"{', '.join(map(repr, odd))}; {way_out}"
            )
    logits = [sequences.core_of(model).get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    if logits[0] != logits[1]:
        raise ConfigInvalid(f"{where}: the student has {logits[0]} logits, the teacher {logits[1]}; {way_out}")


def _per_position(values: list[float], found: Scored) -> Any:
    """Return each position's share of a list over rows. Shape: (N,) float32."""
    import torch

    return torch.tensor(values, dtype=torch.float32).index_select(0, found.rows_N)
