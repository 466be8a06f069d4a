"""The [client] table, and the site's own policy (`site.toml`), which wins over anything the server asks."""

from __future__ import annotations

import hashlib
import tomllib
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from clients.learners import AnyLearner
from clients.stages import PublicConstants
from clients.survey import SurveySection
from fl_app.config import Section, Tree, parse
from fl_app.errors import ConfigInvalid
from fl_app.hash_chain import canonical
from fl_app.types import Composition, ReleaseKind

if TYPE_CHECKING:
    from pathlib import Path


class ProbeSection(Section):
    """[client.probe]: public texts on which a site scores what it was sent; 0 items answers with no score."""

    items: Annotated[int, Field(ge=0, le=1000)] = 0


class ClientSection(Section):
    """[client]: what the server asks of every site. `epsilon` is the most one run may spend of a site's budget.

    `survey`, when the table is there, is what a site counts once in a run, beside the learner's releases.
    """

    learner: AnyLearner
    survey: SurveySection | None = None
    probe: ProbeSection = ProbeSection()
    epsilon: Annotated[float, Field(gt=0)] = 1e6


class _Site(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class _Privacy(Section):
    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Annotated[str, Field(min_length=1)]
    max_rows_per_unit: Annotated[int, Field(ge=1)] = 1
    composition: Composition = "fixed_schedule"


class _Constants(Section):
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    expected_batch: Annotated[int, Field(ge=1)]
    max_tokens: Annotated[int, Field(ge=8, le=8192)]


class _Limits(Section):
    min_noise_multiplier: Annotated[float, Field(gt=0)]
    max_noise_multiplier: Annotated[float, Field(gt=0)]
    max_steps_per_round: Annotated[int, Field(ge=1)]
    max_clip_norm: Annotated[float, Field(gt=0)] = 1e6
    max_rounds: Annotated[int, Field(ge=1)]
    release_kinds: list[ReleaseKind]
    base_models: list[str] = Field(default_factory=list)
    allowed_configs: list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(default_factory=list)
    simulation: bool = False
    non_private: bool = False


class _Capacity(Section):
    memory_mb: Annotated[int, Field(ge=0)] = 0
    first_layer: Annotated[int, Field(ge=0)] = 0
    micro_batch_tokens: Annotated[int, Field(ge=0)] = 0
    targets: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,80}$")]] = Field(default_factory=list)


class SitePolicy(Section):
    """`site.toml`: what the data holder allows. `max_noise_multiplier`: above it a release would carry no signal.

    `composition`: under "fixed_schedule" the first reservation fixes noise multiplier and sample rate for the life of
    the ledger; steps, rounds and runs stay open. "renyi_filter" lets every run choose its noise from what is left; it
    costs 5 to 15 % more noise (more where few steps at a low rate are planned), and a ledger once held by it stays so.
    `max_clip_norm` bounds what one unit moves a sum by, noise and all; no epsilon depends on it, so its default is the
    learners' own limit. `allowed_configs` lists the digests of the configurations that may train here; empty: any.
    `non_private`: whether a learner without noise may run, after which this ledger never certifies anything again.

    [capacity] is what the machine can carry, and public: `memory_mb` for a planner of ranks (0: not said), the decoder
    block from which on it trains, the most tokens it computes at once (0: what the configuration asks), and the kinds
    of maps that it adapts (none: all). None of it moves a result but through the rank and the layers that the server
    then asks for.
    """

    site: _Site
    privacy: _Privacy
    constants: _Constants
    limits: _Limits
    capacity: _Capacity = _Capacity()

    @property
    def id(self) -> str:
        """The SHA-256 of the policy as it was understood: equal for files that say the same."""
        return hashlib.sha256(canonical(self.model_dump(mode="json"))).hexdigest()

    def public_constants(self) -> PublicConstants:
        """Return the constants a learner may use."""
        return PublicConstants(
            sample_rate=self.constants.sample_rate,
            expected_batch=self.constants.expected_batch,
            max_tokens=self.constants.max_tokens,
            max_rows_per_unit=1 if self.privacy.unit == "record" else self.privacy.max_rows_per_unit,
            unit=self.privacy.unit,
        )


def read_client(tree: Tree) -> ClientSection:
    """Return the [client] table of a configuration tree."""
    return parse(ClientSection, tree.get("client", {}), where="client")


def read_policy(directory: Path) -> SitePolicy:
    """Return the policy of a site directory.

    Raises: ConfigInvalid when `site.toml` is absent, cannot be read, or says something unknown.
    """
    path = directory / "site.toml"
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigInvalid(f"no site.toml in {directory}; a site without a policy trains nothing") from None
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOML and UTF-8 errors are ValueErrors
        raise ConfigInvalid(f"{path} is not TOML: {error}") from None
    return parse(SitePolicy, tree, where="site.toml")
