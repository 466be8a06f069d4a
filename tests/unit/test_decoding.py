"""Cached scores are the model's own, no row sees another, buckets do not follow the rows, texts end in time."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import ValidationError

from clients import decoding, token_stream
from clients.decoding import Bucket, DecodingSection, Prompts, Task, sorted_into_buckets, write_texts
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import Workbench
from clients.token_stream import Stream
from fl_app import kernels, lora
from fl_app.errors import PolicyRefusal
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import CodedText, Material

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

CODES = {"cough": "A cough:", "rash": "Of a rash:"}
TEXTS = ["it will not stop", "x", "since Monday, and at night too", "dry", "with a fever of 39"]


@pytest.fixture(scope="module")
def model(frozen: FrozenModel, learned: Callable[[int], Adapter]) -> Any:
    return lora.attach(frozen, learned(3))


def bench(frozen: FrozenModel, **changes: Any) -> Workbench:
    values: dict[str, Any] = {
        "model": frozen,
        "codes": CODES,
        "noise": SimulatedNoise(stream(0, "bench")),
        "system": "",
        "material": Material(),
        "secret": b"salt",
    }
    return Workbench(**{**values, **changes})


def row(text: str, *, code: str = "cough", unit: str = "0", output: str = "") -> PrivateRow:
    return PrivateRow(instruction=text, output=output, code=code, unit=unit)


def prompts(frozen: FrozenModel, texts: Sequence[str], *, max_text: int = 40) -> list[tuple[int, ...]]:
    made = Prompts(tokenizer=frozen.tokenizer, template="{code}{text}\n\n{code}", max_text=max_text)
    return [made.around("A cough:", text) for text in texts]


# --- the forward pass


def whole(model: Any, ids: Sequence[int]) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)])).logits[0, -1].float().numpy()


def collected(stream_: Stream, active: set[int]) -> dict[int, list[np.ndarray]]:
    found: dict[int, list[np.ndarray]] = {}
    for bucket, scores in stream_.scores(active):
        found.setdefault(bucket, []).extend(scores)
    return found


@pytest.mark.parametrize("together", [1, 3, 32])
def test_cached_scores_are_those_of_the_whole_text(model: Any, frozen: FrozenModel, together: int) -> None:
    asked = prompts(frozen, TEXTS)
    owners = [0, 1, 0, 2, 1]
    decoder = Stream(model, asked, owners, width=80, together=together)
    for _ in range(2):  # after a restart everything is as at first
        decoder.restart()
        text: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for step in range(4):
            found = collected(decoder, {0, 1, 2})
            for bucket, rows in found.items():
                mine = [ids for ids, owner in zip(asked, owners, strict=True) if owner == bucket]
                for scores, ids in zip(rows, mine, strict=True):
                    np.testing.assert_allclose(scores, whole(model, [*ids, *text[bucket]]), atol=1e-4)
            drawn = {bucket: 40 + 7 * step + bucket for bucket in text}
            decoder.append(drawn)
            for bucket, token in drawn.items():
                text[bucket].append(token)


def test_the_adapter_and_the_appended_tokens_are_in_the_scores(model: Any, frozen: FrozenModel) -> None:
    """The twin: the tolerance above tells a bare model, and a forgotten token, from what is right."""
    ids = prompts(frozen, TEXTS[:1])[0]
    right = whole(model, [*ids, 40])
    assert np.abs(right - whole(frozen.model, [*ids, 40])).max() > 1e-2
    assert np.abs(right - whole(model, ids)).max() > 1e-2


def test_a_row_has_the_same_scores_in_any_company(model: Any, frozen: FrozenModel) -> None:
    assert token_stream.rows_keep_apart(model, 32)
    asked = prompts(frozen, TEXTS)
    crowd = prompts(frozen, ["".join(string.ascii_letters[n : n + 9]) for n in range(20)])
    alone = Stream(model, asked[:1], [0], width=80, together=32)
    among = Stream(model, [*crowd, asked[0], *asked[1:]], [*[1] * 20, 0, *[2] * 4], width=80, together=32)
    for token in (40, 50, 60):
        (left,), (right,) = collected(alone, {0})[0], collected(among, {0, 1, 2})[0]
        assert left.tobytes() == right.tobytes()
        for decoder in (alone, among):
            decoder.append({0: token, 1: 3, 2: 9})


def test_the_shape_of_a_batch_is_public(model: Any, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Height and width of every batch are constants; where company shows, the height is one."""
    shapes: list[tuple[int, int]] = []
    plain = token_stream._Part.__init__

    def counting(self: Any, *args: Any, height: int, width: int) -> None:
        shapes.append((height, width))
        plain(self, *args, height=height, width=width)

    monkeypatch.setattr(token_stream._Part, "__init__", counting)
    width = len("Of a rash:") * 2 + 2 + 20
    for verdict, expected in ((False, (1, width)), (True, (16, width))):
        monkeypatch.setattr(decoding, "rows_keep_apart", lambda *_, verdict=verdict: verdict)
        for texts in (TEXTS[1:2], TEXTS, TEXTS * 5):
            shapes.clear()
            written(frozen, model, [row(text) for text in texts], lambda: Fixed([50, 51]))
            assert set(shapes) == {expected}


def test_a_finished_bucket_is_not_asked_again(model: Any, frozen: FrozenModel) -> None:
    decoder = Stream(model, prompts(frozen, TEXTS), [0, 0, 1, 1, 1], width=80, together=2)
    assert sorted(collected(decoder, {1})) == [1]
    assert len(collected(decoder, {1})[1]) == 3
    assert collected(decoder, set()) == {}


def test_without_prompts_there_are_no_scores(model: Any) -> None:
    assert collected(Stream(model, [], [], width=5, together=16), {0}) == {}


def test_verdict_on_company_can_be_no(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "keep_rows_apart", lambda *_: False)
    assert not token_stream.rows_keep_apart(model, 16)


def test_the_whole_model_is_tried_as_well(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that adds a trace of the batch to each row is found out."""
    plain = token_stream._Part.forward

    def leaking(self: Any) -> Any:
        scores = plain(self)
        return scores + np.float32(1e-6) * scores.mean()

    monkeypatch.setattr(token_stream._Part, "forward", leaking)
    assert not token_stream.rows_keep_apart(model, 16)


# --- buckets


def members(rows: list[PrivateRow], bench_: Workbench, *, per_code: int = 7, unit: str = "record") -> list[list[str]]:
    found = sorted_into_buckets(PrivateRows(rows), bench_, per_code=per_code, unit=unit)
    return [[held.instruction for held in bucket.rows] for bucket in found]


def changed(before: list[list[str]], after: list[list[str]]) -> int:
    assert len(before) == len(after)
    return sum(sorted(left) != sorted(right) for left, right in zip(before, after, strict=True))


def test_a_record_more_changes_one_bucket(frozen: FrozenModel) -> None:
    """For 1,000 random records, each put in at a random place; counts cross every multiple of any bucket size."""
    rng = stream(0, "records")
    there = bench(frozen)
    rows: list[PrivateRow] = []
    before = members(rows, there)
    for number in range(1000):
        code = ("cough", "rash")[int(rng.integers(2))]
        new = row(f"record {int(rng.integers(10**9))}", code=code, unit=str(number))
        rows.insert(int(rng.integers(len(rows) + 1)), new)
        after = members(rows, there)
        assert changed(before, after) == 1
        before = after
    sizes = [len(bucket) for bucket in before]
    assert min(sizes) > 40  # 71 expected; no bucket starves


def test_buckets_as_many_as_the_rows_need_would_all_change(frozen: FrozenModel) -> None:
    """The twin: ceil(n / s) buckets, as in the paper, where n crosses a multiple of s."""
    rows = [row(f"record {number}") for number in range(41)]
    there = bench(frozen)
    before, after = (members(rows[:n], there, per_code=-(-n // 10)) for n in (40, 41))

    def company(buckets: list[list[str]]) -> dict[str, frozenset[str]]:
        return {one: frozenset(held) - {rows[40].instruction} for held in buckets for one in held}

    old, new = company(before), company(after)
    assert sum(old[one] != new[one] for one in old) > 30  # nearly all of the 40 write with others than before


def test_all_buckets_are_there_codes_in_order(frozen: FrozenModel) -> None:
    found = sorted_into_buckets(PrivateRows([]), bench(frozen), per_code=2, unit="record")
    assert [(bucket.code, bucket.number, bucket.rows) for bucket in found] == [
        ("cough", 0, ()),
        ("cough", 1, ()),
        ("rash", 0, ()),
        ("rash", 1, ()),
    ]


def test_the_secret_moves_records_and_the_line_number_does_not(frozen: FrozenModel) -> None:
    rows = [row(f"record {n}", unit=str(n)) for n in range(50)]
    renumbered = [row(f"record {n}", unit=str(n + 1)) for n in range(50)]
    assert members(rows, bench(frozen)) == members(renumbered, bench(frozen))
    assert members(rows, bench(frozen)) != members(rows, bench(frozen, secret=b"other"))
    assert members([row("a", output="b")], bench(frozen)) in (
        members([row("a", output=other)], bench(frozen)) for other in "cdefgh"
    )  # the answer is part of the record: some other answer lies elsewhere
    assert len({str(members([row("a", output=other)], bench(frozen))) for other in "cdefgh"}) > 1


def test_rows_of_a_unit_and_a_code_lie_together(frozen: FrozenModel) -> None:
    rows = [row(f"{unit}/{n}", unit=f"patient {unit}") for unit in range(30) for n in range(3)]
    for held in members(rows, bench(frozen), unit="patient"):
        units = [text.split("/")[0] for text in held]
        assert all(units.count(unit) == 3 for unit in units)
    spread = members(rows, bench(frozen), unit="record")  # the twin: as records they lie apart
    assert any(held and held[0].split("/")[0] not in [t.split("/")[0] for t in held[1:]] for held in spread)


def test_rows_of_unknown_codes_lie_nowhere_and_no_codes_are_refused(frozen: FrozenModel) -> None:
    assert not any(members([row("a", code="gout")], bench(frozen)))
    with pytest.raises(PolicyRefusal):
        members([row("a")], bench(frozen, codes={}))


def test_buckets_do_not_print_their_rows() -> None:
    assert "whisper" not in repr(Bucket(code="cough", number=0, rows=(row("whisper"),)))


# --- prompts


def test_a_prompt_is_the_template_around_the_text(frozen: FrozenModel) -> None:
    made = Prompts(tokenizer=frozen.tokenizer, template="<{code}> {text} | {code}", max_text=8)
    assert frozen.tokenizer.decode(made.around("A:", "four")) == "<A:> four | A:"
    assert frozen.tokenizer.decode(made.around("A:", "more than eight")) == "<A:> more tha | A:"
    assert frozen.tokenizer.decode(made.around("A:", "{code}")) == "<A:> {code} | A:"  # a row is no template
    assert made.stop("A:") == " | A:"
    assert made.width(["A:", "long:"]) == len("<long:>  | long:") + 8
    assert len(made.around("long:", "x" * 99)) == made.width(["A:", "long:"])


def test_a_prompt_has_two_tokens_at_least(frozen: FrozenModel) -> None:
    made = Prompts(tokenizer=frozen.tokenizer, template="{text}", max_text=8)
    start = frozen.tokenizer.bos_token_id
    assert made.around("A:", "")[:2] == (start, start)
    assert made.around("A:", "q")[0] == start
    assert len(made.around("A:", "q")) == 2


@pytest.mark.parametrize("template", ["{code}", "{text}{text}", ""])
def test_a_template_without_one_text_is_refused(template: str) -> None:
    with pytest.raises(ValidationError, match="exactly once"):
        DecodingSection(buckets_per_code=1, expected_units=1.0, template=template)


# --- writing


class Fixed:
    """A pen that writes given tokens, and notes what it is told."""

    def __init__(self, tokens: Sequence[int], budget: int = 10**6) -> None:
        self.tokens, self.budget, self.drawn = list(tokens), budget, 0
        self.told: list[np.ndarray | None] = []
        self.rows: list[int] = []

    @property
    def spent(self) -> bool:
        return self.drawn >= self.budget

    def begin(self, public_V: np.ndarray | None) -> None:
        self.told.append(public_V)
        self.rows.append(0)

    def add(self, scores_RV: np.ndarray) -> None:
        self.rows[-1] += len(scores_RV)

    def draw(self, noise: Any) -> int:
        self.drawn += 1
        return self.tokens[(self.drawn - 1) % len(self.tokens)]


def written(
    frozen: FrozenModel,
    model: Any,
    rows: list[PrivateRow],
    make: Callable[[], Any],
    *,
    pens: list[Any] | None = None,
    **changes: Any,
) -> tuple[CodedText, ...]:
    there = bench(frozen, **changes.pop("bench", {}))
    buckets = sorted_into_buckets(PrivateRows(rows), there, per_code=1, unit="record")
    pens = [] if pens is None else pens
    pens.extend(make() for _ in buckets)
    values: dict[str, Any] = {
        "prompts": Prompts(tokenizer=frozen.tokenizer, template="{code}{text}\n\n{code}", max_text=20),
        "max_new_tokens": 6,
        "examples": 1,
        "batch_rows": 16,
        "max_bytes": 99,
        "asks_public": False,
    }
    return write_texts(model, buckets, pens, Task(**{**values, **changes}), there, "...")


def tokens(frozen: FrozenModel, text: str) -> list[int]:
    return frozen.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_text_ends_with_the_end_token(model: Any, frozen: FrozenModel) -> None:
    pens: list[Fixed] = []
    wanted = [*tokens(frozen, "yes"), frozen.tokenizer.eos_token_id]
    found = written(frozen, model, [row("a")], lambda: Fixed(wanted), pens=pens, examples=2)
    assert found == tuple(CodedText(code=code, text="yes") for code in ("cough", "cough", "rash", "rash"))
    assert [pen.drawn for pen in pens] == [8, 8]


def test_a_text_ends_where_the_next_would_begin(model: Any, frozen: FrozenModel) -> None:
    pens: list[Fixed] = []
    wanted = tokens(frozen, "no\n\nA cough: what?")
    found = written(frozen, model, [row("a")], lambda: Fixed(wanted), pens=pens, max_new_tokens=17)
    assert [text.text for text in found] == ["no", "no\n\nA cough: what"]  # the second bucket's code is another
    assert [pen.drawn for pen in pens] == [len("no\n\nA cough:"), 17]


def test_a_text_ends_at_the_limit_or_with_the_budget(model: Any, frozen: FrozenModel) -> None:
    pens: list[Fixed] = []
    found = written(frozen, model, [row("a")], lambda: Fixed(tokens(frozen, "abcdefgh"), 9), pens=pens, examples=5)
    assert [text.text for text in found[:2]] == ["abcdef", "gha"]  # nine tokens: six, and three
    assert len(found) == 4
    assert [pen.drawn for pen in pens] == [9, 9]


def test_a_text_is_cut_before_the_character_that_would_not_fit(model: Any, frozen: FrozenModel) -> None:
    wanted = tokens(frozen, " aä ö")  # bytes: blank, a, two of ä, blank, two of ö
    for most, expected in ((9, "aä ö"), (5, "aä"), (4, "aä"), (3, "aä"), (2, "a")):
        found = written(frozen, model, [row("a")], lambda: Fixed(wanted), max_new_tokens=7, max_bytes=most)
        assert [text.text for text in found] == [expected] * 2


def test_empty_texts_are_dropped(model: Any, frozen: FrozenModel) -> None:
    assert written(frozen, model, [row("a")], lambda: Fixed([frozen.tokenizer.eos_token_id])) == ()


@pytest.mark.parametrize("batch_rows", [1, 2, 16, 64])
def test_every_row_is_heard_once_per_token(model: Any, frozen: FrozenModel, batch_rows: int) -> None:
    pens: list[Fixed] = []
    rows = [row(text, code=("cough", "rash")[n % 2]) for n, text in enumerate(TEXTS)]
    written(frozen, model, rows, lambda: Fixed([50]), pens=pens, batch_rows=batch_rows, examples=2)
    assert [pen.rows for pen in pens] == [[3] * 12, [2] * 12]
    assert pens[0].told == [None] * 12


def test_the_public_prompt_holds_the_placeholder_or_what_the_server_sent(model: Any, frozen: FrozenModel) -> None:
    shot = CodedText(code="rash", text="on the left arm")
    pens: list[Fixed] = []
    rows = [row("a"), row("b", code="rash")]
    written(
        frozen,
        model,
        rows,
        lambda: Fixed(tokens(frozen, "hm")),
        pens=pens,
        asks_public=True,
        max_new_tokens=2,
        bench={"material": Material(texts=(shot, CodedText(code="gout", text="toe")))},
    )
    made = Prompts(tokenizer=frozen.tokenizer, template="{code}{text}\n\n{code}", max_text=20)
    for pen, code, text in zip(pens, CODES.values(), ("...", "on the left arm"), strict=True):
        ids = [*made.around(code, text)]
        for step, scores in enumerate(pen.told):
            np.testing.assert_allclose(scores, whole(model, [*ids, *tokens(frozen, "hm")[:step]]), atol=1e-4)
