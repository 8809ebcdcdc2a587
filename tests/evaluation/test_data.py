"""Rows of benchmarks: which file they come from, and what is said of a wrong one."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from commvq_core.errors import InputError
from commvq_core.evaluation.data import Fields, HubFile, find_file, load_rows, read_rows

HUB = HubFile("someone/benchmark", "data.zip", "data/part.jsonl")
GOOD = {"question": "Why?", "answers": ["a", "b"], "length": 3, "more": 1}
FIELDS: Fields = {"question": str, "answers": list[str], "length": int}


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_hold_the_fields_and_no_more(tmp_path: Path) -> None:
    path = write(tmp_path / "part.jsonl", GOOD, GOOD | {"question": "\N{SNOWMAN}"})
    rows = read_rows(path, FIELDS)
    assert rows[0] == {"question": "Why?", "answers": ["a", "b"], "length": 3}
    assert rows[1]["question"] == "\N{SNOWMAN}"
    assert len(read_rows(path, FIELDS, limit=1)) == 1


WRONG: dict[str, tuple[Any, str]] = {
    "missing": ({"question": "Why?", "length": 3}, "'answers' is missing (fields: question, "),
    "text for a list": (GOOD | {"answers": "a"}, "'answers' holds text, not a list of text"),
    "numbers in a list": (GOOD | {"answers": ["a", 1]}, "a list of text and a whole number, not"),
    "null": (GOOD | {"question": None}, "'question' holds null, not text"),
    "true for a number": (GOOD | {"length": True}, "'length' holds true or false, not a whole"),
    "a fraction": (GOOD | {"length": 1.5}, "'length' holds a number, not a whole number"),
    "half a character": (GOOD | {"question": "\ud800"}, "text with broken characters"),
    "no object": ([1], "is not a JSON object"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_named_by_file_line_and_field(case: str, tmp_path: Path) -> None:
    row, words = WRONG[case]
    path = tmp_path / "part.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(row)}\n")
    with pytest.raises(InputError) as refused:
        read_rows(path, FIELDS)
    assert str(refused.value).startswith(f"{path}:3")
    assert words in str(refused.value)


def test_a_field_may_be_one_of_several_kinds(tmp_path: Path) -> None:
    path = write(tmp_path / "part.jsonl", {"a": None, "b": 2}, {"a": ["x"], "b": 2.5})
    fields: Fields = {"a": list[str] | None, "b": int | float}
    assert [row["b"] for row in read_rows(path, fields)] == [2, 2.5]
    with pytest.raises(InputError, match="not text or null"):
        read_rows(path, {"a": str | None})
    assert read_rows(path, {"a": object})[1] == {"a": ["x"]}


def test_lines_that_are_no_json_and_empty_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    for content, words in (
        (b'{"question": \n', "part.jsonl:1 is not JSON"),
        (b"\xff\n", "part.jsonl:1 is not UTF-8"),
        (b"\n", "has no rows"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_rows(path, FIELDS)
    with pytest.raises(InputError, match="can't be read"):
        read_rows(tmp_path / "gone.jsonl", FIELDS)


def test_parquet_files_are_checked_as_well(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    table = pyarrow.table({"question": ["Why?", None], "more": [1, 2]})
    pyarrow.parquet.write_table(table, path)
    assert read_rows(path, {"question": str}, limit=1) == [{"question": "Why?"}]
    with pytest.raises(InputError, match=r"part.parquet, row 2: field 'question' holds null"):
        read_rows(path, {"question": str})
    with pytest.raises(InputError, match="'answer' is missing"):
        read_rows(path, {"answer": str})
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(InputError, match=r"not a readable \.parquet"):
        read_rows(path, {"question": str})


def test_the_official_places_in_a_folder_are_tried_in_order(tmp_path: Path) -> None:
    later = write(tmp_path / "part.jsonl", GOOD)
    names = ("data/part.jsonl", "part.jsonl")
    assert find_file(tmp_path, names) == later
    first = write(tmp_path / "data" / "part.jsonl", GOOD, GOOD)
    assert find_file(tmp_path, names) == first
    with pytest.raises(InputError, match=r"has no data/other.jsonl or other.jsonl: put"):
        find_file(tmp_path, ("data/other.jsonl", "other.jsonl"))
    with pytest.raises(InputError, match="is no folder"):
        find_file(tmp_path / "gone", names)


def test_where_rows_came_from_is_recorded(tmp_path: Path) -> None:
    path = write(tmp_path / "part.jsonl", GOOD, GOOD)
    rows, source = load_rows(tmp_path, ("part.jsonl",), HUB, FIELDS, limit=1)
    assert len(rows) == source.rows == 1
    assert source.name == str(path)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_without_a_folder_the_hub_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data/part.jsonl", json.dumps(GOOD) + "\n[]\n")
    asked: list[Any] = []

    def download(*names: str, **options: str) -> str:
        asked.append((names, options))
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    rows, source = load_rows(None, (), HUB, FIELDS, limit=1)
    assert asked == [(("someone/benchmark", "data.zip"), {"repo_type": "dataset"})]
    assert rows[0]["length"] == 3
    assert source.name == "someone/benchmark/data.zip/data/part.jsonl"
    assert source.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=r"data.zip/data/part.jsonl:2 is not a JSON object"):
        load_rows(None, (), HUB, FIELDS)
    with pytest.raises(InputError, match=r"has no data/other\.jsonl"):
        load_rows(None, (), HubFile("someone/benchmark", "data.zip", "data/other.jsonl"), FIELDS)


def test_a_hub_out_of_reach_points_to_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(InputError, match=r"can't be fetched \(no route\): .*--data-dir"):
        load_rows(None, (), HUB, FIELDS)
