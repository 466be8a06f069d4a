"""A fixed schedule is held to: the server that chose its second run by looking at the first, and what stops it.

The counter-example is computed, not quoted: from below, with privacy losses rounded down, for what was possible; from
above, rounded up, for what a ledger lets through now.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as library
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from clients import local_round
from clients.config import read_client
from clients.local_round import Settings, Site
from fl_app.config import shared
from fl_app.errors import BudgetSpent, LedgerRefusal
from fl_app.privacy import book as ledger_rules
from fl_app.privacy import plan as planning
from fl_app.privacy import renyi_filter
from fl_app.privacy.accountants import pld
from fl_app.privacy.calibrate import noise_multiplier
from fl_app.privacy.chain import Filtered, Header, Planned, Reserved
from fl_app.privacy.ledger import Ledger
from fl_app.privacy.plan import Plan
from fl_app.types import NO_HEAD, Broadcast, DpReceipt, Exponential, Gaussian, PoissonGaussian, Refusal, Upload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.types import Adapter

DELTA, EPSILON, RATE, NOISE = 1e-5, 2.0, 0.01, 0.8
HASH = "ab" * 32
GOLDEN = Path(__file__).parents[1] / "golden" / "ledgers"


def steps_of(noise: float, steps: int, rate: float = RATE) -> DpReceipt:
    event = PoissonGaussian(noise_multiplier=noise, sample_rate=rate, steps=steps, clip_norm=1.0)
    return DpReceipt(event=event, unit="record")


FIRST = steps_of(NOISE, 100)


@functools.cache
def branches() -> tuple[DpReceipt, DpReceipt]:
    """The two second runs between which the server chooses; each fills epsilon 2 to the brim by itself."""
    least = functools.partial(noise_multiplier, [FIRST], sample_rate=RATE, rounds=1, clip_norm=1.0, unit="record")
    bounds = {"epsilon": EPSILON, "delta": DELTA, "floor": 0.3, "ceiling": 20.0}
    return (steps_of(least(steps=1, **bounds), 1), steps_of(least(steps=3000, **bounds), 3000))


@functools.cache
def losses(receipt: DpReceipt, *, above: bool) -> Any:
    """Return the privacy loss of a receipt, each step's rounded up or down to a grid, finer where it accumulates."""
    event = receipt.event
    assert isinstance(event, PoissonGaussian)
    one = library.from_gaussian_mechanism(
        event.noise_multiplier,
        sampling_prob=event.sample_rate,
        value_discretization_interval=1e-3 if above else 2e-5,
        pessimistic_estimate=above,
        use_connect_dots=above,
    )
    return one.self_compose(event.steps)


def adaptive_delta(first: DpReceipt, choices: Sequence[DpReceipt], epsilon: float, *, above: bool) -> float:
    """Return delta at `epsilon` of: the first run, then whichever of `choices` is worst for what was seen.

    With L the privacy loss of the first run, it is the mean over L of the worst choice's delta at epsilon - L: the
    server's best choice for every outcome. The larger of the two neighbours' sides.
    """
    begun, then = losses(first, above=above), [losses(choice, above=above) for choice in choices]
    sides = []
    for side in ("_pmf_remove", "_pmf_add"):
        pmf, loss = spread(getattr(begun, side))
        worst = np.max([deltas(getattr(one, side), epsilon - loss) for one in then], axis=0)
        sides.append(float(np.dot(pmf._probs, worst)) + pmf._infinity_mass)
    return max(sides)


def spread(pmf: Any) -> tuple[Any, Any]:
    """Return a distribution with its losses written out."""
    dense = pmf.to_dense_pmf()
    return dense, (dense._lower_loss + np.arange(dense._probs.size)) * dense._discretization


def deltas(pmf: Any, epsilons: Any) -> Any:
    """Return delta at many epsilons: the mean of (1 - exp(epsilon - loss)) over the losses above each, and infinity."""
    dense, loss = spread(pmf)
    mass = np.append(np.cumsum(dense._probs[::-1])[::-1], 0.0)
    weighted = np.append(np.cumsum((dense._probs * np.exp(-loss))[::-1])[::-1], 0.0)
    first = np.searchsorted(loss, epsilons, side="right")
    return dense._infinity_mass + np.maximum(mass[first] - np.exp(epsilons) * weighted[first], 0.0)


def true_epsilon(first: DpReceipt, choices: Sequence[DpReceipt], *, above: bool) -> float:
    def over(epsilon: float) -> float:
        return float(np.log(adaptive_delta(first, choices, epsilon, above=above) / DELTA))

    return float(brentq(over, 0.5, 4.0, xtol=1e-4))


def opened(folder: Path) -> Ledger:
    return Ledger.open(folder / "ledger.jsonl", dataset="fingerprint", unit="record")


def reserve(ledger: Ledger, receipt: DpReceipt, number: int = 1, *, run: str = "r", epsilon: float = EPSILON) -> None:
    ledger.reserve(run=run, round_number=number, receipts=[receipt], epsilon=epsilon, delta=DELTA)


# --- the hole, and that it is closed


def test_a_server_that_chooses_by_looking_exceeds_what_is_claimed() -> None:
    """The twin of the test below. Each branch alone is within 2; whoever may choose reaches at least 2.1."""
    for branch in branches():
        assert 1.99 < pld.epsilon([FIRST, branch], DELTA) <= EPSILON
        alone = true_epsilon(FIRST, [branch], above=False)
        assert 1.96 < alone <= EPSILON  # the method finds a fixed schedule's own epsilon
    assert 2.1 < true_epsilon(FIRST, branches(), above=False) < 2.3


@pytest.mark.parametrize("branch", [0, 1])
def test_the_ledger_refuses_both_of_its_choices(tmp_path: Path, branch: int) -> None:
    ledger = opened(tmp_path)
    reserve(ledger, FIRST)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(LedgerRefusal, match=r"fixed to noise multiplier 0\.8 at sample rate 0\.01.*renyi_filter"):
        reserve(ledger, branches()[branch], run="another")
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_without_the_check_it_would_take_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the budget alone does not stop it, so the two tests above are about the check and nothing else."""
    monkeypatch.setattr(ledger_rules.Book, "_planned", lambda *_: None)
    for name, branch in zip("ab", branches(), strict=True):
        ledger = opened(tmp_path / name)
        reserve(ledger, FIRST)
        reserve(ledger, branch, run="another")
        assert ledger.spent(DELTA) <= EPSILON


def test_what_stays_open_costs_nothing_more() -> None:
    """Steps, rounds and runs may be chosen by looking, at the planned mechanism: computed from above, for the most."""
    most = bisect.bisect_right(range(1, 4000), EPSILON, key=lambda n: pld.epsilon([steps_of(NOISE, 100 + n)], DELTA))
    assert most > 50
    choices = [steps_of(NOISE, n) for n in (1, most // 2, most)]
    assert adaptive_delta(FIRST, choices, EPSILON, above=True) <= DELTA * (1 + 1e-6)
    # the twin: one step more than fits, and it would not hold
    assert adaptive_delta(FIRST, [*choices, steps_of(NOISE, most + 1)], EPSILON, above=True) > DELTA


def test_steps_rounds_and_runs_stay_open_until_the_budget_is_used(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for number, steps in enumerate((100, 1, 7, 30), start=1):
        reserve(ledger, steps_of(NOISE, steps), number, run=f"run-{number % 2}")
    with pytest.raises(BudgetSpent, match="was promised before the first release and cannot be raised"):
        reserve(ledger, steps_of(NOISE, 3000), 9)
    assert ledger.spent(DELTA) == pld.epsilon([steps_of(NOISE, 138)], DELTA)


# --- the plan's line


def test_the_plan_stands_before_what_it_holds(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    reserve(ledger, FIRST)
    reserve(ledger, FIRST, 2, epsilon=1.9)
    header, planned, *reserved = ledger.entries()
    assert isinstance(header, Header)
    assert isinstance(planned, Planned)
    assert planned.plan == Plan(epsilon=EPSILON, delta=DELTA, mechanism=steps_of(NOISE, 1))
    assert [type(entry) for entry in reserved] == [Reserved, Reserved]
    ledger.verify()


@pytest.mark.parametrize(
    "other",
    [
        steps_of(NOISE + 1e-4, 100),
        steps_of(NOISE, 100, rate=0.011),
        DpReceipt(event=Gaussian(noise_multiplier=NOISE, clip_norm=1.0), unit="record"),
        DpReceipt(event=Exponential(epsilon=0.01), unit="record"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_any_other_mechanism_is_refused(tmp_path: Path, other: DpReceipt, beside: bool) -> None:
    ledger = opened(tmp_path)
    reserve(ledger, FIRST, epsilon=50.0)
    head = ledger.head
    with pytest.raises(LedgerRefusal, match="is fixed to noise multiplier"):
        ledger.reserve(
            run="r", round_number=2, receipts=[steps_of(NOISE, 1), other][not beside :], epsilon=50.0, delta=DELTA
        )
    assert ledger.head == head


def test_a_clip_norm_is_no_part_of_it(tmp_path: Path) -> None:
    """The noise is a multiple of it, so no epsilon depends on it; the policy bounds it."""
    ledger = opened(tmp_path)
    reserve(ledger, FIRST)
    event = PoissonGaussian(noise_multiplier=NOISE, sample_rate=RATE, steps=1, clip_norm=0.25)
    reserve(ledger, DpReceipt(event=event, unit="record"), 2)


def test_several_mechanisms_at_once_need_a_filter(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    both = {"run": "r", "round_number": 1, "receipts": [steps_of(4.0, 1), steps_of(5.0, 1)], "delta": DELTA}
    with pytest.raises(LedgerRefusal, match=r"made of one mechanism, here are: .*multiplier 4 .*multiplier 5 "):
        ledger.reserve(**both, epsilon=8.0)
    held = renyi_filter.fix(epsilon=8.0, delta=DELTA)
    ledger.reserve(**both, epsilon=8.0, renyi=held)


@pytest.mark.parametrize("more", [{"epsilon": 2.01}, {"delta": 1.1e-5}])
def test_a_promise_may_be_lowered_and_not_raised(tmp_path: Path, more: dict[str, float]) -> None:
    ledger = opened(tmp_path)
    reserve(ledger, FIRST)
    asked = {"run": "r", "round_number": 2, "receipts": [steps_of(NOISE, 1)], "epsilon": EPSILON, "delta": DELTA}
    with pytest.raises(LedgerRefusal, match="may be lowered, not raised"):
        ledger.reserve(**asked | more)
    for composition in ("fixed_schedule", "renyi_filter"):
        with pytest.raises(LedgerRefusal, match="may be lowered, not raised"):
            ledger.filter(composition, **{"epsilon": EPSILON, "delta": DELTA} | more)
    ledger.reserve(**asked | {"epsilon": 1.6})
    with pytest.raises(BudgetSpent, match=r"raise epsilon in the site's policy, to at most 2, which"):
        ledger.reserve(**asked | {"epsilon": 1.5})


def test_a_cap_on_the_first_run_does_not_become_the_promise(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    asked = {"round_number": 1, "receipts": [FIRST], "delta": DELTA, "promise": 8.0}
    ledger.reserve(run="a", epsilon=1.6, **asked)
    ledger.reserve(run="b", epsilon=3.2, **asked)
    assert ledger.spent(DELTA) > 1.6


def test_a_plan_that_a_crash_left_alone_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was reserved under it, so nothing can have been released under it."""
    ledger = opened(tmp_path)
    append = Ledger._append

    def dies(self: Ledger, book: Any, body: dict[str, Any]) -> Any:
        if body["kind"] == "reserve":
            raise KeyboardInterrupt
        return append(self, book, body)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_append", dies)
        with pytest.raises(KeyboardInterrupt):
            reserve(ledger, FIRST)
    other = steps_of(3.0, 10)
    reserve(ledger, other, epsilon=1.0)
    assert [type(entry).__name__ for entry in ledger.entries()] == ["Header", "Planned", "Planned", "Reserved"]
    with pytest.raises(LedgerRefusal, match=r"fixed to noise multiplier 3 "):
        reserve(ledger, steps_of(NOISE, 1), 2, epsilon=1.0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.8, 0.9]), st.integers(1, 60)), min_size=2, max_size=8))
def test_whatever_is_asked_only_one_mechanism_is_ever_granted(
    tmp_path_factory: pytest.TempPathFactory, wishes: list[tuple[float, int]]
) -> None:
    ledger = opened(tmp_path_factory.mktemp("ledger"))
    for number, (noise, steps) in enumerate(wishes):
        asked = steps_of(noise, steps)
        past = ledger.receipts()
        alike = not past or planning.mechanisms(past) == planning.mechanisms([asked])
        try:
            reserve(ledger, asked, number)
            assert alike
        except BudgetSpent:
            assert pld.epsilon([*past, asked], DELTA) > EPSILON
        except LedgerRefusal:
            assert not alike
    assert len(planning.mechanisms(ledger.receipts())) == 1
    assert ledger.spent(DELTA) <= EPSILON


# --- what is promised after a change to a filter


def test_after_a_change_to_a_filter_twice_the_delta_is_promised(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    policy = {"epsilon": EPSILON, "delta": DELTA}

    def promised(composition: Any) -> tuple[float, float, str]:
        found = ledger.book().promise(composition, **policy)
        return found.epsilon, found.delta, found.composition

    assert promised("renyi_filter") == (EPSILON, DELTA, "renyi_filter")  # a filter from the start: once
    reserve(ledger, steps_of(3.0, 1))
    assert promised("fixed_schedule") == (EPSILON, DELTA, "fixed_schedule")
    assert promised("renyi_filter") == (EPSILON, 2 * DELTA, "renyi_filter")  # before its line is there
    held = ledger.filter("renyi_filter", **policy)
    ledger.reserve(run="b", round_number=1, receipts=[steps_of(3.0, 2)], **policy, renyi=held)
    assert promised("renyi_filter") == promised("fixed_schedule") == (EPSILON, 2 * DELTA, "renyi_filter")
    other = opened(tmp_path / "from the start")
    other.reserve(run="a", round_number=1, receipts=[steps_of(3.0, 1)], **policy, renyi=held)
    assert other.book().promise("renyi_filter", **policy).delta == DELTA


# --- ledgers of the version before


def old(folder: Path, name: str) -> Ledger:
    content = (GOLDEN / f"schema_1_{name}.jsonl").read_bytes()
    (folder / "ledger.jsonl").write_bytes(content)
    (folder / "ledger.jsonl.next").write_bytes(content.splitlines(keepends=True)[-1])
    return opened(folder)


def test_a_ledger_of_one_mechanism_goes_on_under_a_plan(tmp_path: Path) -> None:
    ledger = old(tmp_path, "one_mechanism")
    before = (tmp_path / "ledger.jsonl").read_bytes()
    assert ledger.receipts() == (steps_of(4.0, 3, rate=0.25),) * 2
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    reserve(ledger, steps_of(4.0, 5, rate=0.25), 3, epsilon=8.0)
    content = (tmp_path / "ledger.jsonl").read_bytes()
    assert content.startswith(before)
    assert [json.loads(line)["kind"] for line in content[len(before) :].splitlines()] == ["plan", "reserve"]
    with pytest.raises(LedgerRefusal, match="is fixed to noise multiplier 4"):
        reserve(ledger, steps_of(5.0, 5, rate=0.25), 4, epsilon=8.0)


def test_a_ledger_of_several_mechanisms_goes_on_under_a_filter_only(tmp_path: Path) -> None:
    ledger = old(tmp_path, "two_mechanisms")
    for noise in (3.0, 4.0):
        with pytest.raises(LedgerRefusal, match=r"here are: noise multiplier 3 .*noise multiplier 4 "):
            reserve(ledger, steps_of(noise, 1, rate=0.25), 3, epsilon=8.0)
    held = ledger.filter("renyi_filter", epsilon=8.0, delta=DELTA)
    ledger.reserve(
        run="r", round_number=3, receipts=[steps_of(3.0, 1, rate=0.25)], epsilon=8.0, delta=DELTA, renyi=held
    )
    assert ledger.book().promise("renyi_filter", epsilon=8.0, delta=DELTA).delta == 2 * DELTA


def test_a_ledger_that_a_filter_held_is_held_by_it(tmp_path: Path) -> None:
    ledger = old(tmp_path, "filter")
    assert sum(isinstance(entry, Filtered) for entry in ledger.entries()) == 1
    with pytest.raises(LedgerRefusal, match="no fixed schedule certifies"):
        reserve(ledger, steps_of(4.0, 1, rate=0.25), 3, epsilon=8.0)


def test_an_old_ledger_has_no_head_to_show(tmp_path: Path) -> None:
    """Its hashes have no salt: whoever knows all rows but one could try out the last."""
    ledger = old(tmp_path, "one_mechanism")
    assert ledger.public_head == NO_HEAD != ledger.head
    new = opened(tmp_path / "new")
    assert new.public_head == new.head != NO_HEAD


# --- at a site


@pytest.fixture
def site(site_folder: Any) -> Site:
    site_folder.policy(limits={"min_noise_multiplier": 0.5, "max_noise_multiplier": 9.0})
    return Site(directory=site_folder.directory)


def ask(site: Site, start: Adapter, run: str, number: int = 1, **change: Any) -> Upload | Refusal:
    """Ask for one round of two steps, two rounds planned, unless `change` says otherwise."""
    client = {"learner": {"kind": "dp_lora", "steps": change.get("steps", 2)}, "epsilon": change.get("epsilon", 1.5)}
    tree: dict[str, Any] = {
        "run": {"rounds": change.get("rounds", 2), "mode": "simulation", "seed": 3},
        "model": {"name": "tiny-random", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "client": client,
    }
    told = Settings(shared=shared(tree), asked=read_client(tree))
    message = Broadcast(run=run, round=number, adapter=start, config_digest="d")
    return local_round.guarded(site, run, number, lambda: local_round.train(site, message, told))


def noise_of(answer: Upload | Refusal) -> float:
    assert isinstance(answer, Upload), answer
    (receipt,) = answer.receipts or ()
    assert isinstance(receipt.event, PoissonGaussian)
    return receipt.event.noise_multiplier


def test_a_second_run_goes_on_at_the_noise_of_the_first(
    site: Site, learned: Callable[[int], Adapter], site_folder: Any
) -> None:
    start = learned(5)
    first = noise_of(ask(site, start, "a"))
    # fewer steps, more rounds, more budget: the server may ask, the noise stays
    assert noise_of(ask(site, start, "b", steps=1, rounds=4, epsilon=6.0)) == first
    assert noise_of(ask(site, start, "a", 2)) == first
    answer = ask(site, start, "c", steps=10, rounds=5, epsilon=1.0)
    assert isinstance(answer, Refusal)
    assert answer.code == "budget_spent"
    log = (site.directory / "site.log").read_text(encoding="utf-8")
    assert "its 5 rounds would reach epsilon" in log
    assert "to which this ledger's schedule is fixed" in log
    # the way out that it names
    site_folder.policy(
        privacy={"composition": "renyi_filter"}, limits={"min_noise_multiplier": 0.5, "max_noise_multiplier": 9.0}
    )
    assert noise_of(ask(site, start, "c", steps=10, rounds=5, epsilon=1.5)) > first
    told = local_round.hello(site)
    assert (told.composition, told.delta, told.epsilon) == ("renyi_filter", 2 * DELTA, 8.0)


def test_a_site_that_changes_its_sample_rate_is_held_to_the_old_one(
    site: Site, learned: Callable[[int], Adapter], site_folder: Any
) -> None:
    noise_of(ask(site, learned(5), "a"))
    site_folder.policy(
        limits={"min_noise_multiplier": 0.5, "max_noise_multiplier": 9.0},
        constants={"sample_rate": 0.2, "expected_batch": 4, "max_tokens": 24},
    )
    for run, number in (("a", 2), ("b", 1)):
        answer = ask(site, learned(5), run, number)
        assert isinstance(answer, Refusal)
        assert answer.code == "ledger"
    assert ", and noise multiplier" in (site.directory / "site.log").read_text(encoding="utf-8")


# --- small promises of the module


@pytest.mark.parametrize("change", [{"epsilon": 0.0}, {"epsilon": float("inf")}, {"delta": 0.0}, {"mechanism": FIRST}])
def test_strange_plans_are_refused(change: dict[str, Any]) -> None:
    good = Plan(epsilon=EPSILON, delta=DELTA, mechanism=steps_of(NOISE, 1))
    with pytest.raises(LedgerRefusal):
        dataclasses.replace(good, **change)


def test_repetitions_and_one_step_are_inverse() -> None:
    for receipt in (FIRST, DpReceipt(event=Gaussian(noise_multiplier=2.0, clip_norm=1.0, count=7), unit="record")):
        (count,) = {getattr(receipt.event, "steps", None) or getattr(receipt.event, "count", None)}
        assert planning.repeated(planning.one_step(receipt), count or 0) == receipt
    assert planning.describe(FIRST) == "100 steps of noise multiplier 0.8 at sample rate 0.01"
    assert planning.describe(planning.one_step(FIRST)) == "noise multiplier 0.8 at sample rate 0.01"
