"""The server's models behind one small interface; methods ask for text and likelihoods, never for torch.

The lab owns the local model W_loc (with whatever adapter a stage puts on it) and the professional W_pro, and it owns
the cores: work is cut into fixed batches, each a pure function of its inputs and its own random stream, and the
batches run on `threads` threads of one torch thread each. torch leaves the interpreter lock inside its kernels, so
two threads use two cores; and since cutting and streams do not depend on `threads`, neither does any result.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from fl_app import inference, lora, low_rank, models, row_adapters, steering

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from fl_app.inference import Likelihood
    from fl_app.models import FrozenModel
    from fl_app.types import Adapter, Floats, VectorRelease

InT = TypeVar("InT")
OutT = TypeVar("OutT")


class TextModel(Protocol):
    """A causal language model with at most one adapter on it. Prompts are complete texts, templates included."""

    @property
    def name(self) -> str:
        """Name for people; the teacher of a lesson."""
        ...

    def chat(self, user: str) -> str:
        """Return the prompt that asks the model to answer `user`, in the model's own chat template."""
        ...

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, top_p: float, rng: np.random.Generator
    ) -> list[str]:
        """Return one continuation per prompt, in order, special tokens removed. temperature 0 is greedy."""
        ...

    def option_likelihood(self, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[Likelihood]]:
        """Return the likelihood of every option after its prompt; the prompt is computed once."""
        ...


class Writer(Protocol):
    """A model that is asked for text and for nothing else: one that is steered has no likelihoods of its own."""

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, top_p: float, rng: np.random.Generator
    ) -> list[str]:
        """See `TextModel.generate`."""
        ...


class ServerModels(Protocol):
    """What a method may ask of the lab."""

    @property
    def professional(self) -> TextModel:
        """W_pro."""
        ...

    @property
    def public_words(self) -> frozenset[str]:
        """Lower-case words of the public text: never personal data."""
        ...

    @property
    def local(self) -> FrozenModel:
        """The bare W_loc."""
        ...

    @property
    def surveys(self) -> Mapping[str, VectorRelease]:
        """What every site that was ever sound counted and summed, by site; filled in the first round."""
        ...

    @property
    def directory(self) -> Path | None:
        """Where a method may keep what must outlive the process; None when there is no run."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabModel:
    """A `TextModel` over a torch model; batches of rows of similar length run side by side."""

    name: str
    tokenizer: Any
    model: Any
    system: str
    batch_rows: int
    pool: ThreadPoolExecutor
    progress: Callable[[int, int], None]
    directions: Mapping[int, Floats] = field(default_factory=dict[int, "Floats"])
    lengths: Mapping[int, float] = field(default_factory=dict[int, float])

    def steered(self, directions: Mapping[int, Floats], lengths: Mapping[int, float]) -> Writer:
        """Return the model pushed, for prompt number n, along row n of `directions` (`fl_app.steering.steer`).

        Shapes: directions (prompts, D) by layer. All prompts are written in the same batches, whatever their rows.
        """
        return replace(self, directions=directions, lengths=lengths)

    def chat(self, user: str) -> str:
        """See `TextModel.chat`."""
        return models.chat_prompt(self.tokenizer, user, self.system)

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, top_p: float, rng: np.random.Generator
    ) -> list[str]:
        """See `TextModel.generate`. Each batch draws its own seed from `rng`, in order, before any batch runs."""
        batches = _batches([len(prompt) for prompt in prompts], self.batch_rows)
        seeds = [int(rng.integers(2**63)) for _ in batches]

        def one(job: tuple[list[int], int]) -> list[str]:
            rows, seed = job
            with self._pushed(rows):
                return inference.generate(
                    self.model,
                    self.tokenizer,
                    [prompts[row] for row in rows],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    rng=np.random.default_rng(seed),
                )

        return _in_order(batches, _run(self.pool, one, list(zip(batches, seeds, strict=True)), self.progress))

    def option_likelihood(self, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[Likelihood]]:
        """See `TextModel.option_likelihood`. Prompts of one batch have the same number of options."""
        widths = [len(row) for row in options]
        batches: list[list[int]] = []
        for width in sorted(set(widths)):
            members = [i for i, w in enumerate(widths) if w == width]
            lengths = [len(prompts[i]) + max(len(option) for option in options[i]) for i in members]
            rows = max(1, self.batch_rows // width)
            batches += [[members[i] for i in batch] for batch in _batches(lengths, rows)]

        def one(rows: list[int]) -> list[list[Likelihood]]:
            return inference.option_likelihood(
                self.model, self.tokenizer, [prompts[row] for row in rows], [options[row] for row in rows]
            )

        return _in_order(batches, _run(self.pool, one, batches, self.progress))

    def _pushed(self, rows: list[int]) -> AbstractContextManager[None]:
        """Return what pushes the passes of the calling thread along these rows; nothing where none is steered."""
        if not self.directions:
            return nullcontext()
        chosen = {layer: direction[rows] for layer, direction in self.directions.items()}
        return steering.steer(self.model, chosen, self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowsModel:
    """W_loc as several writers: each prompt says whose adapter answers it, and batches hold rows of all of them."""

    frozen: FrozenModel
    adapters: Mapping[str, Adapter]
    batch_rows: int
    pool: ThreadPoolExecutor
    progress: Callable[[int, int], None]

    def generate(
        self,
        prompts: Sequence[str],
        voices: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        rng: np.random.Generator,
    ) -> list[str]:
        """Return one continuation per prompt, in order, written by the adapter of that name in `voices`.

        Every prompt has a stream of its own, drawn from `rng` in order: a text depends on its prompt, its adapter and
        its place, up to rounding, and on nothing that another adapter holds.
        """
        seeds = [int(rng.integers(2**63)) for _ in prompts]
        names = sorted(set(voices))
        batches = [
            sorted(rows, key=lambda row: (voices[row], row))  # rows of one adapter side by side need no copy
            for rows in _batches([len(prompt) for prompt in prompts], self.batch_rows)
        ]

        def one(rows: list[int]) -> list[str]:
            # A module tree of its own: threads share the weights, and each puts its batch's adapters on.
            adapters = [self.adapters[name] for name in names]
            model = row_adapters.attach(self.frozen, adapters, [names.index(voices[row]) for row in rows])
            return inference.generate(
                model,
                self.frozen.tokenizer,
                [prompts[row] for row in rows],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                rng=[np.random.default_rng(seeds[row]) for row in rows],
            )

        return _in_order(batches, _run(self.pool, one, batches, self.progress))


class Lab:
    """The server's models and cores for one run. `under` are adapters that lie under every one that W_loc is given."""

    def __init__(
        self,
        *,
        local: FrozenModel,
        professional: FrozenModel,
        professional_adapter: Adapter | None,
        professional_name: str,
        system: str,
        threads: int,
        batch_rows: int,
        public_words: frozenset[str],
        directory: Path | None = None,
    ) -> None:
        self.local = local
        self.directory = directory
        self.public_words = public_words
        self.surveys: Mapping[str, VectorRelease] = {}
        self.under: tuple[Adapter, ...] = ()
        self.threads = threads
        self.system = system
        self.progress: Callable[[int, int], None] = lambda _done, _total: None
        self._batch_rows = batch_rows
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lab")
        self._professional = self._text(professional_name, professional, professional_adapter)
        base = professional.resolved.sha256
        self.professional_sha256 = base if professional_adapter is None else lora.sha256(professional_adapter)

    @property
    def professional(self) -> LabModel:
        """W_pro with its own adapter, if it has one."""
        return self._professional

    def local_with(self, adapter: Adapter | None, name: str) -> LabModel:
        """Return W_loc carrying `adapter`, or bare."""
        return self._text(name, self.local, None if adapter is None else self._on_blocks(adapter))

    def local_with_rows(self, adapters: Mapping[str, Adapter]) -> RowsModel:
        """Return W_loc as one writer per adapter, all writing in the same batches."""
        return RowsModel(
            frozen=self.local,
            adapters={name: self._on_blocks(adapter) for name, adapter in adapters.items()},
            batch_rows=self._batch_rows,
            pool=self._pool,
            progress=self._progressed,
        )

    def trainee(self, adapter: Adapter) -> Any:
        """Return a PEFT model of W_loc whose adapter may be trained; it shares the frozen weights."""
        return lora.attach(self.local, adapter, self.under)

    def side_by_side(self, work: Callable[[InT], OutT], jobs: Sequence[InT]) -> list[OutT]:
        """Return `work` of every job, in order, computed on the lab's threads."""
        return list(self._pool.map(work, jobs))

    def close(self) -> None:
        """Give the threads back."""
        self._pool.shutdown()

    def _on_blocks(self, adapter: Adapter) -> Adapter:
        return low_rank.compact(lora.stacked([adapter, *self.under])) if self.under else lora.plain(adapter)

    def _progressed(self, done: int, total: int) -> None:
        self.progress(done, total)

    def _text(self, name: str, frozen: FrozenModel, adapter: Adapter | None) -> LabModel:
        return LabModel(
            name=name,
            tokenizer=frozen.tokenizer,
            model=frozen.model if adapter is None else lora.attach(frozen, adapter),
            system=self.system,
            batch_rows=self._batch_rows,
            pool=self._pool,
            progress=self._progressed,
        )


def _batches(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Cut indices, sorted by length, into runs of at most `rows`."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[i : i + rows] for i in range(0, len(order), rows)]


def _run(
    pool: ThreadPoolExecutor,
    one: Callable[[InT], OutT],
    jobs: Sequence[InT],
    progress: Callable[[int, int], None],
) -> list[OutT]:
    results: list[OutT] = []
    for result in pool.map(one, jobs):
        results.append(result)
        progress(len(results), len(jobs))
    return results


def _in_order(batches: list[list[int]], results: list[list[OutT]]) -> list[OutT]:
    found = {row: out for rows, outs in zip(batches, results, strict=True) for row, out in zip(rows, outs, strict=True)}
    return [found[row] for row in range(len(found))]
