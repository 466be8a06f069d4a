"""Arrays of a message, held to the one header and length that each may have; texts, held to their number and length.

What a message says of an array's type and shape is compared and never used, and no parser of numpy's ever runs on bytes
from outside. With a spec (`LoraSpec`, or `ReleaseSpec` for other kinds) names and shapes are the server's own; without
one, a site reads what its server sends, and takes the shapes of adapter factors when they fit together.

Guarantee: arrays are views of the message's own bytes, so reading takes no memory of the size of the message.
Source: ours; rules T1, T5 and T30 of `reliability-and-security.md` 2.2.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fl_app import lora, parts, transport
from fl_app.errors import WireViolation
from fl_app.types import CodedText, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    import numpy.typing as npt

    from fl_app.lora import LoraSpec
    from fl_app.types import Adapter, Factor, Floats, Precision, ReleaseSpec

MANIFEST_BYTES = 1 << 16
"""The most that a message may hold beside its arrays. An honest manifest takes under 3,000 bytes."""

PER_ARRAY_BYTES = 512
"""What an array may take beside its numbers: its header (128), its name, and what the message says of it."""

TEXT_KEYS = frozenset({"codes", "texts"})
CODE_BYTES = 64
"""What a control code's id may take beside a text, as the size of a message is counted."""


def pack(values: Mapping[str, Floats]) -> ArrayRecord:
    """Return arrays by name, in the order of their names."""
    return ArrayRecord({name: Array(np.ascontiguousarray(values[name], np.float32)) for name in sorted(values)})


def pack_factors(
    adapter: Adapter,
    factors: Iterable[Factor] = parts.FACTORS,
    precision: Precision = "float32",
    start: Adapter | None = None,
) -> ArrayRecord:
    """Return the named factors of an adapter, those that it has, as `<layer>.a` and so on (`fl_app.transport`)."""
    packed: dict[str, Array] = {}
    for factor in factors:
        began = {} if start is None else parts.part(start, factor)
        for key, values in parts.part(adapter, factor).items():
            for suffix, array in transport.encode(values, factor, precision, began.get(key)).items():
                packed[f"{key}.{suffix}" if suffix else key] = Array(array)
    return ArrayRecord({key: packed[key] for key in sorted(packed)})


def unpack_factors(
    record: object, spec: LoraSpec, asked: ReleaseSpec, start: Mapping[str, Floats]
) -> dict[str, Floats]:
    """Return the factors that were asked for, by `<layer>.<factor>`, each of the server's own shape.

    `start` are the factors that the site was sent.

    Raises: WireViolation.
    """
    found = _arrays(record)
    told = {key: shape for key, shape in lora.factor_shapes(spec).items() if _factor(key) in asked.factors}
    names = {name for key in told for name in _pieces(key, asked.precision).values()}
    if odd := sorted(set(found) ^ names):
        raise WireViolation("is missing" if odd[0] in names else "is none of ours", rule="layers", tensor=odd[0])
    return {key: _decoded(key, found, shape, asked.precision, start.get(key)) for key, shape in told.items()}


def unpack_part(record: object, factor: Factor, precision: Precision) -> dict[str, Floats]:
    """Return one factor of every layer as a server sends it, of whatever shapes. Raises: WireViolation."""
    found = _arrays(record)
    own = [key for key in found if _factor(key) == factor and key.rpartition(".")[0]]
    for name in (name for key in own for name in _pieces(key, precision).values()):
        if name not in found:
            raise WireViolation("is missing", rule="layers", tensor=name)
    return {key: _decoded(key, found, _two_axes(key, found[key]), precision) for key in own}


def _pieces(key: str, precision: Precision) -> dict[str, str]:
    """Return the names of the arrays that a factor travels as, by what they are (`transport.encode`)."""
    return {"": key} if precision != "int8" else {"": key, transport.EXPONENT: f"{key}.{transport.EXPONENT}"}


def _decoded(
    key: str, found: ArrayRecord, shape: tuple[int, int], precision: Precision, start: Floats | None = None
) -> Floats:
    """Return a factor of this shape from the arrays it travelled as. Raises: WireViolation."""
    factor, names = cast("Factor", _factor(key)), _pieces(key, precision)
    shapes = transport.shapes(shape, factor, precision)
    numbers = {
        what: _numbers(names[what], found[names[what]], shapes[what], "int8" if what else precision) for what in shapes
    }
    return transport.decode(numbers, factor, start)


def layers_of(values: Mapping[str, Floats]) -> dict[str, LoraFactors]:
    """Return factors by layer. Raises: WireViolation unless every layer has an a and a b that fit together."""
    layers: dict[str, LoraFactors] = {}
    for name in sorted({key.rpartition(".")[0] for key in values}):
        a, b, core = values.get(f"{name}.a"), values.get(f"{name}.b"), values.get(f"{name}.core")
        square = core is None or (a is not None and core.shape == (a.shape[0], a.shape[0]))
        if not name or a is None or b is None or a.shape[0] != b.shape[1] or not square:
            raise WireViolation("factors a and b do not fit together", rule="shape", tensor=name)
        layers[name] = LoraFactors(a=a, b=b, core=core)
    if not layers:
        raise WireViolation("arrays is empty; expected one pair of factors per adapted layer", rule="layers")
    return layers


def some(record: object, factors: Collection[str]) -> ArrayRecord:
    """Return the arrays of these factors alone, not copied."""
    found = _arrays(record)
    if all(_owner(key) in factors for key in found):
        return found
    return ArrayRecord({key: array for key, array in found.items() if _owner(key) in factors})


def strangers(record: object, factors: Collection[str]) -> list[str]:
    """Return the names of arrays that are of none of these factors."""
    return sorted(key for key in _arrays(record) if _owner(key) not in factors)


def _owner(key: str) -> str:
    """Return the factor that an array belongs to: its own numbers, or the exponents of their scales."""
    name, _, factor = key.removesuffix(f".{transport.EXPONENT}").rpartition(".")
    return factor if name else ""


def unpack_layers(record: object, precision: Precision = "float32") -> dict[str, LoraFactors]:
    """Return the factors of an adapter as a server sends it: all of them, of whatever shapes. Raises: WireViolation."""
    found = _arrays(record)
    if odd := strangers(found, parts.FACTORS):
        raise WireViolation("is no LoRA factor; expected <layer>.a and <layer>.b", rule="layers", tensor=odd[0])
    values: dict[str, Floats] = {}
    for factor in parts.FACTORS:
        values |= unpack_part(found, factor, precision)
    return layers_of(values)


def unpack(record: object, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Floats]:
    """Return exactly the arrays of these names and shapes. Raises: WireViolation."""
    found = _arrays(record)
    if odd := sorted(set(found) ^ shapes.keys()):
        raise WireViolation("is missing" if odd[0] in shapes else "is none of ours", rule="layers", tensor=odd[0])
    return {key: _values(key, found[key], shape) for key, shape in shapes.items()}


def unpack_vectors(record: object) -> dict[str, Floats]:
    """Return vectors of whatever names and lengths a server sends. Raises: WireViolation."""
    found = _arrays(record)
    for key, array in found.items():
        if len(array.shape) != 1 or min(array.shape) < 1:
            raise WireViolation(f"is of shape {str(array.shape)[:80]}; expected one axis", rule="shape", tensor=key)
    return unpack(found, {key: tuple(array.shape) for key, array in found.items()})


def pack_bytes(values: Mapping[str, npt.NDArray[np.uint8]]) -> ArrayRecord:
    """Return arrays of single bytes by name."""
    return ArrayRecord({name: Array(np.ascontiguousarray(values[name], np.uint8)) for name in sorted(values)})


def unpack_bytes(record: object, name: str, length: int) -> npt.NDArray[np.uint8]:
    """Return the one array of bytes that a record must hold. Raises: WireViolation."""
    found = _arrays(record)
    if odd := sorted(set(found) ^ {name}):
        raise WireViolation("is missing" if odd[0] == name else "is none of ours", rule="layers", tensor=odd[0])
    return _numbers(name, found[name], (length,), "uint8")


def pack_texts(texts: Iterable[CodedText]) -> ConfigRecord:
    """Return coded texts as two lists of equal length."""
    pairs = list(texts)
    return ConfigRecord({"codes": [one.code for one in pairs], "texts": [one.text for one in pairs]})


def unpack_texts(record: object, asked: ReleaseSpec | None = None) -> tuple[CodedText, ...]:
    """Return coded texts; with `asked` no more and no longer than asked, under its codes. Raises: WireViolation."""
    if not isinstance(record, ConfigRecord) or {str(key) for key in record} != set(TEXT_KEYS):
        raise WireViolation(f"texts hold other keys than {sorted(TEXT_KEYS)}")
    codes, texts = _strings(record["codes"]), _strings(record["texts"])
    if codes is None or texts is None or len(codes) != len(texts):
        raise WireViolation("codes and texts are not two lists of strings of one length")
    if asked is not None:
        if len(texts) > asked.max_texts:
            raise WireViolation(f"{len(texts)} texts, at most {asked.max_texts}", rule="size")
        longest = max((len(text.encode("utf-8", "surrogatepass")) for text in texts), default=0)
        if longest > asked.max_bytes:
            raise WireViolation(f"a text of {longest} bytes, at most {asked.max_bytes}", rule="size")
        if unknown := sorted(set(codes) - asked.codes):
            raise WireViolation(f"code {unknown[0][:40]!r} is none of ours")
    return tuple(CodedText(code=code, text=text) for code, text in zip(codes, texts, strict=True))


def text_bytes(asked: ReleaseSpec) -> int:
    """Return the most that a text release may take beside its manifest, as the size of a message is counted."""
    return asked.max_texts * (asked.max_bytes + CODE_BYTES)


def num_bytes(content: RecordDict) -> int:
    """Return the bytes of a message's arrays as Flower serialises them, and of its texts."""
    texts = content.config_records.get("texts", {})
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    return arrays + sum(_width(value) for value in texts.values())


def check_size(content: RecordDict, spec: LoraSpec | None, asked: ReleaseSpec | None = None) -> None:
    """Raise `WireViolation` when a message is larger than any good one. Bytes are counted, none is looked at.

    With a spec its arrays may take twice what they need: little enough to hold, and enough to say of a longer array
    which rule it breaks. Without one (a site that reads its server) arrays may be of any size.
    """
    count = sum(len(record) for record in content.array_records.values())
    texts = 0 if asked is None else text_bytes(asked)
    if spec is not None and asked is not None:
        needed, count = _expected(spec, asked)
        most = 2 * needed + MANIFEST_BYTES
        sizes = {key: len(one.data) for record in content.array_records.values() for key, one in record.items()}
        if (found := sum(sizes.values())) > most:
            longest = max(sizes, key=lambda key: sizes[key])
            raise WireViolation(f"is the longest of {found} bytes, at most {most}", rule="size", tensor=longest)
    most = MANIFEST_BYTES + PER_ARRAY_BYTES * count + texts
    found = sum(len(str(name)) + _beside(record) for name, record in content.items())
    if found > most:
        raise WireViolation(f"all but the arrays takes {found} bytes, at most {most}", rule="size")


def _expected(spec: LoraSpec, asked: ReleaseSpec) -> tuple[int, int]:
    """Return how many bytes of numbers an upload should hold, and in how many arrays."""
    beside = [*asked.vectors.values(), *asked.survey.values()]
    if asked.kind != "adapter":
        return 4 * sum(beside), len(beside)
    if asked.walk is not None:
        return asked.walk.steps + 4 * sum(beside), 1 + len(beside)
    told = {key: shape for key, shape in lora.factor_shapes(spec).items() if _factor(key) in asked.factors}
    size = sum(transport.num_bytes(told[key], cast("Factor", _factor(key)), asked.precision) for key in told)
    return size + 4 * sum(beside), sum(len(_pieces(key, asked.precision)) for key in told) + len(beside)


def _beside(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    """Return the bytes of a record beside the bytes of its arrays, near enough."""
    if isinstance(record, ArrayRecord):
        told = ((key, array.dtype, array.stype, array.shape) for key, array in record.items())
        return sum(len(key) + len(dtype) + len(stype) + 8 * len(shape) for key, dtype, stype, shape in told)
    return sum(len(key) + _width(value) for key, value in record.items())


def _width(value: object) -> int:
    if isinstance(value, list):
        return sum(_width(one) for one in value)
    return len(value) if isinstance(value, (str, bytes)) else 8


def _strings(value: object) -> list[str] | None:
    """Return a list of strings; None when it is something else."""
    if not isinstance(value, list):
        return None
    found = [one for one in cast("list[object]", value) if isinstance(one, str)]
    return found if len(found) == len(cast("list[object]", value)) else None


def _arrays(record: object) -> ArrayRecord:
    if not isinstance(record, ArrayRecord):
        raise WireViolation("arrays is no ArrayRecord")
    return record


def _factor(key: str) -> str:
    """Return what an array's name says that it is."""
    return key.rpartition(".")[2]


def _two_axes(key: str, array: Array) -> tuple[int, int]:
    if len(array.shape) != 2 or min(array.shape) < 1:  # noqa: PLR2004
        raise WireViolation(f"is of shape {str(array.shape)[:80]}; expected two axes", rule="shape", tensor=key)
    return array.shape[0], array.shape[1]


def _values(key: str, array: Array, shape: tuple[int, ...]) -> Floats:
    """Return a float32 array over the message's own bytes, which must be exactly what we would send for `shape`."""
    return _numbers(key, array, shape, "float32").astype(np.float32, copy=False)


def _numbers(key: str, array: Array, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Return an array of a type over the message's own bytes, which must be exactly what we would send for `shape`."""
    if array.dtype != dtype:
        raise WireViolation(f"is {array.dtype[:20]!r}, not {dtype}", rule="dtype", tensor=key)
    if array.shape != shape:
        told = str(array.shape[:4]) if len(array.shape) <= 4 else f"{len(array.shape)} axes"  # noqa: PLR2004
        raise WireViolation(f"is {told[:80]}, ours is {shape}", rule="shape", tensor=key)
    if array.stype != "numpy.ndarray":
        raise WireViolation(f"is written as {array.stype[:20]!r}, not numpy.ndarray", rule="bytes", tensor=key)
    code = transport.DTYPES[dtype]
    header = _header(shape, code)
    if len(array.data) != len(header) + np.dtype(code).itemsize * math.prod(shape) or not array.data.startswith(header):
        raise WireViolation(
            f"is not what numpy.save writes for {dtype} {shape}: {len(array.data)} bytes", rule="bytes", tensor=key
        )
    return np.frombuffer(array.data, code, offset=len(header)).reshape(shape)


def _header(shape: tuple[int, ...], code: str) -> bytes:
    """Return what `numpy.save` writes before the numbers of an array of this shape and type."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": code, "fortran_order": False, "shape": shape})
    return buffer.getvalue()
