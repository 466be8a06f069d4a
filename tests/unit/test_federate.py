"""Partitions, planting, what is written, and that a finished federation is never written again."""

from __future__ import annotations

import json
import re
import stat
import tomllib
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.config import read_policy
from clients.private_rows import read_private_rows
from fl_app.config import parse
from fl_app.errors import ConfigInvalid, RowsInvalid
from fl_app.seeds import stream
from simulations.corpora import CorpusRow
from simulations.federate import STAMP, Federation, federate, main
from simulations.identities import KINDS, PUBLIC, plant
from simulations.partition import ColumnPartition, DirichletPartition, IidPartition
from simulations.policy_template import PolicyTemplate

if TYPE_CHECKING:
    from pathlib import Path

POLICY = PolicyTemplate(epsilon=8.0, delta=1e-5, sample_rate=0.05, expected_batch=64)
TOPICS = ("lung", "skin", "heart", "bone")


def _rows(count: int = 120) -> list[CorpusRow]:
    """Return rows of four topics in houses of very different sizes: 80, 30, 7 and 3 of every 120 rows."""
    houses = ["Harbour House"] * 80 + ["Åre/Öst"] * 30 + ["Mill"] * 7 + ["Inn"] * 3
    return [
        CorpusRow(
            id=f"r{n}",
            instruction=f"I am [NAME] of [PLACE], call [PHONE]; row {n}",
            output=f"Dear [NAME],\u2028see {n}",
            code=TOPICS[n % 4],
            columns={"house": houses[n % 120], "topic": TOPICS[n % 4], "patient": str(n // 2)},
        )
        for n in range(count)
    ]


def _make(out: Path, rows: list[CorpusRow] | None = None, **changes: Any) -> Federation:
    arguments: dict[str, Any] = {"partition": IidPartition(sites=3), "policy": POLICY, "seed": 0, **changes}
    return federate(_rows() if rows is None else rows, out=out, **arguments)


def _read_rows(federation: Federation) -> list[list[dict[str, str]]]:
    texts = [(site.directory / "rows.jsonl").read_text(encoding="utf-8") for site in federation.sites]
    return [[json.loads(line) for line in text.splitlines()] for text in texts]


def _bytes(*roots: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for root in roots for path in sorted(root.rglob("*")) if path.is_file()}


PARTITIONS = [
    ColumnPartition(column="house"),
    ColumnPartition(column="house", min_rows=10),
    DirichletPartition(label="topic", concentration=0.3, sites=4),
    IidPartition(sites=5),
]


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: f"{p.kind}-{getattr(p, 'min_rows', '')}")
def test_every_row_is_at_exactly_one_site(tmp_path: Path, partition: Any) -> None:
    federation = _make(tmp_path / "fed", partition=partition)
    ids = [row["id"] for rows in _read_rows(federation) for row in rows]
    assert sorted(ids) == sorted(row.id for row in _rows())
    assert [site.rows for site in federation.sites] == [len(rows) for rows in _read_rows(federation)]


@given(
    labels=st.lists(st.sampled_from("abc"), min_size=6, max_size=60),
    sites=st.integers(1, 3),
    concentration=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=40, deadline=None)
def test_dirichlet_is_a_partition_or_says_why_not(
    labels: list[str], sites: int, concentration: float, seed: int
) -> None:
    rows = [CorpusRow(id=str(n), instruction="i", output="o", columns={"l": v}) for n, v in enumerate(labels)]
    partition = DirichletPartition(label="l", concentration=concentration, sites=sites, min_rows=2)
    try:
        groups = partition.split(rows, stream(seed, "t"))
    except ConfigInvalid as error:
        assert "raise concentration" in str(error)  # noqa: PT017  (either outcome is right)
        return
    assert sorted(index for part in groups.values() for index in part) == list(range(len(rows)))
    assert len(groups) == sites
    assert min(len(part) for part in groups.values()) >= 2


def _skews(concentration: float, seeds: range) -> np.ndarray:
    """Return, per seed, the mean total variation distance between a site's mix of topics and the corpus' mix."""
    rows = _rows(400)
    topics = np.array([TOPICS.index(row.columns["topic"]) for row in rows])
    overall = np.bincount(topics, minlength=4) / len(rows)
    partition = DirichletPartition(label="topic", concentration=concentration, sites=4, min_rows=5)
    skews: list[float] = []
    for seed in seeds:
        parts = partition.split(rows, stream(seed, "test")).values()
        mixes = [np.bincount(topics[part], minlength=4) / len(part) for part in parts]
        skews.append(float(np.mean([np.abs(mix - overall).sum() / 2 for mix in mixes])))
    return np.array(skews)


def _standard_errors_apart(one: np.ndarray, other: np.ndarray) -> float:
    error = np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
    return float((one.mean() - other.mean()) / error)


def test_small_concentration_is_more_skewed_than_large() -> None:
    assert _standard_errors_apart(_skews(0.2, range(20)), _skews(20.0, range(20, 40))) > 10


def test_equal_concentrations_are_equally_skewed() -> None:
    """The twin that must not find a difference: else the test above would find one in anything."""
    assert abs(_standard_errors_apart(_skews(1.0, range(20)), _skews(1.0, range(20, 40)))) < 4


def test_column_sites_are_named_and_ordered_by_value(tmp_path: Path) -> None:
    federation = _make(tmp_path / "fed", partition=ColumnPartition(column="house"))
    assert [(s.index, s.name, s.rows) for s in federation.sites] == [
        (0, "harbour-house", 80),
        (1, "inn", 3),
        (2, "mill", 7),
        (3, "are-ost", 30),
    ]


@pytest.mark.parametrize(
    ("min_rows", "expected"),
    [
        (4, {"harbour-house": 83, "mill": 7, "are-ost": 30}),  # 3 rows of Inn are too few for a site: to the first
        (10, {"harbour-house": 80, "are-ost": 30, "other": 10}),  # Inn and Mill together are enough
        (31, {"harbour-house": 80, "other": 40}),
        (100, {"other": 120}),
    ],
)
def test_small_groups_are_joined(tmp_path: Path, min_rows: int, expected: dict[str, int]) -> None:
    federation = _make(tmp_path / "fed", partition=ColumnPartition(column="house", min_rows=min_rows))
    assert {site.name: site.rows for site in federation.sites} == expected


def test_sites_whose_values_look_alike_keep_their_own_names() -> None:
    values = ("a b", "A-B", "other", "!", "é", "x")
    rows = [CorpusRow(id=v, instruction="i", output="o", columns={"c": v}) for v in values for _ in "12"]
    groups = ColumnPartition(column="c", min_rows=2).split([*rows, rows[0]][:11], stream(0, "t"))
    assert list(groups) == ["site-0", "a-b", "a-b-2", "other", "e"]
    assert len(groups["site-0"]) == 3


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    for partition in PARTITIONS[2:]:
        first, second, third = (
            _make(tmp_path / f"{partition.kind}{n}", partition=partition, seed=seed, plant_share=0.5)
            for n, seed in enumerate((1, 1, 2))
        )
        contents = [list(_bytes(f.root, f.simulation).values()) for f in (first, second, third)]
        assert contents[0] == contents[1]
        assert contents[0] != contents[2]


def test_site_toml_has_exactly_the_agreed_keys(tmp_path: Path) -> None:
    overrides = {"site-1": {"epsilon": 2.0, "release_kinds": ["vector"], "base_models": ["ab", "cd"]}}
    federation = _make(tmp_path / "fed", overrides=overrides)
    trees = [tomllib.loads((s.directory / "site.toml").read_text(encoding="utf-8")) for s in federation.sites]
    assert trees[0] == {
        "site": {"name": "site-0"},
        "privacy": {
            "epsilon": 8.0,
            "delta": 1e-5,
            "unit": "record",
            "max_rows_per_unit": 1,
            "composition": "fixed_schedule",
        },
        "constants": {"sample_rate": 0.05, "expected_batch": 64, "max_tokens": 96},
        "limits": {
            "min_noise_multiplier": 0.3,
            "max_noise_multiplier": 5.0,
            "max_steps_per_round": 200,
            "max_rounds": 100,
            "release_kinds": ["adapter"],
            "base_models": [],
            "simulation": True,
            "non_private": False,
        },
        "capacity": {"memory_mb": 0, "first_layer": 0, "micro_batch_tokens": 0, "targets": []},
    }
    assert trees[1]["privacy"]["epsilon"] == 2.0
    assert (trees[1]["limits"]["release_kinds"], trees[1]["limits"]["base_models"]) == (["vector"], ["ab", "cd"])
    assert {re.fullmatch(r"[a-z0-9-]+", tree["site"]["name"]) is not None for tree in trees} == {True}


def test_a_site_reads_what_was_written(tmp_path: Path) -> None:
    policy = PolicyTemplate.model_validate({**POLICY.model_dump(), "unit": "patient", "max_rows_per_unit": 2})
    federation = _make(tmp_path / "fed", partition=ColumnPartition(column="house"), policy=policy)
    for site in federation.sites:
        said = read_policy(site.directory)
        assert (said.site.name, said.privacy.unit, said.limits.simulation) == (site.name, "patient", True)
        rows = read_private_rows(site.directory / "rows.jsonl", unit="patient", max_rows_per_unit=2)
        assert len(rows.examples) == site.rows


def test_a_unit_column_travels_with_the_rows(tmp_path: Path) -> None:
    odd = 'ward "7\x7f\\'
    rows = [CorpusRow(id=str(n), instruction="i", output="o", columns={odd: str(n // 2)}) for n in range(8)]
    policy = PolicyTemplate.model_validate({**POLICY.model_dump(), "unit": odd, "max_rows_per_unit": 2})
    federation = _make(tmp_path / "fed", rows, policy=policy)
    assert all(row[odd] == str(int(row["id"]) // 2) for part in _read_rows(federation) for row in part)
    tree = tomllib.loads((federation.sites[0].directory / "site.toml").read_text(encoding="utf-8"))
    assert (tree["privacy"]["unit"], tree["privacy"]["max_rows_per_unit"]) == (odd, 2)


def test_rows_have_exactly_their_keys_and_the_cap_holds(tmp_path: Path) -> None:
    federation = _make(tmp_path / "fed", partition=ColumnPartition(column="house"), max_rows_per_site=10)
    assert [site.rows for site in federation.sites] == [10, 3, 7, 10]
    parts = _read_rows(federation)
    assert all(list(row) == ["id", "instruction", "output", "code"] for part in parts for row in part)
    assert "\u2028" in parts[0][0]["output"]


def test_nothing_of_the_truth_is_inside_a_site(tmp_path: Path) -> None:
    federation = _make(tmp_path / "fed", plant_share=0.5)
    names = sorted(path.name for path in federation.root.rglob("*") if path.is_file())
    assert names == ["rows.jsonl"] * 3 + ["site.toml"] * 3
    assert federation.simulation == tmp_path / "fed-simulation"
    truth = sorted(path.name for path in federation.simulation.iterdir())
    assert truth == ["partition.json", "partition.svg", "planted.json"]
    private = (federation.root, federation.simulation, *(site.directory for site in federation.sites))
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o700}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fed", "fed-simulation"]


def test_planted_names_stand_at_one_site_only_and_no_slot_is_left(tmp_path: Path) -> None:
    federation = _make(tmp_path / "fed", plant_share=0.5)
    truth = json.loads((federation.simulation / "planted.json").read_text(encoding="utf-8"))
    texts = {
        site.name: {row["id"]: row["instruction"] + "\n" + row["output"] for row in part}
        for site, part in zip(federation.sites, _read_rows(federation), strict=True)
    }
    names = [entry["text"] for entry in truth["identities"] if entry["kind"] == "name"]
    assert truth["stamp"] == STAMP
    assert len(names) == len(set(names)) == len(truth["controls"]) == 60
    assert len(truth["identities"]) == federation.planted == 180
    assert not set(names) & set(truth["controls"])
    for entry in truth["identities"]:
        assert entry["text"] in texts[entry["site"]][entry["row"]]
        if entry["kind"] == "name":
            holders = [site for site, rows in texts.items() if any(entry["text"] in text for text in rows.values())]
            assert holders == [entry["site"]]
            assert texts[entry["site"]][entry["row"]].count(entry["text"]) == 2
    everything = "\n".join(text for rows in texts.values() for text in rows.values())
    assert not [slot for slot in {*KINDS, *PUBLIC} if slot in everything]
    assert not [name for name in truth["controls"] if name in everything]
    assert everything.count("I am a neighbour of a nearby town, call the usual number") == 60


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My XXXX XXXX card", "My {name} card"),
        ("XXXX XXXX and XXXX XXXX.", "{name} and {name}."),
        ("account XXXX XXXX XXXX ended", "account XXXX ended"),
        ("on XX/XX/XXXX XXXX I", "on XX/XX/XXXX I"),
        ("XXXXXXXX XXXX, XXXX XXXX/XXXX XXXX", "XXXXXXXX, XXXX/XXXX"),
        ("XXXX alone", "XXXX alone"),
        ("aged [AGE], [ID]", "aged middle-aged, on file"),
    ],
)
def test_slots_of_the_agency(text: str, expected: str) -> None:
    rows = [CorpusRow(id="1", instruction=text, output=""), CorpusRow(id="2", instruction="[NAME]", output="")]
    planted = plant({"bank": rows}, rng=stream(0, "t"), share=1.0)
    name = next((i.text for i in planted.identities if i.row == "1"), "")
    assert planted.rows_by_site["bank"][0].instruction == expected.format(name=name)
    public = plant({"bank": rows}, rng=stream(0, "t"), share=0.0)
    assert public.rows_by_site["bank"][0].instruction == expected.format(name="XXXX")
    assert not public.identities
    assert not public.controls


def test_a_name_that_already_stands_in_the_corpus_is_not_planted() -> None:
    row = CorpusRow(id="1", instruction="[NAME]", output="")
    name = plant({"a": [row]}, rng=stream(0, "t"), share=1.0).identities[0].text
    known = CorpusRow(id="2", instruction=f"Is {name.upper()}, MD, in?", output="")
    planted = plant({"a": [row], "b": [known]}, rng=stream(0, "t"), share=1.0)
    assert name not in {planted.identities[0].text, *planted.controls}


def test_planting_needs_slots_and_a_share() -> None:
    row = CorpusRow(id="1", instruction="no slot", output="")
    with pytest.raises(ConfigInvalid, match=r"no row holds a slot; slots are \[NAME\]"):
        plant({"a": [row]}, rng=stream(0, "t"), share=0.5)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigInvalid, match="between 0 and 1"):
            plant({"a": [row]}, rng=stream(0, "t"), share=share)


def test_without_planting_the_text_stays_as_it_is(tmp_path: Path) -> None:
    federation = _make(tmp_path / "fed")
    assert all("[NAME]" in row["instruction"] for part in _read_rows(federation) for row in part)
    assert json.loads((federation.simulation / "planted.json").read_text())["identities"] == []


def test_same_inputs_leave_every_byte_and_the_ledger(tmp_path: Path) -> None:
    first = _make(tmp_path / "fed", plant_share=0.5)
    (first.sites[0].directory / "ledger.jsonl").write_text("spent")
    before = _bytes(first.root, first.simulation)
    second = _make(tmp_path / "fed", plant_share=0.5)
    assert (first.written, second.written) == (True, False)
    assert second.sites == first.sites
    assert _bytes(first.root, first.simulation) == before


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"plant_share": 0.5},
        {"policy": POLICY.model_copy(update={"epsilon": 1.0})},
        {"partition": IidPartition(sites=2)},
        {"rows": _rows(119)},
        {"max_rows_per_site": 5},
        {"overrides": {"site-0": {"epsilon": 1.0}}},
    ],
)
def test_other_inputs_are_refused_and_touch_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    first = _make(tmp_path / "fed")
    before = _bytes(tmp_path)
    with pytest.raises(ConfigInvalid, match=r"written by other inputs .* choose another directory"):
        _make(tmp_path / "fed", **change)
    assert _bytes(tmp_path) == before
    assert first.written


def test_foreign_and_damaged_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "fed").mkdir()
    (tmp_path / "fed" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigInvalid, match="written by something else"):
        _make(tmp_path / "fed")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigInvalid, match="is a file"):
        _make(tmp_path / "file")
    federation = _make(tmp_path / "ok")
    (federation.sites[1].directory / "rows.jsonl").unlink()
    with pytest.raises(ConfigInvalid, match="lost its rows"):
        _make(tmp_path / "ok")
    (federation.simulation / "partition.json").write_text("{")
    with pytest.raises(ConfigInvalid, match="damaged"):
        _make(tmp_path / "ok")


def test_a_crash_before_the_sites_appear_is_continued_by_the_same_inputs_only(tmp_path: Path) -> None:
    federation = _make(tmp_path / "fed", plant_share=0.5)
    before = _bytes(tmp_path)
    federation.root.rename(tmp_path / "elsewhere")  # as if the last step had not happened
    (federation.simulation / "planted.json").unlink()
    with pytest.raises(ConfigInvalid, match="other inputs"):
        _make(tmp_path / "fed", seed=9, plant_share=0.5)
    (tmp_path / "fed").mkdir()
    again = _make(tmp_path / "fed", plant_share=0.5)
    assert again.written
    assert _bytes(again.root, again.simulation) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": []}, RowsInvalid, "no rows to federate"),
        ({"partition": IidPartition(sites=121)}, ConfigInvalid, "site-120 would go short"),
        ({"partition": ColumnPartition(column="hose")}, ConfigInvalid, "no column 'hose'.*house, patient, topic"),
        ({"partition": ColumnPartition(column="house", min_rows=121)}, ConfigInvalid, "has 120 rows in all"),
        (
            {"partition": DirichletPartition(label="lobe", concentration=1.0, sites=2)},
            ConfigInvalid,
            "no column 'lobe'",
        ),
        (
            {"partition": DirichletPartition(label="topic", concentration=0.001, sites=30, min_rows=4)},
            ConfigInvalid,
            "100 draws left a site.*raise concentration",
        ),
        ({"label": "lobe"}, ConfigInvalid, "no column 'lobe'"),
        ({"seed": -1}, ConfigInvalid, "seed = -1"),
        ({"max_rows_per_site": 0}, ConfigInvalid, "at least one row"),
        ({"overrides": {"mill": {}}}, ConfigInvalid, "overrides for mill, but the sites are site-0"),
        (
            {"overrides": {"site-0": {"epsilom": 1.0}}},
            ConfigInvalid,
            "overrides.site-0.epsilom .did you mean 'epsilon'",
        ),
        ({"overrides": {"site-0": {"unit": "pat"}}}, ConfigInvalid, "no column 'pat'"),
        ({"overrides": {"site-0": {"unit": "id"}}}, ConfigInvalid, "site-0: unit = 'id'"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path: Path, changes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        _make(tmp_path / "fed", **changes)
    assert not list(tmp_path.iterdir())


def test_a_row_without_the_column_is_named(tmp_path: Path) -> None:
    rows = [*_rows(), CorpusRow(id="lonely", instruction="SECRET", output="")]
    with pytest.raises(RowsInvalid, match=r"1 rows have no 'house' .the first is lonely") as caught:
        _make(tmp_path / "fed", rows, partition=ColumnPartition(column="house"))
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"epsilon": 0.0}, {"delta": 1.0}, {"epsilon": float("inf")}, {"release_kinds": ["x"]}])
def test_policies_that_promise_nothing_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigInvalid):
        parse(PolicyTemplate, {**POLICY.model_dump(), **bad})


def test_partition_json_and_svg_tell_the_same(tmp_path: Path) -> None:
    rows = [
        CorpusRow(id=str(n), instruction="i", output="o", columns={"topic": f"<topic & {n % 11}>"}) for n in range(110)
    ]
    partition = DirichletPartition(label="topic", concentration=0.5, sites=3)
    federation = _make(tmp_path / "fed", rows, partition=partition, seed=4)
    report = json.loads((federation.simulation / "partition.json").read_text(encoding="utf-8"))
    assert (report["stamp"], report["seed"], report["partition"]) == (STAMP, 4, partition.model_dump())
    assert all(sum(site["labels"].values()) == site["rows"] for site in report["sites"])
    svg = ET.fromstring((federation.simulation / "partition.svg").read_text(encoding="utf-8"))  # noqa: S314  (our own)
    assert svg.get("viewBox")
    tips = [tip.text or "" for tip in svg.iter("{http://www.w3.org/2000/svg}title")]
    drawn = sum(int(tip.removesuffix(" rows").rpartition(", ")[2]) for tip in tips)
    assert drawn == 110
    assert any("(others)" in tip for tip in tips)


CLI = ["--epsilon", "8", "--delta", "1e-5", "--sample-rate", "0.05", "--expected-batch", "64"]


def _corpus(path: Path) -> str:
    rows = [{"id": r.id, "instruction": r.instruction, "output": r.output, **r.columns} for r in _rows()]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = _corpus(tmp_path / "c.jsonl")
    kinds = {"c": ["column:house"], "d": ["dirichlet", "--label", "topic", "--alpha", "0.5"], "i": ["iid"]}
    for name, partition in kinds.items():
        options = ["--corpus", corpus, "--out", str(tmp_path / name), "--partition", *partition, "--plant", "0.5", *CLI]
        assert main(options) == 0
        shown = capsys.readouterr()
        assert STAMP in shown.out
        assert ("harbour-house" if name == "c" else "site-0") in shown.out
        assert not shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition", "iid"], "are required: --corpus"),
        (["--corpus", "absent.jsonl", "--partition", "iid"], "no file at absent.jsonl"),
        (["--corpus", "CORPUS", "--partition", "colum:house"], "'colum:house'; known: column:NAME"),
        (["--corpus", "CORPUS", "--partition", "dirichlet"], "needs --label"),
        (["--corpus", "CORPUS", "--partition", "iid", "--sites", "0"], "partition.sites = '0'"),
        (["--corpus", "CORPUS", "--partition", "iid", "--epsilon", "-1"], "policy.epsilon = '-1.0'"),
        (["--corpus", "CORPUS", "--partition", "iid", "--seed", "x"], "invalid int value"),
    ],
)
def test_command_line_errors_are_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    corpus = _corpus(tmp_path / "c.jsonl")
    filled = [corpus if option == "CORPUS" else option for option in options]
    assert main(["--out", str(tmp_path / "fed"), *CLI, *filled]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert (shown.err.count("\n"), shown.out) == (1, "")
    assert not (tmp_path / "fed").exists()
