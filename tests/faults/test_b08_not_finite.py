"""B8, numbers that are none: in a row, in the base model, in what is taught, in what is sampled or scored.

A site never sends any; its step happens and is charged, whatever its rows hold, or else success would tell of a row.
The server's target stays the last good one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from clients import local_round
from clients.config import read_client
from clients.dp_steps import DpAdapterLearner
from clients.local_round import Settings, Site
from fl_app import inference, lora, models, peft_files, sequences
from fl_app.config import shared
from fl_app.errors import NotFinite, RoundFailed, StillroomError
from fl_app.seeds import stream
from fl_app.types import AdapterRelease, Broadcast, Lesson, LoraFactors, Refusal, Upload
from strategies.exam import Exam, ExamItem
from strategies.lab import Lab
from strategies.tuners.sft import Sft
from strategies.tuning import SKIPPABLE, Tuning
from tests.conftest import ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

NAN, INF = float("nan"), float("inf")
BAD = {"nan": NAN, "inf": INF, "-inf": -INF}
each_kind = pytest.mark.parametrize("value", BAD.values(), ids=BAD)
bar = pytest.mark.bar("B8")


# --- at a site


@pytest.fixture
def site(site_folder: Any) -> Site:
    site_folder.policy(constants={"sample_rate": 1.0})
    return Site(directory=site_folder.directory)


@pytest.fixture
def start(learned: Callable[[int], Adapter]) -> Adapter:
    return learned(5)


def settings(engine: str = "fused") -> Settings:
    tree: dict[str, Any] = {
        "run": {"rounds": 1, "mode": "simulation", "seed": 3},
        "model": {"name": "tiny-random", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "client": {"learner": {"kind": "dp_lora", "steps": 2, "engine": engine}, "probe": {"items": 1}},
    }
    return Settings(shared=shared(tree), asked=read_client(tree))


def message(adapter: Adapter) -> Broadcast:
    return Broadcast(run="run-a", round=1, adapter=adapter, config_digest="d" * 64)


def trained(site: Site, adapter: Adapter, told: Settings) -> Upload | Refusal:
    asked = message(adapter)
    return local_round.guarded(site, "run-a", 1, lambda: local_round.train(site, asked, told))


def charged(site: Site) -> int:
    return len(site.ledger(site.policy).receipts())


def sent(answer: Upload | Refusal) -> Adapter:
    assert isinstance(answer, Upload), answer
    assert isinstance(answer.release, AdapterRelease)
    factors = [part for one in answer.release.adapter.layers.values() for part in (one.a, one.b)]
    assert all(np.isfinite(part).all() for part in factors)
    return answer.release.adapter


def spoil(monkeypatch: pytest.MonkeyPatch, frozen: FrozenModel, factor: float, rows: tuple[int, ...]) -> list[int]:
    """Let the losses of these rows be multiplied by `factor`; return a list that grows by one for each that was."""
    marked = {tuple(frozen.tokenizer(ROWS[row]["instruction"], add_special_tokens=False)["input_ids"]) for row in rows}
    plain, hits = sequences.example_losses, []

    def holds(ids: tuple[int, ...]) -> bool:
        return any(text == ids[n : n + len(text)] for text in marked for n in range(len(ids)))

    def losses(model: Any, batch: Any, *more: Any) -> Any:
        import torch

        struck = [holds(key.ids) for key in batch.keys]
        hits.extend(n for n, one in enumerate(struck) if one)
        return plain(model, batch, *more) * torch.tensor([factor if one else 1.0 for one in struck])

    monkeypatch.setattr(sequences, "example_losses", losses)
    return hits


@bar
@pytest.mark.parametrize("engine", ["fused", "opacus"])
@pytest.mark.parametrize("rows", [(4,), tuple(range(len(ROWS)))], ids=["one example", "every example"])
@each_kind
def test_an_example_that_is_no_number_counts_as_zero(
    value: float,
    rows: tuple[int, ...],
    engine: str,
    site: Site,
    start: Adapter,
    frozen: FrozenModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    """The release is bit for bit that of rows whose gradient is zero, and costs the same; only noise is in it."""
    import shutil

    twin = Site(directory=tmp_path / "twin")
    shutil.copytree(site.directory, twin.directory)
    with monkeypatch.context() as patch:
        hits = spoil(patch, frozen, value, rows)
        found = sent(trained(site, start, settings(engine)))
    with monkeypatch.context() as patch:
        spoil(patch, frozen, 0.0, rows)
        expected = sent(trained(twin, start, settings(engine)))
    assert len(hits) >= 2 * len(rows), "every step met them"
    assert lora.sha256(found) == lora.sha256(expected) != lora.sha256(start)
    assert charged(site) == charged(twin) == 1


def broken_base(frozen: FrozenModel, value: float) -> FrozenModel:
    import torch

    own = frozen.replica(own_weights=True)
    with torch.no_grad():
        own.model.get_input_embeddings().weight.fill_(value)
    return own


@bar
@each_kind
def test_a_base_model_that_is_no_number_still_trains_and_charges(
    value: float, site: Site, start: Adapter, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = broken_base(frozen, value)
    monkeypatch.setattr(models, "load", lambda *_: broken)
    adapter = sent(trained(site, start, settings()))
    assert lora.sha256(adapter) != lora.sha256(start), "noise alone moved it"
    assert charged(site) == 1


@bar
@each_kind
def test_a_probe_that_is_no_number_is_not_sent(
    value: float, site: Site, start: Adapter, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = broken_base(frozen, value)
    monkeypatch.setattr(models, "load", lambda *_: broken)
    answer = local_round.guarded(site, "run-a", 1, lambda: local_round.probe(site, message(start), settings()))
    assert isinstance(answer, Refusal)
    assert "NotFinite" in (site.directory / "site.log").read_text()


def with_one(adapter: Adapter, value: float) -> Adapter:
    name = sorted(adapter.layers)[1]
    b = adapter.layers[name].b.copy()
    b[0, 0] = value
    return dataclasses.replace(adapter, layers={**adapter.layers, name: LoraFactors(a=adapter.layers[name].a, b=b)})


@bar
@each_kind
def test_a_broadcast_that_is_no_number_spends_nothing(value: float, site: Site, start: Adapter) -> None:
    answer = trained(site, with_one(start, value), settings())
    assert isinstance(answer, Refusal)
    assert charged(site) == 0


@bar
@each_kind
def test_a_learner_that_returns_no_numbers_sends_nothing_and_is_charged(
    value: float, site: Site, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever went wrong inside: the release does not reach the outbox, and the reservation stays spent."""
    spoiled = AdapterRelease(adapter=with_one(start, value))
    monkeypatch.setattr(DpAdapterLearner, "__call__", lambda *_: spoiled)
    answer = trained(site, start, settings())
    assert isinstance(answer, Refusal)
    assert "holds NaN or infinity" in (site.directory / "site.log").read_text()
    assert charged(site) == 1
    assert list((site.directory / "outbox").rglob("*.safetensors")) == []


# --- at the server


@pytest.fixture
def lab(frozen: FrozenModel) -> Iterator[Lab]:
    one = lab_of(frozen)
    yield one
    one.close()


def lab_of(frozen: FrozenModel) -> Lab:
    return Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=None,
        professional_name="professional",
        system="",
        threads=1,
        batch_rows=4,
        public_words=frozenset(),
    )


LESSONS = tuple(
    Lesson(draft_id=str(n), instruction=f"Question {n}?", answer=f"Answer {n}.", teacher="t") for n in range(8)
)
TUNER = Sft(kind="sft", epochs=10, batch_size=4, learning_rate=1e-2)
STEPS = 20


def gradients_that_fail(patch: pytest.MonkeyPatch, lab: Lab, value: float, at: Callable[[int], bool]) -> Any:
    """Return a tuner whose n-th gradient is `value` where `at(n)`."""
    tuner: Any = TUNER.build(lab)
    plain, calls = Tuning._gradients, []

    def gradients(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        found = plain(self, *arguments)
        return [gradient * value for gradient in found] if at(len(calls)) else found

    patch.setattr(Tuning, "_gradients", gradients)
    return tuner


@bar
@each_kind
def test_a_few_steps_that_are_no_number_are_left_out_and_counted(
    value: float, lab: Lab, start: Adapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    few = int(SKIPPABLE * STEPS)
    tuner = gradients_that_fail(monkeypatch, lab, value, lambda n: 5 <= n < 5 + few)
    tuned = tuner(start, LESSONS, stream(0, "tune"))
    assert all(np.isfinite(part).all() for one in tuned.layers.values() for part in (one.a, one.b))
    assert lora.sha256(tuned) != lora.sha256(start)
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert [one.rsplit(", ", 1)[1] for one in said] == [f"{n} so far" for n in range(1, few + 1)]


@bar
@each_kind
def test_more_than_a_few_stop_the_tuning(
    value: float, lab: Lab, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = int(SKIPPABLE * STEPS)
    tuner = gradients_that_fail(monkeypatch, lab, value, lambda n: 5 <= n < 6 + few)
    with pytest.raises(RoundFailed, match=rf"step {5 + few} of {STEPS}, {few + 1} steps without a usable gradient"):
        tuner(start, LESSONS, stream(0, "tune"))


@bar
def test_weights_that_end_as_no_number_are_no_target(lab: Lab, start: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    read = lora.read
    monkeypatch.setattr(lora, "read", lambda *a, **k: with_one(read(*a, **k), INF))
    with pytest.raises(RoundFailed, match="weights are not finite after 20 steps"):
        TUNER.build(lab)(start, LESSONS, stream(0, "tune"))


@bar
@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
@pytest.mark.parametrize("place", ["everywhere", "one score", "one row"])
@each_kind
def test_scores_that_are_no_number_are_a_typed_error(
    value: float, place: str, temperature: float, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One score of minus infinity is a token that cannot be said, which is sound."""
    model = frozen.replica().model
    forward = model.forward

    def spoiled(*arguments: Any, **options: Any) -> Any:
        out = forward(*arguments, **options)
        logits = out.logits.clone()
        logits[
            slice(None) if place != "one row" else slice(1), :, slice(3, 4) if place == "one score" else slice(None)
        ] = value
        out.logits = logits
        return out

    monkeypatch.setattr(model, "forward", spoiled)

    def text() -> list[str]:
        return inference.generate(
            model,
            frozen.tokenizer,
            ["A cough:", "A fever:"],
            max_new_tokens=3,
            temperature=temperature,
            top_p=0.9,
            rng=np.random.default_rng(0),
        )

    if place == "one score" and value == -INF:
        assert len(text()) == 2
        return
    with pytest.raises(NotFinite, match="best score"):
        text()


ITEMS = Exam(
    choice=(ExamItem(id="1", question="Cough?", choices=("yes", "no"), answer=0),),
    free=(ExamItem(id="2", question="Fever?", choices=(), answer="Rest."),),
    max_new_tokens=2,
    calibrate=False,
)


@bar
@each_kind
def test_an_exam_of_a_broken_model_is_a_typed_error_and_no_score(value: float, frozen: FrozenModel) -> None:
    sound, broken = lab_of(frozen), lab_of(broken_base(frozen, value))
    try:
        assert all(math.isfinite(one.value) for one in ITEMS.score(sound.local_with(None, "base")).values())
        with pytest.raises(NotFinite, match="log-likelihood"):
            ITEMS.score(broken.local_with(None, "base"))
    finally:
        sound.close()
        broken.close()


@bar
@each_kind
def test_an_adapter_that_is_no_number_is_never_written(value: float, start: Adapter, tmp_path: Any) -> None:
    peft_files.save(start, tmp_path / "target", base_name="tiny-random")
    before = {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()}
    with pytest.raises(NotFinite, match="holds NaN or infinity"):
        peft_files.save(with_one(start, value), tmp_path / "target", base_name="tiny-random")
    assert {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()} == before


# --- over a whole run: the target of the last good round is what stays


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from simulations import launch

    place = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "BUILD", place / "build")
        patch.setattr(launch, "RUNS", place / "runs")
        yield place


SMALL = """
simulation.partition={kind="iid", sites=2}
simulation.max_rows_per_site=12
client.learner.steps=1
server.synthesizer.drafts=4
server.synthesizer.max_new_tokens=8
server.filters=[{kind="near_duplicate"}]
server.distiller.max_new_tokens=6
server.exam.choice_items=2
server.exam.free_items=1
server.exam.max_new_tokens=2
"""


@bar
@pytest.mark.parametrize("where", ["tuner", "exam", "synthesiser"])
def test_a_round_that_fails_leaves_the_last_good_target(
    where: str, workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simulations import launch
    from strategies.synthesizers.control_codes import CodedSampling
    from strategies.tuners.sft import SupervisedTuning

    rounds: list[int] = []

    def in_round_two(plain: Any, broken: Callable[..., Any], *, calls: int = 1) -> Any:
        def stage(self: Any, *arguments: Any) -> Any:
            rounds.append(1)
            return broken(self, *arguments) if len(rounds) > calls else plain(self, *arguments)

        return stage

    if where == "tuner":
        plain = SupervisedTuning.__call__
        monkeypatch.setattr(SupervisedTuning, "__call__", in_round_two(plain, lambda *a: with_one(plain(*a), NAN)))
    elif where == "exam":
        score = Exam.score
        refuse = in_round_two(score, lambda *_: inference._finite(bad_scores()), calls=5)
        monkeypatch.setattr(Exam, "score", refuse)
    else:
        plain = CodedSampling.__call__
        refuse = in_round_two(plain, lambda *_: inference._finite(bad_scores()))
        monkeypatch.setattr(CodedSampling, "__call__", refuse)

    prepared = launch.prepare("configs/smoke.toml", SMALL, run=f"last-good-{where}")
    with pytest.raises(StillroomError, match=r"NaN or infinity|best score"):
        launch.play(prepared)
    summary = json.loads((prepared.directory / "summary.json").read_text())
    assert summary["status"] == "failed"
    first = prepared.directory / "rounds" / "1" / "target" / "adapter_model.safetensors"
    assert (prepared.directory / "target" / first.name).read_bytes() == first.read_bytes()


def bad_scores() -> Any:
    import torch

    return torch.full((1, 3), NAN)
