"""Who trains which rank: by list, by memory, by draw; and that a cut adapter is a part of the whole one."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from fl_app import lora, lora_cut
from fl_app.config import parse
from fl_app.errors import AdapterMismatch, ConfigInvalid
from fl_app.lora import LoraSpec
from fl_app.types import AdapterRelease, Hello, Merged, Upload
from strategies import carried, ranks
from strategies.carried import Carried
from strategies.ranks import AnyRanks, DrawnRank, Ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

    Make = Callable[[int], Adapter]

SPEC = LoraSpec(shapes={"layers.0.q": (6, 4), "layers.1.q": (6, 4)}, rank=8, alpha=16.0, base="base")


def hello(site: str = "inn", **more: Any) -> Hello:
    return Hello(site=site, epsilon=8.0, delta=1e-5, unit="record", spent=0.0, **more)


def ranked(section: dict[str, Any], *, spec: LoraSpec = SPEC, seed: int = 0, tokens: int = 1024) -> Ranks:
    """A world in which a rank costs its number in megabytes, and a token a kilobyte."""
    built = TypeAdapter(AnyRanks).validate_python(section)
    return Ranks(
        section=built, spec=spec, seed=seed, tokens=tokens, cost=lambda some, tokens: (some.rank << 20) + (tokens << 10)
    )


def test_everybody_trains_the_whole_where_nothing_is_said() -> None:
    assert ranked({"kind": "same"}).of_site(hello(), 3) == SPEC


def test_a_list_is_followed_and_alpha_goes_with_the_rank() -> None:
    listed = ranked({"kind": "listed", "ranks": {"inn": 2}})

    assert (listed.of_site(hello(), 1).rank, listed.of_site(hello(), 1).alpha) == (2, 4.0)
    assert listed.of_site(hello("farm"), 1) == SPEC
    assert listed.mixed


@pytest.mark.parametrize(("memory_mb", "rank"), [(0, 2), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (99, 8)])
def test_the_largest_rank_that_fits(memory_mb: int, rank: int) -> None:
    """1024 tokens take one megabyte, so a rank r takes r + 1; a site that says nothing is asked for the least."""
    planned = ranked({"kind": "by_memory", "choices": [2, 4, 8]})
    told = memory_mb + 1 if memory_mb else 0

    assert planned.of_site(hello(memory_mb=told), 1).rank == rank


def test_fewer_tokens_at_once_leave_room_for_rank() -> None:
    planned = ranked({"kind": "by_memory", "choices": [2, 4, 8]}, tokens=4096)

    assert planned.of_site(hello(memory_mb=8), 1).rank == 4
    assert planned.of_site(hello(memory_mb=8, micro_batch_tokens=16), 1).rank == 4
    assert planned.of_site(hello(memory_mb=9, micro_batch_tokens=16), 1).rank == 8


def test_a_site_that_carries_nothing_is_told() -> None:
    planned = ranked({"kind": "by_memory", "choices": [2, 4]})

    told = r"inn declares 2 MB, and rank 2 takes about 3 MB at 1024 tokens"
    with pytest.raises(AdapterMismatch, match=told):
        planned.of_site(hello(memory_mb=2), 1)
    assert re.match(told, planned.unfit(hello(memory_mb=2)))
    assert planned.unfit(hello(memory_mb=3)) == ""


def test_one_rank_is_drawn_for_the_cohort_and_all_are_drawn_in_time() -> None:
    drawn = ranked({"kind": "drawn", "choices": [1, 2, 8]})
    found = [drawn.of_round(number).rank for number in range(1, 301)]

    assert all(drawn.of_site(hello(site), n).rank == found[n - 1] for n in (1, 2, 3) for site in ("inn", "farm"))
    assert found == [ranked({"kind": "drawn", "choices": [1, 2, 8]}).of_round(n).rank for n in range(1, 301)]
    counts = Counter(found)
    assert set(counts) == {1, 2, 8}
    assert all(70 <= count <= 130 for count in counts.values()), "each is Bin(300, 1/3): 100 give or take 3.7 sigma"
    assert not drawn.mixed


def test_a_site_may_adapt_some_kinds_of_maps_only() -> None:
    spec = dataclasses.replace(SPEC, shapes={"layers.0.q": (6, 4), "layers.0.v": (6, 4)})
    assert list(ranked({"kind": "same"}, spec=spec).of_site(hello(targets=("v", "up")), 1).shapes) == ["layers.0.v"]
    with pytest.raises(AdapterMismatch, match="no adapted layer from decoder block 0 up among up; nothing is left"):
        ranked({"kind": "same"}, spec=spec).of_site(hello(targets=("up",)), 1)


def test_a_site_may_leave_lower_blocks_alone() -> None:
    assert list(ranked({"kind": "same"}).of_site(hello(first_layer=1), 1).shapes) == ["layers.1.q"]
    with pytest.raises(AdapterMismatch, match="no adapted layer from decoder block 2 up"):
        ranked({"kind": "same"}).of_site(hello(first_layer=2), 1)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "listed", "ranks": {"inn": 9}}, r"server\.ranks\.ranks\.inn = 9 exceeds lora\.rank = 8"),
        ({"kind": "by_memory", "choices": [2, 16]}, r"server\.ranks\.choices = 16 exceeds"),
        ({"kind": "drawn", "choices": [16]}, r"server\.ranks\.choices = 16 exceeds"),
    ],
)
def test_a_rank_above_the_whole_is_refused(section: dict[str, Any], message: str, frozen: FrozenModel) -> None:
    built = TypeAdapter(AnyRanks).validate_python(section)
    with pytest.raises(ConfigInvalid, match=message):
        ranks.build(built, spec=SPEC, seed=0, frozen=frozen, tokens=512)


@pytest.mark.parametrize("choices", [[], [2, 1], [1, 1], [0]])
def test_choices_that_are_none_are_refused(choices: list[int]) -> None:
    with pytest.raises(ConfigInvalid, match="choices"):
        parse(DrawnRank, {"kind": "drawn", "choices": choices}, where="server.ranks")


def test_the_estimate_grows_with_everything_it_should(frozen: FrozenModel, spec: LoraSpec) -> None:
    least = ranks.training_bytes(frozen, lora_cut.narrowed(spec, rank=1), 64)

    assert least > sum(p.numel() * p.element_size() for p in frozen.model.parameters())
    assert ranks.training_bytes(frozen, spec, 64) > least
    assert ranks.training_bytes(frozen, lora_cut.narrowed(spec, rank=1), 512) > least


# --- what a cut is


def test_a_cut_is_the_first_components_in_their_own_scaling(learned: Make) -> None:
    """delta_W of the cut = (alpha / r) * b[:, :2] @ a[:2], with the whole's alpha / r."""
    whole = learned(3)
    piece = lora_cut.cut(whole, lora_cut.narrowed(lora.spec_like(whole), rank=2))

    for name, factors in whole.layers.items():
        expected = (whole.alpha / 4) * factors.b[:, :2].astype(float) @ factors.a[:2].astype(float)
        np.testing.assert_allclose(lora.delta(piece, name), expected, rtol=1e-6)


def test_a_drawn_rank_moves_its_own_components_and_no_other(learned: Make) -> None:
    whole, trained = learned(3), learned(4)
    spec = lora_cut.narrowed(lora.spec_like(whole), rank=1)

    after = Carried(adapter=whole).after(Merged(adapter=lora_cut.cut(trained, spec), used=("inn",)), spec).adapter

    for name, factors in after.layers.items():
        np.testing.assert_array_equal(factors.a[:1], trained.layers[name].a[:1])
        np.testing.assert_array_equal(factors.b[:, :1], trained.layers[name].b[:, :1])
        np.testing.assert_array_equal(factors.a[1:], whole.layers[name].a[1:])
        np.testing.assert_array_equal(factors.b[:, 1:], whole.layers[name].b[:, 1:])
    assert after.alpha == whole.alpha


def test_blocks_are_carried_and_complete_the_model(learned: Make) -> None:
    begun = Carried(adapter=learned(1), blocks=(learned(2),))
    merged = Merged(adapter=learned(3), used=("inn",), start=learned(4), blocks=(learned(5),))

    after = begun.after(merged, lora.spec_like(learned(1)))

    assert [lora.sha256(one) for one in after.blocks] == [lora.sha256(learned(n)) for n in (2, 5)]
    for name in learned(1).layers:
        expected = sum(lora.delta(learned(n), name) for n in (4, 2, 5))
        np.testing.assert_allclose(lora.delta(after.complete(), name), expected, atol=1e-5)


def test_a_layer_that_a_site_left_alone_is_as_it_was_sent(learned: Make) -> None:
    whole = learned(1)
    spec = lora_cut.narrowed(lora.spec_like(whole), rank=2)
    (first, *_) = sorted(whole.layers)
    sent = lora_cut.cut(learned(2), spec)
    sent = dataclasses.replace(sent, layers={first: sent.layers[first]})
    upload = Upload(site="inn", round=1, release=AdapterRelease(adapter=sent), receipts=None, spent=0.0)

    release = carried.whole(upload, whole).release

    assert isinstance(release, AdapterRelease)
    assert sorted(release.adapter.layers) == sorted(whole.layers)
    for name in whole.layers:
        expected = sent if name == first else whole
        np.testing.assert_allclose(lora.delta(release.adapter, name), lora.delta(expected, name), rtol=1e-6)
        assert name != first or not np.allclose(lora.delta(sent, name), lora.delta(whole, name))


# --- what a site takes


def test_a_site_trains_the_whole_or_a_part_and_nothing_else(learned: Make, spec: LoraSpec) -> None:
    whole = learned(1)
    lora_cut.check_start(whole, (learned(2),), spec)
    lora_cut.check_start(lora_cut.cut(whole, lora_cut.narrowed(spec, rank=1)), (), spec)
    (first, *_) = sorted(whole.layers)
    lora_cut.check_start(dataclasses.replace(whole, layers={first: whole.layers[first]}), (), spec)
    wide = lora.stacked([whole, learned(2)])
    for wrong, message in [
        (wide, "alpha"),
        (dataclasses.replace(wide, alpha=spec.alpha), "shape"),
        (dataclasses.replace(whole, alpha=3.0), "alpha"),
        (dataclasses.replace(whole, base="other"), "base"),
        (dataclasses.replace(whole, layers={"x": whole.layers[first]}), "layers"),
    ]:
        with pytest.raises(AdapterMismatch, match=message):
            lora_cut.check_start(wrong, (), spec)
    with pytest.raises(AdapterMismatch, match="a block under the adapter: base"):
        lora_cut.check_start(whole, (dataclasses.replace(learned(2), base="other"),), spec)
