"""What the site leaves out of the sum's keys is what the server takes for granted."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from clients.survey import SurveySection
from strategies.filters import AnyFilter


def test_both_sides_have_the_same_defaults() -> None:
    embedder = {"kind": "local"}
    site = SurveySection.model_validate({"noise_multiplier": 4.0, "kernel": {"embedder": embedder}})
    server: Any = TypeAdapter(AnyFilter).validate_python({"kind": "kernel_density", "keep": 9, "embedder": embedder})

    assert site.kernel is not None
    assert server.same_sum(site.kernel) == ""
