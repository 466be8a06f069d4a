"""The name attack finds what a model learned by heart, and is at chance where there is nothing to find."""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from faker import Faker

from fl_app import sequences
from fl_app.errors import ConfigInvalid, RunInvalid
from simulations import launch
from simulations.attacks import names, on_run
from simulations.attacks.names import NAME, Reader, Target
from tests import workplace

if TYPE_CHECKING:
    from pathlib import Path

    from fl_app.models import FrozenModel

COUNT, CANDIDATES = 24, 20


def invented(count: int) -> list[str]:
    fake = Faker("en_US")
    fake.seed_instance(1)
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"{fake.first_name()} {fake.last_name()}"] = None
    return list(found)


NAMES = invented(COUNT + 200)
TARGETS = [Target(prefix="A note:\n", text=f"Row {n:03d}: {NAMES[n]} asks.", name=NAMES[n]) for n in range(COUNT)]
STRANGERS = [Target(prefix="A note:\n", text=one.text.replace(one.name, NAMES[-1 - n]), name=NAMES[-1 - n])
             for n, one in enumerate(TARGETS)]  # fmt: skip
"""The same rows with other names: nothing that was learned of the first tells them apart."""

AMONG = names.lineups(TARGETS, NAMES[COUNT:], candidates=CANDIDATES, seed=0)


def reader(frozen: FrozenModel, model: Any) -> Reader:
    return Reader(model=model, tokenizer=frozen.tokenizer, max_tokens=64)


@pytest.fixture(scope="module")
def memorised(frozen: FrozenModel) -> Reader:
    """A model, all of whose weights have learned the rows by heart, without any privacy."""
    import torch

    model: Any = copy.deepcopy(frozen.model)
    for weight in model.parameters():
        weight.requires_grad_(requires_grad=True)
    rows = [sequences.encode(frozen.tokenizer, *one.filled(one.name), max_tokens=64) for one in TARGETS]
    (batch,) = sequences.micro_batches(rows, max_batch_tokens=1 << 20, pad_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(180):
        sequences.example_losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return reader(frozen, model)


def test_a_model_that_learned_the_names_gives_nearly_all_of_them_away(memorised: Reader) -> None:
    """The bar of the field's harness: over 90 % without privacy, among candidates and out of the model's own words."""
    inferred = names.share(names.infer(memorised, TARGETS, AMONG, seed=0))
    rebuilt = names.share(names.reconstruct(memorised, TARGETS, seed=0, draws=8, tokens=24))
    assert inferred.value > 0.9
    assert rebuilt.value > 0.9
    assert inferred.interval is not None
    assert inferred.interval.low > 1 / CANDIDATES


def test_a_model_of_random_weights_is_at_chance(frozen: FrozenModel) -> None:
    """True name and others come from one source, so each of C is the least with probability 1 / C; here of 300."""
    fresh = reader(frozen, frozen.model)
    right = count = 0
    for seed in range(10):
        fake = Faker("en_US")
        fake.seed_instance(100 + seed)
        pool = [f"{fake.first_name()} {fake.last_name()}" for _ in range(60)]
        targets = [Target(prefix="", text=f"Row {n}: {pool[n]} asks.", name=pool[n]) for n in range(30)]
        among = names.lineups(targets, pool[30:], candidates=5, seed=seed)
        hits = names.infer(fresh, targets, among, seed=seed)
        right, count = right + sum(hits), count + len(hits)
    # 4.5 deviations of a binomial of 300 at 1 / 5: one in 150,000
    assert abs(right - count / 5) < 4.5 * math.sqrt(count * 0.2 * 0.8)


def test_a_model_that_learned_other_names_in_the_same_rows_is_at_chance(memorised: Reader) -> None:
    """The twin of the first test: what is found there is the names, not the rows."""
    among = names.lineups(STRANGERS, NAMES[COUNT:-COUNT], candidates=CANDIDATES, seed=0)
    found = names.share(names.infer(memorised, STRANGERS, among, seed=0))
    assert found.right <= 6  # of 24 at 1 / 20: more happens once in 7,000
    assert names.share(names.reconstruct(memorised, STRANGERS[:8], seed=0, draws=8, tokens=24)).right == 0


def test_names_that_the_reference_finds_as_well_are_set_aside() -> None:
    hits, reference = [True, True, False, False], [True, False, True, False]
    assert names.share(hits) == names.Share(right=2, count=4)
    assert names.share(hits, reference) == names.Share(right=1, count=2)
    nothing = names.share([True], [True])
    assert nothing.interval is None
    assert math.isnan(nothing.value)


def test_all_places_of_a_name_are_filled_at_once() -> None:
    target = Target(prefix="Ann Lee writes: ", text="I am Ann Lee.", name="Ann Lee")
    assert target.filled("Bo Ray") == ("Bo Ray writes: ", "I am Bo Ray.")
    assert target.before == ""
    assert Target(prefix="", text="Dear Ann Lee", name="Ann Lee").before == "Dear"
    assert NAME.findall("Dear Ann Lee, call Bo Mc-Ray") == ["Dear Ann", "Ann Lee", "Bo Mc-Ray"]


def test_a_name_behind_the_cut_is_no_target(frozen: FrozenModel) -> None:
    short = Reader(model=frozen.model, tokenizer=frozen.tokenizer, max_tokens=16)
    assert short.reads(Target(prefix="", text="Ann Lee asks for more of it", name="Ann Lee"))
    assert not short.reads(Target(prefix="", text="who asks for it? Ann Lee", name="Ann Lee"))


def test_equal_candidates_are_drawn_from_and_no_number_never_wins(frozen: FrozenModel) -> None:
    """An attacker that took the first of equals would find the true name, which stands first in its line-up."""

    class Flat(Reader):
        def losses(self, halves: Any) -> Any:
            import numpy as np

            return np.array([1.0, 1.0, 1.0, math.nan][: len(halves)])

    flat = Flat(model=None, tokenizer=frozen.tokenizer, max_tokens=64)
    targets = TARGETS * 25
    among = [(one.name, "Bo Ray", "Cy Fox", "Di Oak") for one in targets]
    right = sum(names.infer(flat, targets, among, seed=0))
    assert abs(right - len(targets) / 3) < 4.5 * math.sqrt(len(targets) * 2 / 9)


@pytest.mark.parametrize("candidates", [1, 5])
def test_too_few_names_for_a_lineup_are_refused(candidates: int) -> None:
    with pytest.raises(ConfigInvalid, match=f"{candidates} candidates were asked for; there are 3"):
        names.lineups(TARGETS[:1], NAMES[COUNT : COUNT + 3], candidates=candidates, seed=0)


def test_lineups_hold_the_name_once_and_no_name_of_the_row() -> None:
    target = Target(prefix="Ann Lee of Bo Ray: ", text="yes", name="Ann Lee")
    (found,) = names.lineups([target], ["Ann Lee", "Bo Ray", "Cy Fox", "Di Oak"], candidates=3, seed=0)
    assert sorted(found) == ["Ann Lee", "Cy Fox", "Di Oak"]


# --- a run


SHORT = (
    "run.rounds=1",
    "simulation.plant_share=0.9",
    "simulation.max_rows_per_site=24",
    "simulation.policy.max_tokens=160",  # names stand behind the first 64 bytes of these rows
    "server.exam.choice_items=1",
    "server.exam.free_items=1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with workplace.at(tmp_path_factory.mktemp("names")):
        prepared = launch.prepare("configs/smoke.toml", "\n".join(SHORT))
        launch.play(prepared)
    return prepared.directory


SMALL = on_run.Sizes(targets=6, candidates=4, reconstructed=2, draws=2, twin_epochs=1)


def test_the_models_of_a_run_are_attacked(run: Path) -> None:
    found = on_run.attack(run, SMALL)
    assert found == json.loads((run / "names.json").read_text(encoding="utf-8"))
    assert list(found["models"]) == ["reference", "releases", "merged", "target", "without_privacy"]
    for told in found["models"].values():
        assert told["inference"]["count"] == 6
        assert told["reconstruction"]["count"] == 2
    assert found["models"]["reference"]["inference_reference_misses"]["right"] == 0
    assert found["written"] == {"planted": 0, "planted_nowhere": 0}
    assert found["chance"] == 0.25


def test_names_in_drafts_are_counted(run: Path) -> None:
    planted = json.loads(next(run.parent.parent.glob("build/sites/*-simulation/planted.json")).read_text("utf-8"))
    name = next(one["text"] for one in planted["identities"] if one["kind"] == "name")
    drafts = run / "rounds" / "1" / "drafts.jsonl"
    before = drafts.read_text(encoding="utf-8")
    drafts.write_text(before + json.dumps({"id": "x", "instruction": f"I met {name}."}) + "\n", encoding="utf-8")
    try:
        told = on_run.attack(run, on_run.Sizes(targets=1, candidates=2, reconstructed=0, twin_epochs=0))
    finally:
        drafts.write_text(before, encoding="utf-8")
    assert told["written"] == {"planted": 1, "planted_nowhere": 0}
    assert "without_privacy" not in told["models"]


def test_a_run_without_planted_names_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunInvalid, match="is not there; an attack needs a complete simulation"):
        on_run.look(tmp_path, 1)
    planted = next(run.parent.parent.glob("build/sites/*-simulation/planted.json"))
    before = planted.read_text(encoding="utf-8")
    planted.write_text(json.dumps({"identities": [], "controls": []}), encoding="utf-8")
    try:
        with pytest.raises(RunInvalid, match="plant_share above 0"):
            on_run.look(run, 1)
    finally:
        planted.write_text(before, encoding="utf-8")
    with pytest.raises(ConfigInvalid, match="candidates were asked for"):
        on_run.attack(run, on_run.Sizes(targets=1, candidates=10_000))
    assert on_run.main(["--run", str(tmp_path)]) == 2
