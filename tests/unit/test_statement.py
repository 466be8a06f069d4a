"""What stands beside an epsilon: all five, or the tests that read it say which is missing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fl_app.privacy.accountants import pld
from fl_app.privacy.statement import Statement, of_entry, of_receipts, of_site
from fl_app.types import DpReceipt, Exponential, Gaussian, MechanismEvent, PoissonGaussian
from simulations.report.record import statement_of

STEP = PoissonGaussian(noise_multiplier=1.0, sample_rate=0.05, steps=20, clip_norm=1.0)
WHOLE = Gaussian(noise_multiplier=4.0, clip_norm=1.0)


def patients(*events: MechanismEvent) -> list[DpReceipt]:
    return [DpReceipt(event=event, unit="patient") for event in events]


def test_the_words_in_full() -> None:
    told = of_receipts(patients(STEP), delta=1e-5, accountant="PLD")
    assert told.words() == "at delta 1e-05, per patient, add_or_remove_one, Poisson sampling, PLD"


@pytest.mark.parametrize(
    ("events", "sampling"),
    [
        ((STEP, STEP), "Poisson"),
        ((WHOLE,), "no"),
        ((Exponential(epsilon=0.1),), "no"),
        ((WHOLE, STEP, Exponential(epsilon=0.1)), "Poisson and no"),
    ],
)
def test_sampling_is_read_from_the_receipts(events: tuple[MechanismEvent, ...], sampling: str) -> None:
    """The twin: no amplification is claimed for a release of all units, whoever writes it down."""
    assert of_receipts(patients(*events), delta=1e-5, accountant="PLD").sampling == sampling


def test_what_a_report_reads_is_all_of_it() -> None:
    fields = of_site(delta=1e-5, unit="record").fields()
    found = statement_of(fields)
    assert found is not None
    assert dataclasses.asdict(found) == fields
    assert set(fields) == {field.name for field in dataclasses.fields(Statement)}
    assert of_entry({"spent": 1.0, **fields}) == of_site(delta=1e-5, unit="record")
    for missing in fields:
        rest = {key: value for key, value in fields.items() if key != missing}
        assert statement_of(rest) is None
        with pytest.raises(KeyError, match=missing):
            of_entry(rest)


@pytest.mark.parametrize(
    ("composition", "words"),
    [
        ("fixed_schedule", ", for a schedule fixed in advance"),
        ("renyi_filter", ", and the site's Renyi filter, whatever was chosen by looking"),
    ],
)
def test_a_site_that_says_how_it_adds_up_is_quoted(composition: Any, words: str) -> None:
    assert of_site(delta=1e-5, unit="record", composition=composition).accountant == pld.label() + words


def test_a_site_s_figure_names_both_ways_in_which_it_may_have_been_made() -> None:
    assert of_site(delta=1e-5, unit="record").accountant == (
        f"{pld.label()}, for a schedule fixed in advance, or the site's Renyi filter"
    )


def test_a_guarantee_is_never_rounded_below_itself() -> None:
    from fl_app.privacy.statement import rounded_up

    assert [rounded_up(value) for value in (1.96449, 7.99664, 0.00012345, 12345.6, 8.0, 0.0)] == [
        "1.965", "7.997", "0.0001235", "1.235e+04", "8", "0",
    ]  # fmt: skip
    assert rounded_up(float("inf")) == "inf"
