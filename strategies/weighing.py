"""Sums over sites with public weights: what every aggregator that adds up its uploads has in common.

    oracle   = sum_k p_k delta_W_k,   p_k = w_k / sum of w over the sites that are there
    delta_W  = (alpha_k / r_k) b_k @ core_k @ a_k

The weights are constants of the configuration and known to all; without any every site counts the same. They are never
row counts that sites send: under add-or-remove-one DP the number of rows is private (federated-methods-and-dp.md 0.6).
Published methods weigh by row counts; who knows the sizes of its sites publicly may write them down here.

A member is a section with one method, `merge`, that makes an adapter of adapters and their shares; what it may be given
is said in class constants, and checked here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from fl_app import lora, lora_start
from fl_app.config import Section
from fl_app.errors import AdapterMismatch, ConfigInvalid, RoundFailed
from fl_app.seeds import stream
from fl_app.types import Merged
from strategies import products

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fl_app.types import Adapter, Broadcast, Upload
    from strategies.stages import Setting


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Whole:
    """A sum of adapters, as `Merged` says it: delta_W(adapter) = delta_W(start) + sum of delta_W(blocks)."""

    adapter: Adapter
    start: Adapter | None = None
    blocks: tuple[Adapter, ...] = ()


class Weighed(Section):
    """A section of [server.aggregator] whose sites count by public `weights`, by name; empty: all the same.

    `carries`: the next round can go on from the result. `one_rank` and `no_cores` are why uploads of mixed ranks, or
    with cores, are refused; empty where they are welcome. `anew`: every round starts from a freshly drawn adapter.
    """

    carries: ClassVar[bool] = True
    one_rank: ClassVar[str] = ""
    no_cores: ClassVar[str] = ""
    anew: ClassVar[bool] = False

    kind: Any
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)

    def build(self, setting: Setting) -> WeighedSum:
        """Return the stage. Raises: ConfigInvalid for too few weights, or a start that cannot be drawn here."""
        if self.weights and len(self.weights) < setting.sites:
            raise ConfigInvalid(
                f"server.aggregator.weights names {len(self.weights)} sites ({', '.join(sorted(self.weights))}), and "
                f"server.network.sites = {setting.sites}: name every site, or none"
            )
        if self.anew and setting.init == "weights":
            raise ConfigInvalid(
                f'server.aggregator: {self.kind} begins every round with a fresh adapter, and lora.init = "weights" '
                'takes one from the base model, which no aggregator holds; write lora.init = "orthonormal"'
            )
        return WeighedSum(section=self, setting=setting)

    def merge(
        self, adapters: Sequence[Adapter], shares: Sequence[float], broadcast: Broadcast, setting: Setting
    ) -> Whole:
        """Return the sum of the adapters in these shares, or what the method takes for it."""
        raise NotImplementedError

    def check(self, adapters: Mapping[str, Adapter], start: Adapter) -> None:
        """Raise `AdapterMismatch` unless the adapters answer the broadcast and are of the kind the method can add."""
        if self.no_cores and (lora.has_core(start) or any(map(lora.has_core, adapters.values()))):
            raise AdapterMismatch(f"{self.kind} takes adapters without cores: {self.no_cores}; use mean_factors")
        products.check_maps(adapters, start)
        if self.one_rank:
            try:
                products.check_maps(adapters, start, same_rank=True)
            except AdapterMismatch as error:
                raise AdapterMismatch(f"{error} ({self.kind} {self.one_rank})") from None


class Wrapping(Section):
    """A section of [server.aggregator] that looks at uploads first and lets `inner` add them up."""

    one_rank: ClassVar[str] = "measures what an upload changed, and a site of a smaller rank begins elsewhere"

    inner: Any

    @property
    def carries(self) -> bool:
        """Whether a next round can go on from the result."""
        return self.inner.carries


@dataclass(frozen=True, slots=True, kw_only=True)
class WeighedSum:
    """An `Aggregator`: a section's `merge` over the uploads of a round, in the order of the sites' names."""

    section: Weighed
    setting: Setting

    def __call__(self, uploads: Sequence[Upload], broadcast: Broadcast) -> Merged:
        """Return the sum. Raises: RoundFailed for a site without a weight; AdapterMismatch; ValueError."""
        adapters = products.by_site(uploads)
        self.section.check(adapters, broadcast.adapter)
        weighed = shares(self.section.weights, adapters, round_number=broadcast.round)
        whole = self.section.merge(list(adapters.values()), weighed, broadcast, self.setting)
        return Merged(adapter=whole.adapter, used=tuple(adapters), start=whole.start, blocks=whole.blocks)


def shares(weights: Mapping[str, float], sites: Iterable[str], *, round_number: int) -> list[float]:
    """Return the share of each site, in their order; they sum to 1 up to float64.

    Raises: RoundFailed for a site that a table of weights does not name.
    """
    there = list(sites)
    if not weights:
        return [1 / len(there)] * len(there)
    if unnamed := [site for site in there if site not in weights]:
        raise RoundFailed(
            f"round {round_number}: {', '.join(unnamed)} sent an adapter and has no weight in "
            f"server.aggregator.weights (known: {', '.join(sorted(weights))}). The target of the last round is kept; "
            "name every site, or none"
        )
    total = math.fsum(weights[site] for site in there)
    return [weights[site] / total for site in there]


def fresh(broadcast: Broadcast, setting: Setting) -> Adapter:
    """Return the adapter that the next round begins with where the sum of this one has become a block: delta_W 0."""
    rng = stream(setting.seed, "initial adapter", broadcast.round + 1)
    return lora_start.initial(lora.spec_like(broadcast.adapter), rng, setting.init)


def refuse_inner(value: Any, reasons: Mapping[str, str], *, way_out: str) -> Any:
    """Return what a wrapper is to wrap, as it came. Raises: ValueError with the reason for its kind, if it has one."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", value)
    if isinstance(kind, str) and kind in reasons:
        raise ValueError(f"{kind!r} cannot be wrapped: {reasons[kind]}; {way_out}")
    return value
