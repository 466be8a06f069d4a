"""The corpora beside the project become sites; skipped by a marker where they are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fl_app.config import read_tree
from fl_app.origin import ROOT
from simulations.config import read_simulation
from simulations.corpora import read_corpus
from simulations.federate import federate

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.data


@pytest.mark.parametrize(("name", "sites"), [("medical", 3), ("finance", 3)])
def test_real_text_becomes_sites(tmp_path: Path, name: str, sites: int) -> None:
    section = read_simulation(read_tree(f"configs/{name}.toml"))
    corpus = ROOT / section.corpus
    rows = read_corpus(str(corpus), join_input=section.join_input, code_column=section.code_column)

    made = federate(
        rows, out=tmp_path / "sites", partition=section.partition, policy=section.policy, seed=0, plant_share=0.5
    )

    assert len(made.sites) == sites
    assert sum(site.rows for site in made.sites) == len(corpus.read_bytes().splitlines())
    assert made.planted > 0
