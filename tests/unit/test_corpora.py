"""Every format and shape gives the same rows; every malformed one is refused by file and line, without its text."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import pytest

from fl_app.errors import ConfigInvalid, RowsInvalid
from simulations.corpora import CorpusRow, read_corpus

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "zebrafish remission"
PAIRS = (("What is it, doctor?", 'A "cold",\nno more.'), ("Grüß dich\u2028wie geht's", ""), ("Third", "Third answer"))
EXPECTED = [
    CorpusRow(id=f"r{n}", instruction=ask, output=answer, code="", columns={"house": house, "size": str(n)})
    for n, ((ask, answer), house) in enumerate(zip(PAIRS, ("north", "south", "north"), strict=True))
]


def _columns(number: int) -> dict[str, Any]:
    return {"id": f"r{number}", "house": ("north", "south", "north")[number], "size": number}


def _alpaca(number: int) -> dict[str, Any]:
    return {"instruction": PAIRS[number][0], "input": "", "output": PAIRS[number][1], **_columns(number)}


def _completion(number: int) -> dict[str, Any]:
    return {"prompt": PAIRS[number][0], "completion": PAIRS[number][1], **_columns(number)}


def _messages(number: int) -> dict[str, Any]:
    ask, answer = PAIRS[number]
    roles = (("system", "Be kind."), ("user", ask), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in roles], **_columns(number)}


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = {key: None for row in rows for key in row}
    pq.write_table(pa.Table.from_pylist([{**keys, **row} for row in rows]), path)


@pytest.mark.parametrize("shape", [_alpaca, _completion, _messages])
@pytest.mark.parametrize(
    ("ending", "write"), [("jsonl", _write_jsonl), ("csv", _write_csv), ("parquet", _write_parquet)]
)
def test_every_format_and_shape_gives_the_same_rows(tmp_path: Path, shape: Any, ending: str, write: Any) -> None:
    path = tmp_path / f"corpus.{ending}"
    write(path, [shape(number) for number in range(3)])
    assert read_corpus(str(path)) == EXPECTED


def test_shapes_may_mix_within_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mixed.parquet"
    _write_parquet(path, [_alpaca(0), _completion(1), _messages(2)])
    assert read_corpus(str(path)) == EXPECTED


def test_input_is_appended_or_taken_alone(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    with_input = {"instruction": "Sum up.", "input": "Long text", "output": "Short"}
    _write_jsonl(path, [with_input, {**with_input, "input": " "}, {**with_input, "input": None}])
    assert [row.instruction for row in read_corpus(str(path))] == ["Sum up.\nLong text", "Sum up.", "Sum up."]
    alone = read_corpus(str(path), join_input="input_only")
    assert [row.instruction for row in alone] == ["Long text", "Sum up.", "Sum up."]


def test_first_question_and_last_answer_of_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    turns = [("system", "s"), ("user", "one"), ("user", "two"), ("assistant", "a"), ("user", "x"), ("assistant", "b")]
    _write_jsonl(path, [{"messages": [{"role": role, "content": text} for role, text in turns]}])
    assert [(row.instruction, row.output) for row in read_corpus(str(path))] == [("one\ntwo", "b")]


def test_ids_codes_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    row = {"instruction": "a", "output": "b"}
    extra = {"id": 7, "code": "cough", "topic": "lung", "flag": True, "ratio": 0.5, "none": None, "meta": {"x": 1}}
    _write_jsonl(path, [{**row, **extra}, {**row, "topic": "skin"}])
    first, second = read_corpus(str(path))
    assert (first.id, first.code, second.id, second.code) == ("7", "cough", "row-2", "")
    assert first.columns == {"code": "cough", "topic": "lung", "flag": "true", "ratio": "0.5"}
    assert [row.code for row in read_corpus(str(path), code_column="topic")] == ["lung", "skin"]
    with pytest.raises(RowsInvalid, match=r"line 2.*'flag'.*found topic"):
        read_corpus(str(path), code_column="flag")


def test_rows_hide_their_text_and_can_be_hashed() -> None:
    row = CorpusRow(id="1", instruction=SECRET, output=SECRET, columns={"house": SECRET})
    assert SECRET not in repr(row)
    assert len({row, row}) == 1


GOOD = json.dumps({"id": "g", "instruction": "Hello", "output": "Hi"}) + "\n"
MALFORMED = {
    "broken json": ('{"instruction": "' + SECRET, "not JSON"),
    "not an object": (json.dumps([SECRET]), "not an object"),
    "deep nesting": ("[" * 100_000, "not JSON"),
    "no shape": (json.dumps({"question": SECRET, "answer": SECRET}), "found answer, question"),
    "text as a key": (json.dumps({SECRET: "x", "house": "y"}), "found house, and 1 that are no column names"),
    "missing output": (json.dumps({"instruction": SECRET}), "found instruction"),
    "null output": (json.dumps({"instruction": SECRET, "output": None}), "found instruction, output"),
    "empty instruction": (json.dumps({"instruction": "  ", "output": SECRET}), "instruction is empty"),
    "number": (json.dumps({"instruction": SECRET, "output": 3}), "output is int, not text"),
    "number as input": (json.dumps({"instruction": SECRET, "output": "", "input": 3}), "input is int"),
    "list as prompt": (json.dumps({"prompt": [SECRET], "completion": ""}), "prompt is list"),
    "two shapes": (json.dumps({"instruction": SECRET, "output": "", "prompt": "", "messages": []}), "more than one"),
    "bad id": (json.dumps({"id": 1.5, "instruction": SECRET, "output": ""}), "id is float"),
    "bool id": (json.dumps({"id": True, "instruction": SECRET, "output": ""}), "id is bool"),
    "same id": (json.dumps({"id": "g", "instruction": SECRET, "output": ""}), "line 1; ids must be unique"),
    "half a pair": ('{"instruction": "' + SECRET + '\\ud800", "output": ""}', "surrogate"),
    "messages text": (json.dumps({"messages": SECRET}), "not JSON"),
    "messages number": (json.dumps({"messages": 3}), "messages is int"),
    "unknown role": (json.dumps({"messages": [{"role": SECRET, "content": SECRET}]}), "message 1 has no role"),
    "no role": (json.dumps({"messages": [SECRET]}), "message 1 has no role"),
    "role is a list": (json.dumps({"messages": [{"role": [SECRET]}]}), "message 1 has no role"),
    "content": (json.dumps({"messages": [{"role": "user", "content": [SECRET]}]}), "message 1 is not text"),
    "no answer": (json.dumps({"messages": [{"role": "user", "content": SECRET}]}), "no user message with"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_line_is_refused_by_file_and_line(tmp_path: Path, case: str) -> None:
    line, expected = MALFORMED[case]
    path = tmp_path / "corpus.jsonl"
    path.write_text(GOOD + line + "\n", encoding="utf-8")
    _assert_refused(path, "line 2", expected)


def test_latin_1_is_refused_by_line(tmp_path: Path) -> None:
    for name in ("corpus.jsonl", "corpus.csv"):
        path = tmp_path / name
        path.write_bytes(b"first\n".replace(b"first", GOOD.strip().encode()) + f"{SECRET} \xe9\n".encode("latin-1"))
        _assert_refused(path, "line 2", "not UTF-8")


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        (f'instruction,output\n"two\nlines",ok\n{SECRET}\n', "line 4", "1 cells, but the header has 2"),
        (f"{SECRET},a b\nx,y\n", "line 2", "found and 2 that are no column names"),
        (f'instruction,output\n"{SECRET}" x,ok\n', "line 2", "not CSV"),
        (f'instruction,output\n\nx,"{SECRET}', "line 3", "not CSV"),
        ("output,output\na,b\n", "line 1", "twice"),
    ],
)
def test_malformed_csv_is_refused_by_file_and_line(tmp_path: Path, text: str, line: str, expected: str) -> None:
    path = tmp_path / "corpus.csv"
    path.write_text(text, encoding="utf-8")
    _assert_refused(path, line, expected)


def test_malformed_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    path.write_bytes(SECRET.encode() * 10)
    _assert_refused(path, "corpus.parquet", "not a readable Parquet")
    _write_parquet(path, [{"instruction": "a", "output": "b"}, {"instruction": SECRET}])
    _assert_refused(path, "row 2", "found instruction, output")


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.csv", "header.csv"])
def test_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("instruction,output\n" if name == "header.csv" else "", encoding="utf-8")
    _assert_refused(path, name, "holds no rows")


def test_what_cannot_be_found_says_so(tmp_path: Path) -> None:
    (tmp_path / "corpus.xlsx").write_text("x")
    with pytest.raises(ConfigInvalid, match=r"known endings: \.jsonl"):
        read_corpus(str(tmp_path / "corpus.xlsx"))
    with pytest.raises(ConfigInvalid, match="known endings"):
        read_corpus(str(tmp_path))
    with pytest.raises(ConfigInvalid, match="no file at"):
        read_corpus(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ConfigInvalid, match=r"no file at absent\.csv"):
        read_corpus("absent.csv")


def test_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigInvalid, match=r"no file at nobody/nothing.*give a path"):
        read_corpus("nobody/nothing")


def test_hub_data_set_is_read_from_its_train_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [_alpaca(0), _completion(1), _messages(2)]
    monkeypatch.setattr(datasets, "load_dataset", lambda _: {"test": [], "train": rows})
    assert read_corpus("owner/name") == EXPECTED
    monkeypatch.setattr(datasets, "load_dataset", lambda _: {"a": rows, "b": rows})
    with pytest.raises(ConfigInvalid, match="no split 'train' but a, b"):
        read_corpus("owner/name")


def _assert_refused(path: Path, place: str, expected: str) -> None:
    with pytest.raises(RowsInvalid) as caught:
        read_corpus(str(path))
    message = str(caught.value)
    assert str(path) in message
    assert place in message
    assert expected in message
    assert SECRET not in message
    assert not any(word in message for word in SECRET.split())
