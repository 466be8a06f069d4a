"""The values that travel a round, in order of appearance.

Every field here is releasable. A number that depends on private rows and is covered by no receipt (a loss, a row
count, an accuracy) has no field to live in. One exception is named: the seconds of a wave, which anybody on the wire
could clock. Otherwise what is public is a field, what may be private is an argument.
The first traveller, `PrivateRows`, is therefore not here but in `clients.private_rows`.

Legend of shapes: r = LoRA rank, d_in and d_out = features of the adapted linear map.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float32]

Relation: TypeAlias = Literal["add_or_remove_one"]
Composition: TypeAlias = Literal["fixed_schedule", "renyi_filter"]
"""How a site's ledger adds up: `fixed_schedule` by PLD and a plan, `renyi_filter` under a Renyi filter as well."""
Factor: TypeAlias = Literal["a", "b", "core"]
"""One of the matrices of an adapted map."""

Schedule: TypeAlias = Literal["both", "b", "rounds", "steps", "core"]
"""Which factors a learner moves, and when (`fl_app.factors`)."""

Precision: TypeAlias = Literal["float32", "float16", "int8"]
"""How the numbers of an adapter travel."""

ReleaseKind: TypeAlias = Literal["adapter", "vector", "histogram", "text"]
RefusalCode: TypeAlias = Literal["budget_spent", "policy", "ledger", "rows", "model", "internal"]

NO_HEAD = "0" * 64
"""What stands for the head of a ledger that has none to show: a simulated site's, or one without salt."""

REFUSAL_CODES: tuple[RefusalCode, ...] = ("budget_spent", "policy", "ledger", "rows", "model", "internal")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraFactors:
    """One adapted linear map.

    Shapes: a (r, d_in), b (d_out, r), core (r, r) or None for the identity, all float32;
    delta_W = (alpha / r) * b @ core @ a, shape (d_out, d_in).
    """

    a: Floats
    b: Floats
    core: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """A LoRA adapter of one base model.

    `layers` maps a module path of the base model to its factors; `alpha` is PEFT's lora_alpha; `base` is the content
    hash of the frozen base model, so that an adapter can never be put on another model by mistake.
    """

    layers: Mapping[str, LoraFactors]
    alpha: float
    base: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoissonGaussian:
    """`steps` noisy sums over Poisson-sampled units (DP-SGD).

    Each step samples every unit with probability `sample_rate`, clips its contribution to L2 norm `clip_norm` and
    adds N(0, (noise_multiplier * clip_norm)^2) to every coordinate of the sum.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    clip_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaussian:
    """`count` releases of a sum over all units, L2 sensitivity `clip_norm`, noise std noise_multiplier * clip_norm."""

    noise_multiplier: float
    clip_norm: float
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponential:
    """`count` draws of a mechanism of which only this is known: each is `epsilon`-DP."""

    epsilon: float
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundedRange:
    """`count` draws of an exponential mechanism: between neighbours the log-ratios of one draw differ by `span`.

    For draws from softmax(score / temperature), where neighbours move every score by at most d: span = 2 d /
    temperature. That is more than `Exponential(epsilon=span)` knows, and costs about a third of it.
    """

    span: float
    count: int = 1


MechanismEvent: TypeAlias = PoissonGaussian | Gaussian | Exponential | BoundedRange


@dataclass(frozen=True, slots=True, kw_only=True)
class DpReceipt:
    """What one release cost: a mechanism event, for one privacy unit, under one neighbouring relation."""

    event: MechanismEvent
    unit: str
    relation: Relation = "add_or_remove_one"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterRelease:
    """A DP-trained adapter.

    `scalars` are the noisy slopes that it was made of, where a zeroth-order learner made it: they travel in its place,
    and who knows the broadcast makes the same adapter of them (`fl_app.zeroth_order`). Shape: (steps,) float32.
    """

    adapter: Adapter
    scalars: Floats | None = None
    kind: Literal["adapter"] = "adapter"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VectorRelease:
    """Noisy vectors by name, e.g. dataset vectors per layer. Shapes: each (d,) float32."""

    vectors: Mapping[str, Floats]
    kind: Literal["vector"] = "vector"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HistogramRelease:
    """Noisy counts over public bins. Shapes: counts (len(bins),) float32."""

    bins: tuple[str, ...]
    counts: Floats
    kind: Literal["histogram"] = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedText:
    """A text and the id of the public control code that it was written under."""

    code: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRelease:
    """Synthetic texts that a site wrote by DP prediction."""

    texts: tuple[CodedText, ...]
    kind: Literal["text"] = "text"


Release: TypeAlias = AdapterRelease | VectorRelease | HistogramRelease | TextRelease


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Material:
    """What a site needs for its answer beside the adapter: public or already released texts, and vectors by name.

    Shapes: each vector (d,) float32.
    """

    texts: tuple[CodedText, ...] = ()
    vectors: Mapping[str, Floats] = field(default_factory=dict[str, "Floats"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalarWalk:
    """How the scalars of a zeroth-order round become an adapter (`fl_app.zeroth_order.replay`)."""

    steps: int
    learning_rate: float
    schedule: Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSpec:
    """What a site's release must look like, as far as the configuration says; `None` asks no site for anything.

    `factors` of an adapter travel, at `precision`; the others are those of the broadcast. With a `walk` only its
    scalars travel, a byte each.

    `vectors`: names and lengths of a vector release, or of a histogram its one entry. `codes`, `max_texts` and
    `max_bytes` (of one text, UTF-8) bound a text release. `survey`: names and lengths of what is summed once.
    """

    kind: ReleaseKind | None = "adapter"
    vectors: Mapping[str, int] = field(default_factory=dict[str, int])
    codes: frozenset[str] = frozenset()
    max_texts: int = 0
    max_bytes: int = 0
    survey: Mapping[str, int] = field(default_factory=dict[str, int])
    factors: tuple[Factor, ...] = ("a", "b")
    precision: Precision = "float32"
    walk: ScalarWalk | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Upload:
    """What one site sends in one round. `receipts` is None for a non-private release: its epsilon is infinite.

    `spent` is the epsilon, at the site's delta, of everything its ledger ever reserved, this round included: a
    function of public constants, claimed by the site. The server recomputes what this run's receipts add up to.
    `run` is the run and configuration that it answers, as `Broadcast.named`.

    `survey` is what the site counted and summed once for this run, beside its release: noisy counts of control codes
    (`codes`), a noisy sum of kernel features (`kernel`).

    `head` is the hash of the ledger's last line when the upload left. It is salted, so it tells nothing of the rows;
    whoever keeps it can show that the ledger was rolled back. NO_HEAD from a simulated site, whose replies must repeat.
    """

    site: str
    round: int
    release: Release
    receipts: tuple[DpReceipt, ...] | None
    spent: float
    run: str = ""
    head: str = NO_HEAD
    survey: VectorRelease | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A site's answer when it does not train: a code, an opaque id that its own log explains, and nothing else."""

    site: str
    round: int
    code: RefusalCode
    incident: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """How a site introduces itself: its public name and the public part of its policy.

    (`epsilon`, `delta`) is what its ledger promises whatever it is asked, held by `composition`; `delta` is twice the
    policy's after a change from a fixed schedule to a filter. `spent` is at the policy's own delta, so it is true at
    this one too. `head` as in `Upload`.

    What it can carry, as its owner declares it: `memory_mb` for training, the decoder block from which on it trains,
    the tokens it computes at once (0 says nothing), and the kinds of maps that it adapts (none: all). None of it is a
    function of the rows.
    """

    site: str
    epsilon: float
    delta: float
    unit: str
    spent: float
    head: str = NO_HEAD
    composition: Composition = "fixed_schedule"
    memory_mb: int = 0
    first_layer: int = 0
    micro_batch_tokens: int = 0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A site's score of a broadcast on public text; `items` 0 means that it has none."""

    site: str
    round: int
    items: int
    bits_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLevelCost:
    """What a merged adapter cost every site of the cohort, under a trusted server that added the noise.

    `spent` of `budget` is the epsilon at `delta` of everything that the cohort's ledger at the server ever reserved;
    `scope` says in words what that ledger covers.
    """

    receipt: DpReceipt
    spent: float
    budget: float
    delta: float
    scope: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merged:
    """The aggregate of one round. `rejected` maps a site to the rule its upload broke.

    `cost` is None unless the aggregator itself made the adapter private at client level.

    `adapter` is the aggregate of what the sites trained, on top of the broadcast's blocks. Where a run carries it on,
    the next round trains `start` (None: `adapter` itself) on top of those blocks and `blocks`.

    Guarantee: delta_W(adapter) = delta_W(start) + sum of delta_W(blocks), up to float32.
    """

    adapter: Adapter
    used: tuple[str, ...]
    rejected: Mapping[str, str] = field(default_factory=dict[str, str])
    cost: ClientLevelCost | None = None
    start: Adapter | None = None
    blocks: tuple[Adapter, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlCode:
    """A public condition for synthesis: `text` is the prefix a learner trains under and a synthesizer samples from."""

    id: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a draft comes from; `prompt` is the public text it was sampled after, empty when there was none.

    `voice` is the site whose release wrote it, empty when the merged adapter did.
    """

    round: int
    method: str
    code: str
    stream: str
    prompt: str = ""
    voice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A synthetic instruction before anyone has judged it. `id` is a hash of origin and text."""

    id: str
    instruction: str
    response: str
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """A filter's verdict: `kept` is a subsequence of the input, `dropped` maps each other draft's id to a reason."""

    kept: tuple[Draft, ...]
    dropped: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """A synthetic instruction with the professional's answer; `prompt` as in the draft's origin."""

    draft_id: str
    instruction: str
    answer: str
    teacher: str
    prompt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Broadcast:
    """What the server sends to every site at the start of a round. `run` names the run in every ledger.

    `head` is the last head that the server saw from the very site it writes to, empty when there was none; a site
    whose ledger does not contain it was rolled back, and refuses.

    `adapter` is what sites train; `blocks` are adapters under it that stay as they are: the model of the round is the
    base with the sum of all their delta_W.
    """

    run: str
    round: int
    adapter: Adapter
    config_digest: str
    head: str = ""
    material: Material = field(default_factory=Material)
    blocks: tuple[Adapter, ...] = ()

    @property
    def named(self) -> str:
        """The run as ledgers, outboxes and uploads know it: its name used for another configuration is another run."""
        return f"{self.run}.{self.config_digest[:16]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A measured value with its two-sided 95 % interval over `count` items."""

    value: float
    low: float
    high: float
    count: int
    higher_is_better: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """One line of the journal: what a round did, in figures that may all be published.

    `client_epsilon` is what the merged adapters so far cost every site, where the aggregator adds noise; else None.
    `rejections` are all replies that were turned away, each with its site, rule, tensor and reason.
    """

    round: int
    used: tuple[str, ...]
    refused: Mapping[str, str]
    rejected: Mapping[str, str]
    silent: tuple[str, ...]
    drafts_written: int
    drafts_kept: int
    dropped: Mapping[str, int]
    lessons: int
    epsilon: Mapping[str, float]
    scores: Mapping[str, Mapping[str, Score]]
    seconds: Mapping[str, float]
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]
    hashes: Mapping[str, str]
    client_epsilon: float | None = None
    rejections: tuple[Mapping[str, str], ...] = ()
