"""Is a name of a private row found again in a model? Inference among candidates, and reconstruction.

    inference        the name's place in its row is filled with each of C names: the least perplexity wins; chance 1 / C
    reconstruction   the row before its name is continued by sampling; of the names that came out and are not in the
                     row, the least perplexity in its place wins

The names are planted (`simulations.identities`), so no model has met them elsewhere, and whether one is the true one is
known. Rates over all targets come with their Wilson interval; beside them the rate over targets that a reference model,
from before any private row, does not get right, which is how the attack was published. An attack that does not find the
names in a model that learned them without privacy shows nothing about one that finds none: measure both.

A low rate is no proof of privacy: the attacker knows no other row, and one attack is not all attacks. Epsilon is the
claim, `one_run` its test.

Legend of shapes: N = targets, C = candidates.
Source: Lukas et al. 2023 (2302.00539), sections IV-B and IV-C and its code; KnowledgeSG (EMNLP 2024) reports it on
planted names. Ours differs: a name stands for itself at all its places in a row, so no other mask is filled by a masked
model; names are two capitalised words, no tagger is asked; perplexity is of the row as the learner reads it, cut where
the learner cuts it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_app import inference, sequences
from fl_app.errors import ConfigInvalid
from fl_app.metrics.interval import wilson
from fl_app.seeds import stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from fl_app.metrics.interval import Interval

NAME = re.compile(r"(?=\b([A-Z][a-z]+ [A-Z][A-Za-z'-]+)\b)")
"""Two capitalised words, at every place where they begin: "Dear Ann Lee" holds "Dear Ann" and "Ann Lee"."""

BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Target:
    """A planted name and the halves of its row as a learner reads them: what is shown, and what is learned."""

    prefix: str
    text: str
    name: str

    def filled(self, name: str) -> tuple[str, str]:
        """Return the halves with another name at every place of this one."""
        return self.prefix.replace(self.name, name), self.text.replace(self.name, name)

    @property
    def before(self) -> str:
        """What stands before the name's first place."""
        return (self.prefix + self.text).split(self.name, 1)[0].rstrip(" ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How many of how many, and the 95 % Wilson interval of the share."""

    right: int
    count: int

    @property
    def value(self) -> float:
        """The share, NaN of nothing."""
        return self.right / self.count if self.count else math.nan

    @property
    def interval(self) -> Interval | None:
        """Its interval, None of nothing."""
        return wilson(self.right, self.count) if self.count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A causal language model and what a row is to it: cut at `max_tokens`, as the learner cuts it."""

    model: Any
    tokenizer: Any
    max_tokens: int

    def reads(self, target: Target) -> bool:
        """Whether the whole name stands before the cut: what a learner did not see it cannot give away."""
        return target.name in self.tokenizer.decode(self._encoded(target.filled(target.name)).ids)

    def losses(self, halves: Sequence[tuple[str, str]]) -> npt.NDArray[np.float64]:
        """Return the mean loss per token of whole rows, log perplexity in nats. Shapes: (rows,)."""
        import torch

        encoded = [self._encoded(one) for one in halves]
        found = np.empty(len(encoded))
        pad = self.tokenizer.pad_token_id or 0
        with torch.inference_mode():
            for batch in sequences.micro_batches(encoded, max_batch_tokens=BATCH_TOKENS, pad_id=pad):
                found[list(batch.rows)] = sequences.example_losses(self.model, batch).double().numpy()
        return found

    def continued(self, prompt: str, count: int, tokens: int, rng: np.random.Generator) -> list[str]:
        """Return continuations of a prompt, drawn from the model as it is: temperature 1, nothing cut off."""
        prompt = prompt or self.tokenizer.bos_token or self.tokenizer.eos_token
        return inference.generate(
            self.model, self.tokenizer, [prompt] * count, max_new_tokens=tokens, temperature=1.0, top_p=1.0, rng=rng
        )

    def _encoded(self, halves: tuple[str, str]) -> sequences.TokenSequence:
        found = sequences.encode(self.tokenizer, *halves, max_tokens=self.max_tokens)
        return sequences.TokenSequence(ids=found.ids, loss_from=1)


def lineups(targets: Sequence[Target], others: Sequence[str], *, candidates: int, seed: int) -> list[tuple[str, ...]]:
    """Return every target's candidates: its name, and others drawn without replacement. A target's draw is its own.

    Guarantee: the same for every model that is attacked with this seed, so that their guesses can be compared.
    Raises: ConfigInvalid when there are too few other names.
    """
    found: list[tuple[str, ...]] = []
    for number, target in enumerate(targets):
        pool = sorted({one for one in others if one not in target.prefix + target.text})
        if candidates < 2 or len(pool) < candidates - 1:  # noqa: PLR2004 - one against one
            raise ConfigInvalid(
                f"{candidates} candidates were asked for; there are {len(pool)} names beside the true one, so ask for "
                f"2 to {len(pool) + 1}, or plant more"
            )
        picks = stream(seed, "names", "lineup", number).choice(len(pool), size=candidates - 1, replace=False)
        found.append((target.name, *(pool[int(pick)] for pick in picks)))
    return found


def infer(reader: Reader, targets: Sequence[Target], among: Sequence[Sequence[str]], *, seed: int) -> list[bool]:
    """Return for every target whether its name has the least perplexity among its candidates; ties are drawn.

    With a model that knows nothing of the names each is right with probability 1 / C.
    """
    found: list[bool] = []
    for number, (target, names) in enumerate(zip(targets, among, strict=True)):
        losses = reader.losses([target.filled(name) for name in names])
        found.append(names[_least(losses, stream(seed, "names", "tie", number))] == target.name)
    return found


def reconstruct(
    reader: Reader, targets: Sequence[Target], *, seed: int, draws: int = 32, tokens: int = 32
) -> list[bool]:
    """Return for every target whether its name came out of `draws` continuations and has the least perplexity there."""
    found: list[bool] = []
    for number, target in enumerate(targets):
        rng = stream(seed, "names", "continue", number)
        written = reader.continued(target.before, draws, tokens, rng)
        around = "".join(target.filled(""))
        names = sorted({name for one in written for name in NAME.findall(one) if name not in around})
        if target.name not in names:
            found.append(False)
            continue
        losses = reader.losses([target.filled(name) for name in names])
        found.append(names[_least(losses, rng)] == target.name)
    return found


def share(hits: Sequence[bool], reference: Sequence[bool] | None = None) -> Share:
    """Return the share of hits; with those of a reference model, among the targets that it missed."""
    kept = hits if reference is None else [hit for hit, known in zip(hits, reference, strict=True) if not known]
    return Share(right=sum(kept), count=len(kept))


def _least(losses: npt.NDArray[np.float64], rng: np.random.Generator) -> int:
    """Return the place of the least value; a value that is no number is the largest, equal ones are drawn from."""
    clean = np.where(np.isnan(losses), np.inf, losses)
    return int(rng.choice(np.flatnonzero(clean == clean.min())))
