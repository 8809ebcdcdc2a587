"""Rows of benchmarks: from a folder with the official files, or from the hub.

A row is checked as it is read, so that a wrong one is named by file, line and field before a model
runs for hours on the others.
"""

from __future__ import annotations

import types
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Union, get_args, get_origin

from commvq_core.errors import InputError, first_line
from commvq_core.files import sha256_of_file
from commvq_core.text_files import json_lines

Row = dict[str, Any]
# What a field must hold: str, int, float, bool, list, dict, object (anything), None, list[str], or
# a union of those.
Fields = Mapping[str, Any]

_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the hub; of a .zip, the file `member` inside."""

    repo: str
    name: str
    member: str | None = None


@dataclass(frozen=True)
class DataSource:
    """Where rows came from: `sha256` is of the whole file, `rows` how many were taken."""

    name: str
    sha256: str
    rows: int


def load_rows(
    data_dir: Path | None,
    candidates: Sequence[str],
    hub: HubFile,
    fields: Fields,
    *,
    limit: int | None = None,
) -> tuple[list[Row], DataSource]:
    """The first `limit` rows of the first of `candidates` in `data_dir`; without it, of the hub.

    Raises InputError as `find_file`, `download` and `read_rows` do.
    """
    if data_dir is not None:
        path = find_file(data_dir, candidates)
        rows = read_rows(path, fields, limit=limit)
        return rows, DataSource(str(path), sha256_of_file(path), len(rows))
    path = download(hub)
    rows = read_rows(path, fields, limit=limit, member=hub.member)
    name = "/".join(part for part in (hub.repo, hub.name, hub.member) if part)
    return rows, DataSource(name, sha256_of_file(path), len(rows))


def find_file(data_dir: Path, candidates: Sequence[str]) -> Path:
    """The first of `candidates`, relative paths, that `data_dir` has; raises InputError."""
    if not data_dir.is_dir():
        raise InputError(f"{data_dir} is no folder", "give --data-dir a folder of the data's files")
    for candidate in candidates:
        if (data_dir / candidate).is_file():
            return data_dir / candidate
    raise InputError(
        f"{data_dir} has no {' or '.join(candidates)}",
        "put the official file there, or choose others with --subset",
    )


def download(file: HubFile) -> Path:
    """The file of a hub data set, from the local cache where it is there; raises InputError."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(file.repo, file.name, repo_type="dataset"))
    except Exception as error:
        raise InputError(
            f"{file.name} of the data set {file.repo} can't be fetched ({first_line(error)})",
            "check the connection, or give --data-dir a folder with the official files",
        ) from error


def read_rows(
    path: Path, fields: Fields, *, limit: int | None = None, member: str | None = None
) -> list[Row]:
    """The rows of a .jsonl or .parquet file (of a .zip: of its file `member`), `fields` alone.

    Raises InputError for a file that can't be read or is empty, and for a row that lacks a field or
    holds something else in it, by file, line and field.
    """
    rows: list[Row] = []
    with _open_rows(path, member, list(fields)) as found:
        for place, record in found:
            rows.append({name: _field(record, name, fields[name], place) for name in fields})
            if len(rows) == limit:
                break
    if not rows:
        raise InputError(f"{path} has no rows", "give the whole official file")
    return rows


@contextmanager
def _open_rows(
    path: Path, member: str | None, columns: Sequence[str]
) -> Iterator[Iterable[tuple[str, Row]]]:
    try:
        if path.suffix == ".parquet":
            yield _parquet(path, columns)
        elif member is not None:
            with zipfile.ZipFile(path) as archive, _member(archive, member) as handle:
                yield json_lines(handle, f"{path}/{member}")
        else:
            with path.open("rb") as handle:
                yield json_lines(handle, str(path))
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} can't be read ({first_line(error)})", "give the whole official file"
        ) from error


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    if name not in archive.namelist():
        raise InputError(f"{archive.filename} has no {name}", "give the whole official file")
    return archive.open(name)


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        file = parquet.ParquetFile(path)
        known = [name for name in columns if name in file.schema_arrow.names]
        rows = (
            row
            for batch in file.iter_batches(batch_size=64, columns=known)
            for row in batch.to_pylist()
        )
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    except ArrowException as error:
        raise InputError(
            f"{path} is not a readable .parquet file ({first_line(error)})",
            "give the whole official file",
        ) from error


def _field(record: Row, name: str, kind: Any, place: str) -> Any:
    if name not in record:
        found = ", ".join(record) or "none"
        raise InputError(
            f"{place}: field {name!r} is missing (fields: {found})",
            "give the official file, or add the field",
        )
    value = record[name]
    if not _fits(value, kind):
        raise InputError(
            f"{place}: field {name!r} holds {_describe(value)}, not {_in_words(kind)}",
            "give the official file, or mend the row",
        )
    return value


def _fits(value: Any, kind: Any) -> bool:
    if kind is object:
        return True
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return type(value) in (int, float)
    if kind is int:
        return type(value) is int  # True is an int to isinstance
    if kind is str:
        # JSON may hold halves of surrogate pairs, which no tokenizer takes.
        return isinstance(value, str) and _is_unicode(value)
    return isinstance(value, type(None) if kind is None else kind)


def _is_unicode(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _in_words(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_in_words(one) for one in get_args(kind))
    if get_origin(kind) is list:
        return f"a list of {_in_words(get_args(kind)[0])}"
    return _WORDS[type(None) if kind is None else kind]


def _describe(value: Any) -> str:
    if isinstance(value, str):
        return "text with broken characters" if not _is_unicode(value) else "text"
    if isinstance(value, list) and value:
        kinds = dict.fromkeys(_describe(item) for item in value)
        return f"a list of {' and '.join(kinds)}"
    return _WORDS[type(value)]
