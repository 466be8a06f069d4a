"""The server's models behind one small interface; methods ask for text and likelihoods, never for torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Log-likelihood (nats) of one continuation given its prompt, over its own tokens and bytes."""

    log_prob: float
    tokens: int
    bytes: int


class TextModel(Protocol):
    """A causal language model with at most one adapter on it. Prompts are complete texts, templates included."""

    name: str

    def chat(self, user: str) -> str:
        """Return the prompt that asks the model to answer `user`, in the model's own chat template."""
        ...

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, top_p: float, rng: np.random.Generator
    ) -> list[str]:
        """Return one continuation per prompt, in order, special tokens removed. temperature 0 is greedy."""
        ...

    def log_likelihood(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Likelihood]:
        """Return the likelihood of continuations[i] after prompts[i]."""
        ...

    def option_likelihood(self, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[Likelihood]]:
        """Return the likelihood of every option after its prompt; the prompt is computed once."""
        ...
