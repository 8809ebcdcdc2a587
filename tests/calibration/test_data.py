"""Documents from every kind of source, and what each bad one says."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from commvq_core.calibration import data, sources
from commvq_core.calibration.data import iter_documents
from commvq_core.errors import InputError


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_importing_the_reader_loads_no_torch() -> None:
    program = (
        "import sys, commvq_core.calibration.data\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"


def test_a_txt_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufefffirst\r\n\nsecond – ü\n".encode())
    assert list(iter_documents([str(path)])) == ["first\r\n\nsecond – ü\n"]


def test_a_jsonl_file_gives_a_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n{"text": "  "}\n')
    assert list(iter_documents([str(path)])) == ["one", "two"]
    other = write_jsonl(tmp_path / "b.jsonl", [{"body": "three"}])
    assert list(iter_documents([other], text_column="body")) == ["three"]


def test_a_parquet_file_gives_a_document_a_row(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    texts = [f"row {row}" for row in range(600)]
    table = arrow.table({"id": list(range(600)), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(iter_documents([str(tmp_path / "a.parquet")])) == texts


def test_a_folder_is_streamed_as_a_data_set(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "learn"}])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "check"}])
    assert list(iter_documents([str(tmp_path)])) == ["learn"]
    assert list(iter_documents([str(tmp_path)], split="heldout")) == ["check"]


def test_a_data_set_with_one_split_is_divided_by_hash(tmp_path: Path) -> None:
    texts = [f"document number {row}" for row in range(400)]
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    train = list(iter_documents([str(tmp_path)]))
    heldout = list(iter_documents([str(tmp_path)], split="heldout"))
    assert sorted(train + heldout) == sorted(texts)
    assert 0.08 < len(heldout) / len(texts) < 0.25


def test_the_builtin_text_follows_the_split() -> None:
    train = list(islice(iter_documents(["builtin"]), 5))
    heldout = list(islice(iter_documents(["builtin"], split="heldout"), 5))
    assert set(train).isdisjoint(heldout)


def test_several_sources_share_the_text_evenly(tmp_path: Path) -> None:
    small = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * 1000}] * 400)
    long_file = tmp_path / "b.txt"
    long_file.write_text(("b" * 79 + "\n") * 5000)
    drawn = list(islice(iter_documents([small, str(long_file)]), 200))
    a, b = (sum(text.count(letter) for text in drawn) for letter in "ab")
    assert abs(a - b) < 40_000
    rest = list(iter_documents([small, str(long_file)]))
    assert "".join(text for text in rest if "b" in text) == long_file.read_text()


def test_a_source_that_runs_out_leaves_the_rest_to_the_others(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": f"b{row}"} for row in range(5)])
    drawn = list(iter_documents([first, second]))
    assert sorted(drawn) == ["a", "b0", "b1", "b2", "b3", "b4"]


def test_what_was_drawn_is_recorded_with_its_hash(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": n}, {"text": "more"}]) for n in "ab"]
    stream = iter_documents(paths)
    assert [source.sha256 for source in stream.used()] == [None, None]
    list(stream)
    used = stream.used()
    assert [source.name for source in used] == paths
    assert [source.documents for source in used] == [2, 2]
    assert [source.characters for source in used] == [5, 5]
    assert used[0].sha256 != used[1].sha256
    again = iter_documents(paths)
    list(again)
    assert again.used() == used


BAD_TEXT = {
    "empty.txt": (b"", "empty.txt is empty"),
    "blank.txt": (b" \n\n", "blank.txt is empty"),
    "empty.jsonl": (b"", "empty.jsonl is empty"),
    "blank.jsonl": (b"\n\n", "blank.jsonl is empty"),
    "nul.txt": (b"PK\0\1", "nul.txt is binary, not text"),
    "latin.txt": (b"caf\xe9", r"latin.txt is not UTF-8 text \(byte 3\)"),
    "nul.jsonl": (b'{"text": "a"}\n\0\0\n', "nul.jsonl:2 is binary"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "broken.jsonl:2 is not JSON"),
    "list.jsonl": (b'{"text": "a"}\n["b"]\n', "list.jsonl:2 is not a JSON object"),
    "column.jsonl": (
        b'{"text": "a"}\n\n{"body": "b", "id": 1}\n',
        r"column.jsonl:3 has no column 'text' \(columns: body, id\): .*--text-column",
    ),
    "number.jsonl": (b'{"text": 7}\n', "number.jsonl:1: column 'text' holds int, not text"),
    "torn.parquet": (b"PAR1 and nothing more", "torn.parquet is not a readable .parquet file"),
    "empty.parquet": (b"", "empty.parquet is empty"),
    "table.csv": (b"a,b\n", "table.csv is no kind of text that can be read"),
    "noext": (b"words", "noext is no kind of text that can be read"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, name: str) -> None:
    content, message = BAD_TEXT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(iter_documents([str(tmp_path / name)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "gone.parquet", "gone.csv", "gone"])
def test_a_missing_file_is_reported_before_anything_is_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} does not exist"):
        iter_documents(["builtin", str(tmp_path / name)])


def test_an_unreadable_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("words")

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"secret.txt can't be read \(Permission denied\)"):
        iter_documents([str(path)])


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no column 'text' \(columns: body, id\)"):
        list(iter_documents([str(tmp_path / "a.parquet")]))


def test_a_parquet_row_without_text_is_named(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 2: column 'text' holds NoneType"):
        list(iter_documents([str(tmp_path / "a.parquet")]))


def test_a_hub_id_that_cannot_be_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach 'someone/texts' on the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"someone/texts can't be read .*check the id") as caught:
        list(iter_documents(["someone/texts"]))
    assert "long trace" not in str(caught.value)


def test_a_connection_lost_while_streaming_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    def rows() -> Any:
        yield {"text": "first document of the stream"}
        raise OSError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"train": rows(), "test": rows()})
    with pytest.raises(InputError, match=r"someone/texts can't be read \(connection reset\)"):
        list(iter_documents(["someone/texts"]))


def test_a_hub_id_may_name_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, configuration: str | None, *, streaming: bool) -> Any:
        asked.append((name, configuration, streaming))
        return {"train": [{"text": "a"}], "test": [{"text": "b"}]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(iter_documents(["someone/texts:small"])) == ["a"]
    assert list(iter_documents(["someone/texts"], split="heldout")) == ["b"]
    assert asked == [("someone/texts", "small", True), ("someone/texts", None, True)]


def test_a_data_set_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"body": "a", "id": 1}])
    with pytest.raises(InputError, match=r"has no column 'text' \(columns: body, id\)"):
        list(iter_documents([str(tmp_path)]))


def test_naming_no_source_or_no_such_split_is_reported() -> None:
    with pytest.raises(InputError, match="no text was named"):
        iter_documents([])
    with pytest.raises(InputError, match="there is no split 'dev'"):
        iter_documents(["builtin"], split="dev")  # type: ignore[arg-type]


def test_cut_pieces_join_to_the_text_and_end_at_line_ends() -> None:
    text = "".join(f"line {row}\n" for row in range(500))
    pieces = list(data._cut(text, 100))
    assert "".join(pieces) == text
    assert all(len(piece) <= 100 and piece.endswith("\n") for piece in pieces)
    assert list(data._cut("x" * 250, 100)) == ["x" * 100, "x" * 100, "x" * 50]


def test_every_file_kind_has_a_reader() -> None:
    assert set(sources._READERS) == set(sources._FILE_SUFFIXES)
