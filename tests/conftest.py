"""What several test files share: the tiny model in float32, an adapter that has learned something, and a site."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tomli_w

from fl_app import lora, models
from fl_app.config import LoraSection
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fl_app.lora import LoraSpec
    from fl_app.models import FrozenModel

POLICY: dict[str, dict[str, Any]] = {
    "site": {"name": "harbour"},
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "unit": "record", "max_rows_per_unit": 1},
    "constants": {"sample_rate": 0.25, "expected_batch": 4, "max_tokens": 24},
    "limits": {
        "min_noise_multiplier": 4.0,  # equal bounds leave nothing to search: a round costs epsilon 0.38
        "max_noise_multiplier": 4.0,
        "max_steps_per_round": 10,
        "max_rounds": 5,
        "release_kinds": ["adapter"],
        "base_models": [],
        "simulation": True,
    },
}
ROWS = [{"id": str(n), "instruction": f"row {n} is mine", "output": f"dear {n}", "code": "cough"} for n in range(9)]


@dataclass(frozen=True)
class SiteFolder:
    """A site directory made by hand, and the way to change its policy."""

    directory: Path

    def policy(self, **changes: dict[str, Any]) -> None:
        tree = {table: {**keys, **changes.get(table, {})} for table, keys in POLICY.items()}
        (self.directory / "site.toml").write_text(tomli_w.dumps(tree), encoding="utf-8")

    def rows(self, lines: list[str]) -> None:
        (self.directory / "rows.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="session")
def frozen() -> FrozenModel:
    import torch

    torch.set_num_threads(1)
    return models.load("tiny-random", "float32")


@pytest.fixture(scope="session")
def spec(frozen: FrozenModel) -> LoraSpec:
    return lora.spec_of(frozen, LoraSection(rank=4, alpha=8.0, targets=("q_proj", "v_proj")))


@pytest.fixture(scope="session")
def learned(spec: LoraSpec) -> Callable[[int], Adapter]:
    """Return a function: seed -> an adapter whose b is not zero, so that both factors have gradients."""

    def make(seed: int) -> Adapter:
        rng = np.random.default_rng(seed)
        layers = {
            name: LoraFactors(
                a=rng.normal(0, d_in**-0.5, (spec.rank, d_in)).astype(np.float32),
                b=rng.normal(0, 0.1, (d_out, spec.rank)).astype(np.float32),
            )
            for name, (d_in, d_out) in spec.shapes.items()
        }
        return Adapter(layers=layers, alpha=spec.alpha, base=spec.base)

    return make


@pytest.fixture
def site_folder(tmp_path: Path) -> SiteFolder:
    folder = SiteFolder(directory=tmp_path / "harbour")
    folder.directory.mkdir(mode=0o700)
    folder.policy()
    folder.rows([json.dumps(row) for row in ROWS])
    (folder.directory / "codes.jsonl").write_text('{"id": "cough", "text": "A cough:"}\n', encoding="utf-8")
    return folder
