"""Which rank, and which layers, each site trains in a round: the same for all, listed, planned by memory, or drawn.

| kind      | a site's rank                                                             | method                    |
|-----------|---------------------------------------------------------------------------|---------------------------|
| same      | lora.rank                                                                 | FedIT, FFA-LoRA, FLoRA    |
| listed    | what the configuration says of it, lora.rank where it says nothing        | mixed ranks, by hand      |
| by_memory | the largest choice whose training fits the memory that the site declares  | FedPipe's idea            |
| drawn     | one choice for the whole cohort, anew in every round                      | DyLoRA, DP-DyLoRA         |

A site gets the first rank components of the adapter in their own scaling, alpha going with the rank, and may leave
lower decoder blocks, or kinds of maps, alone (`first_layer`, `targets` in its site.toml). All of this is public:
declared capacities, constants of the configuration, and draws from the run's seed. Nobody's rows have a part in it, so
a rank tells nothing of them.

With a rank drawn for each site, who took part would show in the coordinates that moved: DyLoRA draws one for all.

Source: FedPipe (2404.06448), section 4, for planning under a memory limit; ours is one choice per site instead of a
mixed integer program, and never looks at gradients, which would be a release. DP-DyLoRA (2405.06368), section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from fl_app import lora_cut
from fl_app.config import Section
from fl_app.errors import AdapterMismatch, ConfigInvalid
from fl_app.seeds import stream
from fl_app.text import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fl_app.lora import LoraSpec
    from fl_app.models import FrozenModel
    from fl_app.types import Hello

Choices: TypeAlias = Annotated[list[Annotated[int, Field(ge=1, le=512)]], Field(min_length=1)]


class SameRank(Section):
    """[server.ranks] kind = "same": lora.rank for everybody."""

    kind: Literal["same"] = "same"


class ListedRanks(Section):
    """[server.ranks] kind = "listed": `ranks` by site name."""

    kind: Literal["listed"]
    ranks: dict[str, Annotated[int, Field(ge=1, le=512)]]


class MemoryRanks(Section):
    """[server.ranks] kind = "by_memory": the largest of `choices` that fits what a site declares in site.toml.

    It is reckoned for the tokens that [client.learner] computes at once, or the fewer that the site declares. Blocks
    under the adapter grow with the rounds and are not in it.
    """

    kind: Literal["by_memory"]
    choices: Choices


class DrawnRank(Section):
    """[server.ranks] kind = "drawn": one of `choices` a round, for the whole cohort, from the run's seed."""

    kind: Literal["drawn"]
    choices: Choices

    @field_validator("choices")
    @classmethod
    def _in_order(cls, value: list[int]) -> list[int]:
        if sorted(set(value)) != value:
            raise ValueError("write each rank once, in rising order")
        return value


AnyRanks: TypeAlias = Annotated[SameRank | ListedRanks | MemoryRanks | DrawnRank, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranks:
    """Who trains what. `cost` returns the bytes that training a spec takes at so many tokens at once.

    `tokens` is what the sites' learner computes at once.
    """

    section: SameRank | ListedRanks | MemoryRanks | DrawnRank
    spec: LoraSpec
    seed: int
    tokens: int
    cost: Callable[[LoraSpec, int], int]

    @property
    def mixed(self) -> bool:
        """Whether sites of one round may train different ranks."""
        return self.section.kind in {"listed", "by_memory"}

    def of_round(self, number: int) -> LoraSpec:
        """Return the spec that the aggregate of a round is of: all of it, or the rank that was drawn."""
        if self.section.kind != "drawn":
            return self.spec
        chosen = stream(self.seed, "rank", number).choice(self.section.choices)
        return lora_cut.narrowed(self.spec, rank=int(chosen))

    def unfit(self, hello: Hello) -> str:
        """Return why a site can carry nothing of this run; empty when it can."""
        try:
            self.of_site(hello, 1)
        except AdapterMismatch as error:
            return one_line(str(error))
        return ""

    def of_site(self, hello: Hello, number: int) -> LoraSpec:
        """Return the spec that a site trains in a round.

        Raises: AdapterMismatch when nothing of the adapter, or no choice of a rank, fits what the site declares.
        """
        whole = lora_cut.narrowed(self.of_round(number), first_layer=hello.first_layer, targets=hello.targets)
        match self.section:
            case ListedRanks(ranks=ranks):
                return lora_cut.narrowed(whole, rank=ranks.get(hello.site, whole.rank))
            case MemoryRanks():
                return lora_cut.narrowed(whole, rank=self._planned(hello, whole))
            case _:
                return whole

    def _planned(self, hello: Hello, whole: LoraSpec) -> int:
        assert isinstance(self.section, MemoryRanks)
        choices = sorted(self.section.choices)
        if not hello.memory_mb:  # a site that declares nothing is asked for the least
            return choices[0]
        tokens = min(self.tokens, hello.micro_batch_tokens or math.inf)
        costs = {rank: self.cost(lora_cut.narrowed(whole, rank=rank), int(tokens)) for rank in choices}
        fitting = [rank for rank, cost in costs.items() if cost <= hello.memory_mb << 20]
        if not fitting:
            least = costs[choices[0]] >> 20
            raise AdapterMismatch(
                f"{hello.site} declares {hello.memory_mb} MB, and rank {choices[0]} takes about {least} MB at "
                f"{tokens} tokens at once; lower server.ranks.choices, or capacity.micro_batch_tokens in its site.toml"
            )
        return max(fitting)


def build(
    section: SameRank | ListedRanks | MemoryRanks | DrawnRank,
    *,
    spec: LoraSpec,
    seed: int,
    frozen: FrozenModel,
    tokens: int,
) -> Ranks:
    """Return the ranks of a run. Raises: ConfigInvalid when a choice exceeds lora.rank."""
    choices: Mapping[str, int] = {}
    match section:
        case ListedRanks(ranks=ranks):
            choices = {f"ranks.{site}": rank for site, rank in ranks.items()}
        case MemoryRanks(choices=found) | DrawnRank(choices=found):
            choices = {"choices": max(found)}
        case SameRank():
            pass
    for key, rank in choices.items():
        if rank > spec.rank:
            raise ConfigInvalid(f"server.ranks.{key} = {rank} exceeds lora.rank = {spec.rank}, which is the largest")
    return Ranks(
        section=section,
        spec=spec,
        seed=seed,
        tokens=tokens,
        cost=lambda some, at_once: training_bytes(frozen, some, at_once),
    )


def training_bytes(frozen: FrozenModel, spec: LoraSpec, tokens: int) -> int:
    """Return about how many bytes a site needs to train a spec with so many padded tokens at once.

    | part                       | bytes                                                                              |
    |----------------------------|------------------------------------------------------------------------------------|
    | frozen weights             | numbers x their width                                                              |
    | activations                | tokens x decoder blocks x (18 hidden + 4 intermediate) numbers of the model's type |
    | logits                     | tokens x vocabulary x (their width + 8), a chunk of 256 tokens at a time           |
    | per-example gradients      | tokens / 16 rows, the most that a batch of 16-token rows can have, x P float32     |
    | factors, Adam, the sum     | P x (4 + 8 + 8 + 8)                                                                |

    P is the number of trained coordinates; a tenth is added for attention's own matrices and the allocator. An
    estimate: `benchmarks/dp_step.py` measures peaks, docs/federated.md holds it against two.
    """
    config = frozen.model.config.get_text_config()
    width = next(frozen.model.parameters()).element_size()
    trained = sum(spec.rank * (d_in + d_out) for d_in, d_out in spec.shapes.values())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in frozen.model.parameters())
    per_token = 18 * config.hidden_size + 4 * (getattr(config, "intermediate_size", 0) or 4 * config.hidden_size)
    activations = tokens * config.num_hidden_layers * per_token * width
    logits = min(tokens, 256) * config.vocab_size * (width + 8)
    gradients = max(1, tokens // 16) * trained * 4
    return int(1.1 * (weights + activations + logits + gradients + 28 * trained))
