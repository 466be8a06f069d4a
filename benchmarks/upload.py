"""What it costs the server to read and judge one upload of about 10 MB: time and memory, by the functions of a round.

    python benchmarks/upload.py            print one JSON line
    python benchmarks/upload.py --record   and append it to results.jsonl

`wire_ms` and `rules_ms` are medians of the processor's time, on one thread. The second holds what does not grow with
the upload too, the accounting of its receipt: `receipt_ms` when its loss is known from an earlier upload,
`first_receipt_ms` when it is not. `memory` is what Python and numpy hold at the highest point, in payloads, the message
itself included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import record

from fl_app import lora_start, wire, wire_arrays
from fl_app.lora import LoraSpec
from fl_app.privacy.accountants import pld
from fl_app.types import Adapter, AdapterRelease, Broadcast, DpReceipt, Hello, LoraFactors, PoissonGaussian, Upload
from strategies.reach import read_cap
from strategies.validate import broken_rule

if TYPE_CHECKING:
    from collections.abc import Callable

REPEATS = 15
STEPS, DELTA = 60, 1e-5
RECEIPT = DpReceipt(
    event=PoissonGaussian(noise_multiplier=1.1, sample_rate=0.05, steps=STEPS, clip_norm=1.0), unit="record"
)


def _shape() -> LoraSpec:
    """Return LoRA of rank 16 on four maps of 30 blocks with 576 features, like SmolLM2's: 10.4 MB in float32."""
    maps = {"q_proj": (576, 576), "v_proj": (576, 192), "up_proj": (576, 1536), "o_proj": (576, 576)}
    shapes = {f"model.layers.{n}.self_attn.{name}": shape for n in range(30) for name, shape in maps.items()}
    return LoraSpec(shapes=shapes, rank=16, alpha=32.0, base="a" * 64)


def _learned(start: Adapter) -> Adapter:
    rng = np.random.default_rng(1)
    layers = {
        name: LoraFactors(
            a=(one.a + rng.normal(0, 1e-3, one.a.shape)).astype(np.float32),
            b=(one.b + rng.normal(0, 1e-3, one.b.shape)).astype(np.float32),
        )
        for name, one in start.layers.items()
    }
    return Adapter(layers=layers, alpha=start.alpha, base=start.base)


def _timed(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return 1000 * (time.process_time() - began)


def measure() -> dict[str, Any]:
    """Return the figures of one machine."""
    spec = _shape()
    cap = read_cap({"kind": "dp_lora", "steps": STEPS}).of_round(1)
    asked = Broadcast(
        run="run", round=1, adapter=lora_start.initial(spec, np.random.default_rng(0)), config_digest="d" * 64
    )
    site = Hello(site="mill", epsilon=8.0, delta=DELTA, unit="record", spent=0.0)
    first_receipt = _timed(lambda: pld.epsilon([RECEIPT], DELTA))
    sent = Upload(
        site="mill",
        run=asked.named,
        round=1,
        release=AdapterRelease(adapter=_learned(asked.adapter)),
        receipts=(RECEIPT,),
        spent=pld.epsilon([RECEIPT], DELTA),
    )
    content = wire.pack_reply(sent)
    del sent
    payload = wire_arrays.num_bytes(content)

    def read() -> Any:
        return wire.unpack_reply(content, spec)

    def judge(upload: Any) -> None:
        assert broken_rule(upload, broadcast=asked, spec=spec, site=site, cap=cap) is None

    judge(read())
    reading = [_timed(read) for _ in range(REPEATS)]
    upload = read()
    rules = [_timed(lambda: judge(upload)) for _ in range(REPEATS)]
    receipt = [_timed(lambda: pld.epsilon([RECEIPT], DELTA)) for _ in range(REPEATS)]
    return {
        "kind": "upload",
        "payload_mb": round(payload / 1e6, 2),
        "wire_ms": round(statistics.median(reading), 1),
        "rules_ms": round(statistics.median(rules), 1),
        "receipt_ms": round(statistics.median(receipt), 1),
        "first_receipt_ms": round(first_receipt, 1),
        "ms_per_10_mb": round((statistics.median(reading) + statistics.median(rules)) * 1e7 / payload, 1),
        "memory": round(1 + _peak(lambda: judge(read())) / payload, 2),
    }


def _peak(work: Callable[[], Any]) -> int:
    """Return how many bytes more than before Python and numpy hold at the highest point of this work."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    work()
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return highest - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the line to results.jsonl")
    found = measure()
    print(json.dumps(record.append(found) if parser.parse_args().record else found, sort_keys=True))
