"""A site as decoder: its model reads each record as a prompt for another text of the kind, many records at a time.

    records -> buckets by a salted hash -> prompts -> scores of the next token, row by row -> a pen writes the text

What is written, and at what price, is the pen's business (one per bucket; `clients.learners`); the forward pass is in
`clients.token_stream`. Three rules hold whatever a pen does:

* A record lies in one bucket, chosen by a hash of itself, its code and the site's secret; the number of buckets is a
  public constant, so that a record more or less changes one bucket and no other. Rows of one unit and one code lie
  together. A bucket may be empty: it writes all the same.
* A row's scores depend on that row and on the text written so far, and on no other row, to the bit
  (`clients.token_stream`).
* A prompt is cut to public limits; what is public of it (template, code) is never cut.

A bucket's rows stay the same for the whole example, so its prefix never changes and the attention cache can be used.

Source: Amin et al. 2024 (2407.12108v2), algorithm 1. Ours differs in buckets whose number does not follow the rows (in
theirs "(h mod n/s)" moves every record when n crosses a multiple of s) and in a prompt that continues, not asks:
our local models are tuned to continue control codes.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import Field, field_validator

from clients.token_stream import Stream, rows_keep_apart
from fl_app import models
from fl_app.config import Section
from fl_app.errors import PolicyRefusal
from fl_app.types import BoundedRange, CodedText

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import numpy.typing as npt

    from clients.private_rows import PrivateRow, PrivateRows
    from clients.stages import Learner, PublicConstants, Workbench
    from fl_app.privacy.noise import NoiseSource
    from fl_app.types import DpReceipt

    Singles = npt.NDArray[np.float32]

TEXT, CODE = "{text}", "{code}"


class DecodingSection(Section):
    """What the sections of all learners that decode share; every value is public.

    `expected_units` is how many privacy units a bucket is expected to hold, the public normaliser. `template` holds
    {text} once and {code} anywhere: a prompt is the template around one text. `placeholder` stands for the text in the
    public prompt where the server sent none of that code. `batch_rows` splits the work and changes no result. A text is
    cut at `max_bytes` of UTF-8, or a server that allows no more would refuse all of them.
    """

    buckets_per_code: Annotated[int, Field(ge=1, le=100_000)]
    expected_units: Annotated[float, Field(ge=0.1, le=1e6)]
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    template: str = "{code}{text}\n\n{code}"
    placeholder: str = "..."
    batch_rows: Annotated[int, Field(ge=1, le=4096)] = 64
    max_bytes: Annotated[int, Field(ge=1, le=1_000_000)] = 4096

    @field_validator("template")
    @classmethod
    def _holds_a_text(cls, template: str) -> str:
        if template.count(TEXT) != 1:
            raise ValueError(f"a template holds {TEXT} exactly once, and {CODE} where the control code's text goes")
        return template


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class Bucket:
    """The rows that write together, under one code; `number` counts the buckets of a code. Hides its repr."""

    code: str
    number: int
    rows: tuple[PrivateRow, ...]


class Pen(Protocol):
    """What writes one bucket's texts: per token, `begin`, then `add` for every block of its rows, then `draw`."""

    @property
    def spent(self) -> bool:
        """Whether it can write no further token."""
        ...

    def begin(self, public_V: Singles | None) -> None:
        """Take the scores that the public prompt gives the next token; None when nobody asked for them."""
        ...

    def add(self, scores_RV: Singles) -> None:
        """Take the scores that some of the bucket's rows give the next token."""
        ...

    def draw(self, noise: NoiseSource) -> int:
        """Return the next token, at the announced price."""
        ...


def sorted_into_buckets(rows: PrivateRows, bench: Workbench, *, per_code: int, unit: str) -> list[Bucket]:
    """Return `per_code` buckets for each of the bench's codes, codes in order, empty ones included.

    A row of an unknown code lies in none. With unit "record" the hash is of the row's content: a line number would
    change with every line put in before it.

    Guarantee: adding or removing a unit changes, of each code, at most the one bucket that its rows lie in.
    Raises: PolicyRefusal when the bench has no code.
    """
    if not bench.codes:
        raise PolicyRefusal("no control code beside the rows: a site that writes needs codes.jsonl")
    found: dict[tuple[str, int], list[PrivateRow]] = {
        (code, number): [] for code in sorted(bench.codes) for number in range(per_code)
    }
    for row in rows.examples:
        if row.code in bench.codes:
            found[row.code, _bucket_of(row, per_code, unit, bench.secret)].append(row)
    return [Bucket(code=code, number=number, rows=tuple(held)) for (code, number), held in found.items()]


def _bucket_of(row: PrivateRow, per_code: int, unit: str, secret: bytes) -> int:
    parts = (row.code, row.instruction, row.output) if unit == "record" else (row.code, row.unit)
    message = b"".join(len(part := text.encode("utf-8", "replace")).to_bytes(8, "big") + part for text in parts)
    digest = hmac.new(b"stillroom.bucket" + secret, message, hashlib.sha256).digest()
    return int.from_bytes(digest[:16], "big") % per_code


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """How a text becomes a prompt: public tokens around at most `max_text` tokens of text."""

    tokenizer: Any
    template: str
    max_text: int

    def around(self, code: str, text: str) -> tuple[int, ...]:
        """Return the tokens of the template with the code's text and, in its place, the first tokens of `text`."""
        head, tail = (self._ids(part.replace(CODE, code)) for part in self.template.split(TEXT))
        ids = (*head, *self._ids(text)[: self.max_text], *tail)
        start = self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        return (start,) * max(0, 2 - len(ids)) + ids  # one token is read before the one whose scores count

    def width(self, codes: Iterable[str]) -> int:
        """Return how long the longest prompt of these codes may be: a public constant."""
        around = (sum(len(self._ids(part.replace(CODE, code))) for part in self.template.split(TEXT)) for code in codes)
        return max(2, self.max_text + max(around, default=0))

    def stop(self, code: str) -> str:
        """Return what stands between two texts of the template, where a text ends even without an end token."""
        return self.template.split(TEXT)[1].replace(CODE, code)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def check_announced(learner: Learner, receipts: tuple[DpReceipt, ...], constants: PublicConstants) -> BoundedRange:
    """Return the draws that the receipts pay for. Raises: PolicyRefusal when the learner did not announce them."""
    event = receipts[0].event if receipts else None
    if not isinstance(event, BoundedRange) or receipts != learner.announce(constants, 1 / event.span):
        raise PolicyRefusal(f"receipts {receipts} were not announced by this learner")
    return event


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How a site writes in one round, in public constants."""

    prompts: Prompts
    max_new_tokens: int
    examples: int
    batch_rows: int
    max_bytes: int
    asks_public: bool


def write_texts(
    model: Any, buckets: Sequence[Bucket], pens: Sequence[Pen], task: Task, bench: Workbench, placeholder: str
) -> tuple[CodedText, ...]:
    """Return the texts that the pens write for their buckets, in order, without empty ones.

    A text ends with the end token, with what stands between two texts of the template, after `max_new_tokens`, or when
    the pen is spent; a bucket writes at most `examples`. All of that follows from tokens already drawn.
    """
    most = task.prompts.width(bench.codes.values()) + task.max_new_tokens
    models.check_positions(bench.model, most, whole_cache=True)
    shots = _shots(bench, placeholder)
    together = task.batch_rows if rows_keep_apart(model, task.batch_rows) else 1
    written: dict[int, list[str]] = {place: [] for place in range(len(buckets))}
    for wave in _waves(buckets, task.batch_rows):
        private, public = _streams(model, buckets, wave, task, bench, shots, together)
        for _ in range(task.examples):
            private.restart()
            if public:
                public.restart()
            texts = _one_example(buckets, wave, pens, task, bench, private, public)
            for place, text in texts.items():
                written[place].append(text)
    cut = [(place, _cut(text, task.max_bytes)) for place, texts in written.items() for text in texts]
    return tuple(CodedText(code=buckets[place].code, text=text) for place, text in cut if text)


def _cut(text: str, most: int) -> str:
    """Return the text without blanks around it, cut before the character that would not fit."""
    return text.strip().encode("utf-8", "replace")[:most].decode("utf-8", "ignore").strip()


def _one_example(
    buckets: Sequence[Bucket],
    wave: Sequence[int],
    pens: Sequence[Pen],
    task: Task,
    bench: Workbench,
    private: Stream,
    public: Stream | None,
) -> dict[int, str]:
    """Return one text of every bucket of the wave whose pen is not spent."""
    tokenizer = task.prompts.tokenizer
    ids: dict[int, list[int]] = {place: [] for place in wave if not pens[place].spent}
    texts: dict[int, str] = {}
    for _ in range(task.max_new_tokens):
        active = {place for place in ids if place not in texts}
        if not active:
            break
        told = {place: scores_1V[0] for place, scores_1V in public.scores(active)} if public else {}
        for place in sorted(active):
            pens[place].begin(told.get(place))
        for place, scores_RV in private.scores(active):
            pens[place].add(scores_RV)
        drawn: dict[int, int] = {}
        for place in sorted(active):
            drawn[place] = pens[place].draw(bench.noise)
            ids[place].append(drawn[place])
            ended = drawn[place] == tokenizer.eos_token_id or pens[place].spent
            text = tokenizer.decode(ids[place], skip_special_tokens=True)
            stop = task.prompts.stop(bench.codes[buckets[place].code])
            if stop and stop in text:
                ended, text = True, text[: text.index(stop)]
            if ended or len(ids[place]) == task.max_new_tokens:
                texts[place] = text
        for stream in (private, public):
            if stream:
                stream.append(drawn)
    return texts


def _waves(buckets: Sequence[Bucket], rows: int) -> list[list[int]]:
    """Return runs of buckets that are decoded side by side: at least `rows` rows each, so that batches are full."""
    waves: list[list[int]] = [[]]
    held = 0
    for place, bucket in enumerate(buckets):
        if held >= rows:
            waves.append([])
            held = 0
        waves[-1].append(place)
        held += max(1, len(bucket.rows))
    return waves


def _streams(
    model: Any,
    buckets: Sequence[Bucket],
    wave: Sequence[int],
    task: Task,
    bench: Workbench,
    shots: dict[str, list[str]],
    together: int,
) -> tuple[Stream, Stream | None]:
    private = [
        (task.prompts.around(bench.codes[buckets[place].code], row.instruction), place)
        for place in wave
        for row in buckets[place].rows
    ]
    width = task.prompts.width(bench.codes.values())
    streams = [Stream(model, [p for p, _ in private], [o for _, o in private], width=width, together=together)]
    if task.asks_public:
        public: list[tuple[int, ...]] = []
        for place in wave:
            bucket = buckets[place]
            texts = shots[bucket.code]
            public.append(task.prompts.around(bench.codes[bucket.code], texts[bucket.number % len(texts)]))
        streams.append(Stream(model, public, list(wave), width=width, together=together))
    return streams[0], streams[1] if task.asks_public else None


def _shots(bench: Workbench, placeholder: str) -> dict[str, list[str]]:
    """Return for every code the public texts that stand in the public prompts: the server's, or the placeholder."""
    sent: dict[str, list[str]] = {code: [] for code in bench.codes}
    for shot in bench.material.texts:
        if shot.code in sent:
            sent[shot.code].append(shot.text)
    return {code: texts or [placeholder] for code, texts in sent.items()}
