"""What every simulated site's policy says unless an override says otherwise, and the `site.toml` that it becomes."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from fl_app.config import Section
from fl_app.types import ReleaseKind


class PolicyTemplate(Section):
    """What every site's `site.toml` says unless an override says otherwise. All public, none computed from rows."""

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Annotated[str, Field(min_length=1)] = "record"
    max_rows_per_unit: Annotated[int, Field(ge=1)] = 1
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    expected_batch: Annotated[int, Field(ge=1)]
    max_tokens: Annotated[int, Field(ge=8, le=8192)] = 96
    min_noise_multiplier: Annotated[float, Field(gt=0)] = 0.3
    max_noise_multiplier: Annotated[float, Field(gt=0)] = 5.0
    max_steps_per_round: Annotated[int, Field(ge=1)] = 200
    max_rounds: Annotated[int, Field(ge=1)] = 100
    release_kinds: Annotated[tuple[ReleaseKind, ...], Field(strict=False)] = ("adapter",)
    base_models: Annotated[tuple[str, ...], Field(strict=False)] = ()
    simulation: bool = True
    composition: Literal["fixed_schedule", "renyi_filter"] = "fixed_schedule"
    non_private: bool = False
    memory_mb: Annotated[int, Field(ge=0)] = 0
    first_layer: Annotated[int, Field(ge=0)] = 0
    micro_batch_tokens: Annotated[int, Field(ge=0)] = 0
    targets: Annotated[tuple[str, ...], Field(strict=False)] = ()


TABLES: dict[str, tuple[str, ...]] = {
    "privacy": ("epsilon", "delta", "unit", "max_rows_per_unit", "composition"),
    "constants": ("sample_rate", "expected_batch", "max_tokens"),
    "limits": (
        "min_noise_multiplier",
        "max_noise_multiplier",
        "max_steps_per_round",
        "max_rounds",
        "release_kinds",
        "base_models",
        "simulation",
        "non_private",
    ),
    "capacity": ("memory_mb", "first_layer", "micro_batch_tokens", "targets"),
}
"""The tables of site.toml and the keys of the template that stand in them, in order."""


def site_toml(name: str, policy: PolicyTemplate, *, stamp: str) -> str:
    """Return the text of a `site.toml`."""
    values = policy.model_dump()
    lines = [f"# {stamp}: written by simulations/federate.py", "[site]", f"name = {_toml(name)}"]
    for table, keys in TABLES.items():
        lines += ["", f"[{table}]", *(f"{key} = {_toml(values[key])}" for key in keys)]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
