"""The [simulation] table: which corpus becomes which sites, and on what the apps run. No app reads it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fl_app.config import Section, Tree, parse
from simulations.partition import Partition
from simulations.policy_template import PolicyTemplate

EMBEDDED = "embedded"


class SimulationSection(Section):
    """[simulation].

    `grid` is what carries the messages: `in-process` (no Ray; tests and small machines) or `ray` with `workers`
    actors of one core each. `corpus` is "embedded" or a file or hub id; a relative path starts at the project's root.
    For a corpus without control codes, each value of `code_column` becomes one, with `code_text` as its text
    ("{value}" is replaced). `policy_overrides` changes the policy of the site of that name.
    """

    grid: Literal["in-process", "ray"] = "in-process"
    workers: Annotated[int, Field(ge=1, le=256)] = 2
    corpus: str = EMBEDDED
    join_input: Literal["append", "input_only"] = "append"
    partition: Partition
    policy: PolicyTemplate
    policy_overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    plant_share: Annotated[float, Field(ge=0, le=1)] | None = None
    max_rows_per_site: Annotated[int, Field(ge=0)] = 0
    code_column: str = ""
    code_text: str = "{value}:\n"


def read_simulation(tree: Tree) -> SimulationSection:
    """Return the [simulation] table of a configuration tree."""
    return parse(SimulationSection, tree.get("simulation", {}), where="simulation")
