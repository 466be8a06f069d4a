"""Every published federated-LoRA method, as its file in configs/methods says: plays, is paid for, is exported.

The tiny random model, three sites, two rounds, in process: wiring, bytes and files. What a method is worth is measured
in benchmarks/aggregators.py; that sums are exact is for tests/contracts and tests/golden.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fl_app import factors, lora, lora_start, models, peft_files, transport
from fl_app.config import read_tree, shared
from fl_app.errors import RoundFailed
from fl_app.privacy.accountants import pld
from fl_app.privacy.ledger import peek
from fl_app.seeds import stream
from simulations import export, launch
from strategies.pipeline import Pipeline
from tests.workplace import at

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).resolve().parents[2]
METHODS = sorted(path.stem for path in (ROOT / "configs" / "methods").glob("*.toml"))
SMALL = (
    "simulation.max_rows_per_site=24",
    "server.exam.choice_items=3",
    "server.exam.free_items=1",
)
HEADER = 128
"""What numpy writes before an array's numbers."""

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of our own instead of build/ and runs/; the corpus is written once."""
    place = tmp_path_factory.mktemp("workplace")
    with at(place):
        yield place


def play(workplace: Path, name: str, method: str, *more: str) -> tuple[Path, dict[str, Any]]:
    """Run a method as a user would and return its run directory and summary."""
    words = ["--config", f"configs/methods/{method}.toml", "--run", name]
    words += [word for item in (*SMALL, *more) for word in ("--override", item)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = launch.main(words)
    assert code == 0, out.getvalue()
    run = workplace / "runs" / name
    return run, json.loads((run / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def played(workplace: Path) -> Mapping[str, tuple[Path, dict[str, Any]]]:
    return {method: play(workplace, method, method) for method in METHODS}


@every_method
def test_it_plays_its_rounds(method: str, played: Mapping[str, Any]) -> None:
    _, summary = played[method]

    assert summary["status"] == "completed"
    assert [one["used"] for one in summary["rounds"]] == [["site-0", "site-1", "site-2"]] * 2
    assert all(not one["rejected"] and not one["refused"] for one in summary["rounds"])
    assert set(summary["exam"]) == {"base", "target_round_1", "target_round_2"}


@every_method
def test_what_is_charged_is_what_was_released(method: str, played: Mapping[str, Any], workplace: Path) -> None:
    run, summary = played[method]
    private = read_tree(f"configs/methods/{method}.toml")["client"]["learner"]["kind"] != "plain_lora"
    for place in sorted((workplace / "build" / "sites" / method).iterdir()):
        if not (place / "site.toml").is_file():
            continue
        book = peek(place / "ledger" / "ledger.jsonl")
        assert book is not None
        assert len(book.reserved) == 2
        site = f"site-{place.name}"
        told = summary["epsilon"][site]
        if private:
            assert told["spent"] == pytest.approx(pld.epsilon(book.receipts, 1e-5), rel=1e-6)
            assert told["spent"] <= told["budget"]
        else:
            assert told["spent"] == "inf"
    assert (summary["client_level"] is not None) == (method == "dp_dylora")
    assert (run / "report.html").is_file()


@every_method
def test_the_target_is_plain_lora_for_anybody(method: str, played: Mapping[str, Any]) -> None:
    """PEFT loads what was published, whatever ranks, cores and blocks the run had inside; it is base + all of them."""
    import torch
    from peft import PeftModel

    run, _ = played[method]
    frozen = models.load("tiny-random", "float32")
    ids = torch.arange(5, 25).unsqueeze(0)
    theirs: Any = PeftModel.from_pretrained(frozen.replica(own_weights=True).model, run / "target")
    ours = lora.attach(frozen, peft_files.load(run / "rounds" / "2" / "target"), blocks_of(run))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=2e-5, rtol=1e-5)


def blocks_of(run: Path) -> list[Any]:
    """Return all blocks of a run, from its own files."""
    found = sorted(run.glob("rounds/*/blocks/*"), key=lambda path: (int(path.parts[-3]), int(path.name)))
    return [peft_files.load(path) for path in found]


@pytest.mark.parametrize("method", ["fedex_lora", "fed_sb"])
def test_it_is_exported_as_a_merged_model(method: str, played: Mapping[str, Any], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run, _ = played[method]
    merged: Any = AutoModelForCausalLM.from_pretrained(export.export(run, tmp_path / "out"), dtype=torch.float32)
    frozen = models.load("tiny-random", "float32")
    ids = torch.arange(5, 25).unsqueeze(0)
    ours = lora.attach(frozen, peft_files.load(run / "target"))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, ours(ids).logits, atol=2e-5, rtol=1e-5)


# --- traffic: the wire against the closed forms


def numbers(method: str) -> dict[str, dict[str, int]]:
    """Return the numbers of each factor by layer, from the configuration alone."""
    told = shared(read_tree(f"configs/methods/{method}.toml"))
    spec = lora.spec_of(models.load("tiny-random", "float32"), told.lora)
    rank = spec.rank
    return {
        name: {"a": rank * d_in, "b": rank * d_out, "core": rank * rank}
        for name, (d_in, d_out) in sorted(spec.shapes.items())
    }


def size_of(method: str, chosen: tuple[str, ...]) -> int:
    return sum(4 * one[factor] + HEADER for one in numbers(method).values() for factor in chosen)


SAME_RANK = [name for name in METHODS if name not in {"flora_mixed_ranks", "zero_padding", "flex_lora", "dp_dylora"}]


@pytest.mark.parametrize("method", [name for name in SAME_RANK if name != "zeroth_order"])
def test_bytes_up_are_those_of_the_factors_that_moved(method: str, played: Mapping[str, Any]) -> None:
    """2rd a layer for both factors, rd for one, r^2 for a core; a round after another."""
    _, summary = played[method]
    learner = read_tree(f"configs/methods/{method}.toml")["client"]["learner"]

    expected = sum(size_of(method, factors.sent(learner, number)) for number in (1, 2))

    assert summary["bytes"]["up"] == dict.fromkeys(("site-0", "site-1", "site-2"), expected)


def test_a_zeroth_order_step_is_one_byte(played: Mapping[str, Any]) -> None:
    _, summary = played["zeroth_order"]
    assert summary["bytes"]["up"] == dict.fromkeys(("site-0", "site-1", "site-2"), 2 * (2 + HEADER))


DOWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fedit": (("a", "b"), ("a", "b")),
    "ffa_lora": (("a", "b"), ("b",)),
    "rolora": (("a", "b"), ("b",)),
    "lora_fair": (("a", "b"), ("a", "b")),
    "la_lora": (("a", "b"), ("a", "b")),
    "fed_sb": (("a", "b", "core"), ("core",)),
    "fedsa_lora": (("a", "b"), ("a",)),
}
"""The factors that a site is sent in the first round, which brings all, and in the second."""


@pytest.mark.parametrize("method", DOWN)
def test_what_a_site_has_is_not_sent_again(method: str, played: Mapping[str, Any]) -> None:
    _, summary = played[method]

    assert summary["bytes"]["down"]["site-0"] == sum(size_of(method, chosen) for chosen in DOWN[method])


def test_blocks_travel_once(played: Mapping[str, Any]) -> None:
    """FLoRA sends the stack of three sites and a fresh adapter, FedEx the means and the residual's two components."""
    for method, ranks in (("flora", 3 * 4), ("fedex_lora", 2 * 4)):
        run, summary = played[method]
        block = blocks_of(run)[0]
        assert lora.rank_of(block) == ranks
        own = lora.num_bytes(block) + 2 * len(block.layers) * HEADER
        first = size_of(method, ("a", "b"))
        fresh = size_of(method, ("a",)) if method == "flora" else first  # a fresh b is zero, as it was
        assert summary["bytes"]["down"]["site-0"] == first + fresh + own


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_fewer_bytes_travel_at_less_precision(precision: str, workplace: Path, played: Mapping[str, Any]) -> None:
    """For all that moves, and in half precision both ways; the run goes on, and what was kept is what travelled."""
    more = (f'lora.upload_precision="{precision}"',)
    if precision == "float16":
        more = (*more, 'lora.broadcast_precision="float16"')
    run, summary = play(workplace, f"fedit-{precision}", "fedit", *more)

    exponents = 0 if precision == "float16" else (4 + HEADER) * 2 * len(numbers("fedit"))
    width = 2 if precision == "float16" else 1
    one = (
        sum(width * layer[factor] + HEADER for layer in numbers("fedit").values() for factor in ("a", "b")) + exponents
    )
    assert summary["bytes"]["up"]["site-0"] == 2 * one
    assert summary["bytes"]["up"]["site-0"] < played["fedit"][1]["bytes"]["up"]["site-0"]
    if precision == "float16":
        assert summary["bytes"]["down"]["site-0"] == 2 * one
        kept = peft_files.load(run / "rounds" / "2" / "target")
        assert lora.sha256(transport.rounded(kept, ("a", "b"), "float16")) == lora.sha256(kept)
    began = peft_files.load(run / "rounds" / "1" / "target")
    sent = peft_files.load(run / "rounds" / "2" / "releases" / "site-1")
    again = transport.rounded(sent, ("a", "b"), precision, began)  # type: ignore[arg-type]
    assert lora.sha256(again) == lora.sha256(sent)


# --- mixed sites


def test_sites_of_other_ranks_and_layers_train_what_they_can(workplace: Path) -> None:
    """Ranks by declared memory, and one site that leaves the first decoder block alone."""
    frozen = models.load("tiny-random", "float32")
    weights = sum(one.numel() * one.element_size() for one in frozen.model.parameters())
    roomy, small = (weights >> 20) + 400, 'first_layer=1, targets=["q_proj"]'
    capacities = f'"site-0"={{memory_mb={roomy}}}, "site-1"={{memory_mb=0}}, "site-2"={{{small}}}'
    more = (
        "client.learner.micro_batch_tokens=64",
        f"simulation.policy_overrides={{{capacities}}}",
    )
    run, summary = play(workplace, "mixed", "flex_lora", *more)

    places = {site: run / "rounds" / "1" / "releases" / site for site in ("site-0", "site-1", "site-2")}
    sent = {site: peft_files.load(place) for site, place in places.items()}
    assert {site: lora.rank_of(one) for site, one in sent.items()} == {"site-0": 4, "site-1": 1, "site-2": 1}
    blocks = {site: {name.split(".")[2] for name in one.layers} for site, one in sent.items()}
    assert blocks["site-2"] == blocks["site-0"] - {"0"}
    assert {name.rpartition(".")[2] for name in sent["site-2"].layers} == {"q_proj"}
    assert {one.alpha / lora.rank_of(one) for one in sent.values()} == {2.0}
    up = summary["bytes"]["up"]
    assert up["site-0"] > up["site-1"] > up["site-2"]


def test_bases_of_fed_sb_may_come_from_a_former_release(workplace: Path, played: Mapping[str, Any]) -> None:
    """Fed-SB's init under DP: the SVD of what a private run released; nothing else of the rows is looked at."""
    former = played["fedit"][0] / "target"
    run, summary = play(workplace, "from-release", "fed_sb", f'lora.start="{former}"')

    assert summary["status"] == "completed"
    began, after = peft_files.load(former), peft_files.load(run / "rounds" / "2" / "target")
    for name, factors_ in after.layers.items():
        u, _, v = np.linalg.svd(lora.delta(began, name))
        assert factors_.core is not None
        np.testing.assert_allclose(np.abs(np.diag(factors_.a @ v[:4].T)), 1.0, atol=1e-4)
        np.testing.assert_allclose(np.abs(np.diag(factors_.b.T @ u[:, :4])), 1.0, atol=1e-4)


def test_a_site_that_carries_nothing_is_left_out_and_named(workplace: Path) -> None:
    """It may say what it likes of itself: the others play on."""
    more = ('simulation.policy_overrides={"site-1"={targets=["no_such_map"]}}', "server.network.quorum=0.5")
    run, summary = play(workplace, "unfit", "fedit", *more)

    assert [one["used"] for one in summary["rounds"]] == [["site-0", "site-2"]] * 2
    assert any("among no_such_map; nothing is left to train" in why for why in summary["unready"].values())
    assert not (run / "rounds" / "1" / "releases" / "site-1").exists()


@pytest.mark.parametrize("method", ["fedex_lora", "fed_sb", "dp_dylora"])
def test_a_run_that_was_stopped_goes_on_to_the_same_target(
    method: str, workplace: Path, played: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second round: blocks, cores and parts that sites have are read back from the run's own files."""
    carry = Pipeline._carry

    def dies(self: Any, number: int, *rest: Any) -> None:
        if number == 2:
            raise RoundFailed("stopped here")
        carry(self, number, *rest)

    name = f"resumed-{method}"
    out = io.StringIO()
    words = ["--config", f"configs/methods/{method}.toml", "--run", name]
    words += [word for item in SMALL for word in ("--override", item)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        with monkeypatch.context() as patch:
            patch.setattr(Pipeline, "_carry", dies)
            assert launch.main(words) == 1, out.getvalue()
        assert launch.main(["--resume", str(workplace / "runs" / name)]) == 0, out.getvalue()

    summary = json.loads((workplace / "runs" / name / "summary.json").read_text(encoding="utf-8"))
    assert summary["hashes"] == played[method][1]["hashes"]


def test_a_site_that_lost_its_copy_misses_one_round(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What did not change is not sent again; a site without it refuses, and the next round brings everything."""
    play_round = Pipeline.play

    def loses(self: Any, number: int, *rest: Any) -> Any:
        record = play_round(self, number, *rest)
        if number == 1:
            shutil.rmtree(workplace / "build" / "sites" / "lost" / "1" / "received")
        return record

    monkeypatch.setattr(Pipeline, "play", loses)
    _, summary = play(workplace, "lost", "ffa_lora", "run.rounds=4", "server.network.quorum=0.5")

    both, all_ = ["site-0", "site-2"], ["site-0", "site-1", "site-2"]
    assert [one["used"] for one in summary["rounds"]] == [all_, both, all_, all_]


def test_blocks_travel_whole_at_any_precision(workplace: Path, played: Mapping[str, Any]) -> None:
    _, summary = play(workplace, "flora-half", "flora", 'lora.broadcast_precision="float16"')
    assert [one["used"] for one in summary["rounds"]] == [["site-0", "site-1", "site-2"]] * 2
    assert summary["bytes"]["down"]["site-0"] < played["flora"][1]["bytes"]["down"]["site-0"]


def test_a_site_of_fewer_layers_may_write_as_well(workplace: Path) -> None:
    """Voices of every site, one of which leaves the first block alone: it writes with what it was sent there."""
    more = [
        'server.synthesizer={kind="control_codes", codes="", drafts=6, max_new_tokens=6, voices="each_site"}',
        'server.carries="target"',
        'simulation.policy_overrides={"site-1"={first_layer=1}}',
    ]
    run, summary = play(workplace, "voices", "fedit", *more)
    assert summary["status"] == "completed"
    written = (run / "rounds" / "2" / "drafts.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["origin"]["voice"] for line in written} == {"site-0", "site-1", "site-2"}


def test_a_drawn_rank_moves_only_its_components(played: Mapping[str, Any]) -> None:
    run, summary = played["dp_dylora"]
    ranks = [lora.rank_of(peft_files.load(run / "rounds" / n / "merged")) for n in ("1", "2")]
    assert ranks == [1, 4], "seed 0; another would have to draw less than all in some round as well"
    told = shared(read_tree("configs/methods/dp_dylora.toml"))
    spec = lora.spec_of(models.load("tiny-random", "float32"), told.lora)
    began = lora_start.initial(spec, stream(told.run.seed, "initial adapter"))
    first, second = (peft_files.load(run / "rounds" / n / "target") for n in ("1", "2"))
    for name in first.layers:
        np.testing.assert_array_equal(first.layers[name].a[1:], began.layers[name].a[1:])
        assert not first.layers[name].b[:, 1:].any()
        assert (first.layers[name].a[:1] != began.layers[name].a[:1]).any()
        assert (second.layers[name].b[:, 1:] != 0).any()
    assert math.isfinite(summary["client_level"]["spent"])
