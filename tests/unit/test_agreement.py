"""What the two sides of a configuration must agree on: the tables here, and the configurations that do not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import pytest

from clients.learners import AnyLearner
from fl_app.config import parse, read_tree
from fl_app.errors import ConfigInvalid
from fl_app.types import ReleaseSpec
from strategies import agreement
from strategies.config import read_server
from strategies.distillers.professional import Professional
from strategies.synthesizers import AnySynthesizer
from strategies.synthesizers.control_codes import ControlCodes
from strategies.synthesizers.epsvec import EpsVec
from strategies.synthesizers.released_texts import ReleasedTexts
from strategies.tuners.sft import Sft

if TYPE_CHECKING:
    from pathlib import Path

MINIMAL: dict[str, dict[str, Any]] = {
    "private_prediction": {"buckets_per_code": 1, "expected_units": 4.0, "tokens_per_bucket": 8},
    "invisible_ink": {"buckets_per_code": 1, "expected_units": 4.0},
    "epsvec": {"layers": [0]},
    "pe_votes": {"embedder": {"kind": "local"}},
}
CODES = {"kind": "control_codes", "codes": "codes.jsonl", "drafts": 4}
STEER = {"kind": "epsvec", "codes": "codes.jsonl", "drafts": 4, "layers": [1, 2]}


def members(union: Any) -> list[Any]:
    return list(get_args(get_args(union)[0]))


def kind_of(section: Any) -> str:
    return get_args(section.model_fields["kind"].annotation)[0]


def test_the_table_says_what_every_learner_sends() -> None:
    found = {}
    for section in members(AnyLearner):
        kind = kind_of(section)
        found[kind] = section(kind=kind, **MINIMAL.get(kind, {"steps": 1})).build(1).release_kind
    assert found == agreement.RELEASED


def test_every_synthesizer_says_what_it_writes_from_and_somebody_sends_it() -> None:
    wanted = {kind_of(section): section.writes_from for section in members(AnySynthesizer)}
    assert {kind for kind, release in wanted.items() if release is None} == {"public_only", "zero_shot"}
    assert {release for release in wanted.values() if release} == set(agreement.RELEASED.values())


def test_the_defaults_of_learners_that_write_are_known_here() -> None:
    writers = [section for section in members(AnyLearner) if agreement.RELEASED[kind_of(section)] == "text"]
    assert {kind_of(one): one.model_fields["texts_per_bucket"].default for one in writers} == agreement.TEXTS_PER_BUCKET
    assert {one.model_fields["max_bytes"].default for one in writers} == {agreement.MAX_BYTES}


@pytest.mark.parametrize(
    ("learner", "most", "longest"),
    [
        ({"kind": "invisible_ink", "buckets_per_code": 3}, 6, 4096),
        ({"kind": "invisible_ink", "buckets_per_code": 3, "texts_per_bucket": 2, "max_bytes": 80}, 12, 80),
        ({"kind": "private_prediction", "buckets_per_code": 1}, 32, 4096),
    ],
)
def test_no_site_may_write_more_than_the_server_takes(
    tmp_path: Path, learner: dict[str, Any], most: int, longest: int
) -> None:
    codes = tmp_path / "codes.jsonl"
    codes.write_text("".join(f'{{"id": "{n}", "text": "about {n}"}}\n' for n in "ab"), encoding="utf-8")

    def check(texts: int, size: int) -> None:
        takes = {"kind": "released_texts", "codes": str(codes), "max_texts": texts, "max_bytes": size}
        agreement.check({"client": {"learner": learner}}, synthesizer=parse(ReleasedTexts, takes), filters=[])

    check(most, longest)
    with pytest.raises(ConfigInvalid, match=f"max_texts = {most - 1}, and by client.learner a site may send {most} "):
        check(most - 1, longest)
    with pytest.raises(ConfigInvalid, match=f"max_bytes = {longest - 1}, .* may send {longest} "):
        check(most, longest - 1)


def test_layers_that_are_measured_are_those_that_are_pushed() -> None:
    steer = parse(EpsVec, STEER)
    agreement.check({"client": {"learner": {"kind": "epsvec", "layers": [1, 2]}}}, synthesizer=steer, filters=[])
    for layers in ([2, 1], [1], None):
        learner = {"kind": "epsvec"} | ({"layers": layers} if layers else {})
        with pytest.raises(ConfigInvalid, match=r"server\.synthesizer\.layers = \[1, 2\] are pushed"):
            agreement.check({"client": {"learner": learner}}, synthesizer=steer, filters=[])


def test_an_unknown_learner_is_left_to_its_own_table() -> None:
    agreement.check({"client": {"learner": {"kind": "dp_lorra"}}}, synthesizer=parse(ControlCodes, CODES), filters=[])
    agreement.check({}, synthesizer=parse(ControlCodes, CODES), filters=[])


def test_a_survey_has_the_lengths_of_codes_and_features() -> None:
    asks = ReleaseSpec(codes=frozenset("abc"))
    kernel = {"embedder": {"kind": "local"}, "dim": 64}
    assert agreement.survey({}, asks) == {}
    assert agreement.survey({"client": {"survey": {"noise_multiplier": 2.0}}}, asks) == {"codes": 3}
    assert agreement.survey({"client": {"survey": {"kernel": kernel}}}, asks) == {"codes": 3, "kernel": 64}
    assert agreement.survey({"client": {"survey": {"codes": False, "kernel": kernel}}}, asks) == {"kernel": 64}
    with pytest.raises(ConfigInvalid, match=r"counts control codes, and server\.synthesizer has none"):
        agreement.survey({"client": {"survey": {}}}, ReleaseSpec(kind=None))


def test_a_task_is_not_rehearsed_as_a_draft() -> None:
    asked = Professional(kind="professional", task="Sum up: {text}")
    agreement.check_task(asked, Sft(kind="sft"))
    agreement.check_task(Professional(kind="professional"), Sft(kind="sft", rehearse=0.5))
    with pytest.raises(ConfigInvalid, match=r"server\.tuner\.rehearse = 0\.5 would write the task"):
        agreement.check_task(asked, Sft(kind="sft", rehearse=0.5))


# --- what is carried from round to round


def served(*overrides: str) -> Any:
    return read_server(read_tree("configs/federated.toml", "\n".join(['server.exam.path="x"', *overrides])))


FEDSA = 'client.learner={kind="dp_fedsa_lora", steps=1}'
MIXED = 'server.ranks={kind="listed", ranks={"site-0"=2}}'
CORE = 'client.learner={kind="dp_lora_sb", steps=1}'
WRITES = 'server.synthesizer={kind="control_codes", codes="", drafts=4}'
CENTRAL = (
    '{kind="central_dp", inner={kind="mean_factors"}, clip_norm=1.0, noise_multiplier=1.0, epsilon=8.0, delta=1e-5}'
)


def test_the_common_configuration_of_all_methods_agrees() -> None:
    assert served().carries == "merged"
    assert served(MIXED, 'server.aggregator={kind="stacked"}').ranks.kind == "listed"
    assert served(CORE).synthesizer.kind == "no_drafts"


@pytest.mark.parametrize(
    ("aggregator", "grows"),
    [
        ('{kind="mean_factors"}', False),
        ('{kind="ridge"}', False),
        ('{kind="stacked"}', True),
        ('{kind="residual"}', True),
        ('{kind="krum_product", inner={kind="mean_factors"}}', False),
        ('{kind="krum_product", inner={kind="stacked"}}', True),
        (CENTRAL, False),
    ],
)
def test_an_aggregate_that_is_a_stack_needs_the_room_of_one(aggregator: str, grows: bool) -> None:
    assert agreement.stacks(served(f"server.aggregator={aggregator}").aggregator) == grows


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (('server.synthesizer={kind="zero_shot", codes="", drafts=4}',), "asks them for none"),
        (('server.aggregator={kind="mean_product"}',), "'mean_product' grows in rank and cannot be trained on"),
        ((MIXED,), r"'mean_factors' averages factor by factor.*; use stacked"),
        ((MIXED, 'server.aggregator={kind="residual"}'), "'residual' starts from the mean of the factors"),
        ((MIXED, 'server.aggregator={kind="median_factors"}'), "'median_factors' adds or orders coordinate"),
        ((MIXED, f"server.aggregator={CENTRAL}"), "'central_dp' adds or orders coordinate"),
        ((CORE, WRITES), "a tuner would move them"),
        ((FEDSA, 'server.aggregator={kind="truncated_svd"}'), "shares a alone"),
        ((FEDSA, 'server.ranks={kind="drawn", choices=[1, 2]}'), "shares a alone"),
        (('server.aggregator={kind="truncated_svd", rank=8}',), "rank = 8 exceeds the 4 that a round trains"),
        (
            ('server.aggregator={kind="truncated_svd", rank=4}', 'server.ranks={kind="drawn", choices=[2, 4]}'),
            "rank = 4 exceeds the 2",
        ),
        ((MIXED, 'server.aggregator={kind="krum_product", inner={kind="stacked"}}'), "measures what an upload changed"),
        ((CORE, 'server.aggregator={kind="krum_product", inner={kind="ridge"}}'), "'krum_product' takes none"),
        ((CORE, f"server.aggregator={CENTRAL}"), "client.learner moves 'core'"),
        (('client.learner={kind="dp_fedsa_lora", steps=1}', WRITES), "the server has no model that writes"),
        ((CORE, 'server.carries="target"'), "a tuner would move them"),
        ((CORE, 'server.aggregator={kind="residual"}'), "'residual' takes none: .*; use mean_factors"),
    ],
)
def test_what_cannot_be_carried_is_refused_before_any_site_is_asked(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        served(*overrides)
