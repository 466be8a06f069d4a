"""How factors travel: errors within what is stated, rounding twice is rounding once, and nothing else is touched."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fl_app import lora, transport
from fl_app.errors import NotFinite
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from fl_app.types import Factor, Floats, Precision

FINITE = st.floats(-(2.0**15), 2.0**15, width=32)
FACTORS: tuple[Factor, ...] = ("a", "b", "core")
every_factor = pytest.mark.parametrize("factor", FACTORS)


def there_and_back(values: Floats, factor: Factor, precision: Precision) -> Floats:
    return transport.decode(transport.encode(values, factor, precision), factor)


def adapter(seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Floats:
        return rng.normal(size=shape).astype(np.float32)

    return Adapter(layers={"q": LoraFactors(a=draw(2, 5), b=draw(3, 2), core=draw(2, 2))}, alpha=4.0, base="base")


@every_factor
@settings(max_examples=60, deadline=None)
@given(values=hnp.arrays(np.float32, (4, 4), elements=FINITE))
def test_int8_is_off_by_no_more_than_a_126th_of_its_components_largest(factor: Any, values: Floats) -> None:
    """A component is a row of a and of a core, a column of b."""
    axis = 0 if factor == "b" else 1
    largest = np.abs(values).max(axis=axis, keepdims=True)

    off = np.abs(there_and_back(values, factor, "int8").astype(float) - values)

    assert (off <= largest / 126 + 127 * 2.0**-126).all()


def test_a_scale_for_all_would_break_that_bound() -> None:
    """The twin: one component of 1000 beside one of 1 leaves nothing of the small one."""
    values = np.array([[1000.0, 900.0], [1.0, -0.7]], np.float32)
    together = there_and_back(values.reshape(1, 4), "a", "int8").reshape(2, 2)

    assert np.abs(together[1] - values[1]).max() > 1 / 126
    assert np.abs(there_and_back(values, "a", "int8")[1] - values[1]).max() <= 1 / 126


@settings(max_examples=60, deadline=None)
@given(values=hnp.arrays(np.float32, (3, 5), elements=FINITE))
def test_float16_keeps_eleven_bits(values: Floats) -> None:
    off = np.abs(there_and_back(values, "a", "float16").astype(float) - values)

    assert (off <= np.maximum(np.abs(values) * 2.0**-11, 2.0**-25)).all()


@every_factor
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@settings(max_examples=40, deadline=None)
@given(values=hnp.arrays(np.float32, (3, 3), elements=FINITE))
def test_rounded_twice_is_rounded_once(factor: Any, precision: Any, values: Floats) -> None:
    once = there_and_back(values, factor, precision)

    np.testing.assert_array_equal(once, there_and_back(once, factor, precision))


def test_int8_by_hand() -> None:
    """126 and 100 at a scale of 1 are themselves; 128 and -3 take a scale of 2: 64 and -1.5, to even -2."""
    values = np.array([[126.0, 100.4], [128.0, -3.0]], np.float32)

    found = transport.encode(values, "a", "int8")

    assert found[""].tolist() == [[126, 100], [64, -2]]
    assert found[transport.EXPONENT].tolist() == [0, 1]
    assert transport.decode(found, "a").tolist() == [[126.0, 100.0], [128.0, -4.0]]


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_what_it_cannot_hold_is_refused(precision: Any) -> None:
    with pytest.raises(NotFinite, match="NaN or infinity"):
        transport.encode(np.array([[np.nan]], np.float32), "a", precision)
    if precision == "float16":
        with pytest.raises(NotFinite, match="above 65504"):
            transport.encode(np.array([[7e4]], np.float32), "a", precision)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_only_what_travels_is_rounded(precision: Any) -> None:
    whole = adapter()

    part = transport.rounded(whole, ("b",), precision)

    assert part.layers["q"].a is whole.layers["q"].a
    assert part.layers["q"].core is whole.layers["q"].core
    assert (part.layers["q"].b != whole.layers["q"].b).any()
    assert lora.sha256(transport.rounded(part, ("b",), precision)) == lora.sha256(part)


def test_float32_is_the_adapter_itself() -> None:
    whole = adapter()
    assert transport.rounded(whole, FACTORS, "float32") is whole


@pytest.mark.parametrize(("precision", "size"), [("float32", 4 * 6), ("float16", 2 * 6), ("int8", 6 + 2)])
@every_factor
def test_bytes_are_those_of_the_arrays(factor: Any, precision: Any, size: int) -> None:
    shape = (3, 2) if factor == "b" else (2, 3)
    arrays = transport.encode(np.ones(shape, np.float32), factor, precision)

    assert sum(one.nbytes for one in arrays.values()) == size == transport.num_bytes(shape, factor, precision)
    assert {name: one.shape for name, one in arrays.items()} == transport.shapes(shape, factor, precision)


def test_a_plain_adapter_stays_plain() -> None:
    plain = dataclasses.replace(adapter(), layers={"q": dataclasses.replace(adapter().layers["q"], core=None)})
    assert transport.rounded(plain, FACTORS, "int8").layers["q"].core is None


# --- updates


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_the_error_is_a_share_of_what_was_learned(precision: Any) -> None:
    """A factor of size 1 that moved by 1e-3: as it is, int8 would be off by up to 8e-3, and lose the update."""
    start, rng = adapter(), np.random.default_rng(1)
    update = rng.normal(0, 1e-3, start.layers["q"].b.shape).astype(np.float32)
    moved = dataclasses.replace(
        start, layers={"q": dataclasses.replace(start.layers["q"], b=start.layers["q"].b + update)}
    )

    sent = transport.rounded(moved, ("b",), precision, start)
    whole = transport.rounded(moved, ("b",), precision)

    off = np.abs(sent.layers["q"].b - moved.layers["q"].b)
    assert (off <= np.abs(update).max(axis=0) / 126 + 1e-7).all()
    assert np.abs(whole.layers["q"].b - moved.layers["q"].b).max() > off.max()
    assert lora.sha256(transport.rounded(sent, ("b",), precision, start)) == lora.sha256(sent)


@pytest.mark.parametrize("precision", ["float16", "int8"])
@settings(max_examples=60, deadline=None)
@given(
    start=hnp.arrays(np.float32, (3, 4), elements=st.floats(-8, 8, width=32)),
    update=hnp.arrays(np.float32, (3, 4), elements=st.floats(-1, 1, width=32)),
    power=st.integers(-30, 0),
)
def test_an_update_of_any_size_settles(precision: Any, start: Floats, update: Floats, power: int) -> None:
    """Also one of the size of float32's own steps, where adding it to the factor rounds once more."""
    one = Adapter(layers={"q": LoraFactors(a=start, b=np.zeros((2, 3), np.float32))}, alpha=4.0, base="base")
    moved = np.asarray(start + np.ldexp(update, power), np.float32)
    trained = dataclasses.replace(one, layers={"q": dataclasses.replace(one.layers["q"], a=moved)})

    sent = transport.rounded(trained, ("a",), precision, one)

    assert lora.sha256(transport.rounded(sent, ("a",), precision, one)) == lora.sha256(sent)
    off = np.abs(sent.layers["q"].a.astype(float) - moved)
    assert (off <= np.abs(moved - start).max(axis=1, keepdims=True) / 60 + 1e-6).all()
