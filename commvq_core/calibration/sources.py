"""Readers of text: one function a kind of source, each yielding one document at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from commvq_core.calibration.builtin import HELDOUT_PERCENT, Split, builtin_documents
from commvq_core.errors import InputError
from commvq_core.text_files import decode_text, json_lines

BUILTIN = "builtin"
_FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
# Names that end like this were meant as files, so a typing error is not sent to the hub.
_OTHER_SUFFIXES = (".csv", ".tsv", ".json", ".md", ".html", ".pdf", ".xml", ".gz", ".zst", ".zip")
_HELDOUT_SPLITS = ("test", "validation")


def open_source(source: str, split: Split, text_column: str) -> Iterator[str]:
    """Open one source; see `data.iter_documents` for the kinds.

    Raises InputError at once for a name that can't be a source or a file that is missing, and while
    reading for what is wrong with the text itself.
    """
    if source == BUILTIN:
        return builtin_documents(split)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_hub(source, str(path), split, text_column)
    suffix = path.suffix.lower()
    if suffix in _FILE_SUFFIXES:
        _check_file(path)
        return _READERS[suffix](path, text_column)
    if path.exists() or suffix in _OTHER_SUFFIXES or source.startswith(("/", "./", "../", "~")):
        if not path.exists():
            raise InputError(f"{source} does not exist", "check the path of the --dataset")
        raise InputError(
            f"{source} is no kind of text that can be read",
            f"give a file that ends in {', '.join(_FILE_SUFFIXES)}, a hub id, or {BUILTIN}",
        )
    return _read_hub(source, source, split, text_column)


def has_splits(source: str) -> bool:
    """Whether a source divides into training and held-out text; files are read whole."""
    return Path(source).suffix.lower() not in _FILE_SUFFIXES or Path(source).is_dir()


def _check_file(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path} does not exist", "check the path of the --dataset")
    try:
        with path.open("rb") as handle:
            first = handle.read(1)
    except OSError as error:
        raise InputError(
            f"{path} can't be read ({error.strerror})", "check its permissions"
        ) from None
    if not first:
        raise InputError(f"{path} is empty", "give a file with text in it")


def _read_txt(path: Path, text_column: str) -> Iterator[str]:
    """The whole file as one document, its line ends as they are."""
    yield decode_text(path.read_bytes(), str(path))


def _read_jsonl(path: Path, text_column: str) -> Iterator[str]:
    """One JSON object a line; blank lines are passed over."""
    with path.open("rb") as handle:
        for place, record in json_lines(handle, str(path)):
            yield _column(record, text_column, place)


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            "reading .parquet needs the package pyarrow", "pip install pyarrow"
        ) from None
    mend = "give a whole .parquet file"
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if text_column not in names:
            raise _no_column(str(path), text_column, names)
        row = 0
        for batch in file.iter_batches(batch_size=256, columns=[text_column]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield _column({text_column: value}, text_column, f"{path}, row {row}")
    except arrow.ArrowException as error:
        raise InputError(f"{path} is not a readable .parquet file ({error})", mend) from error
    except OSError as error:
        raise InputError(f"{path} is not a readable .parquet file ({error})", mend) from error


def _read_hub(source: str, name: str, split: Split, text_column: str) -> Iterator[str]:
    """Stream a data set with `datasets`: a hub id, ``id:configuration``, or a folder of files.

    The data set's own test or validation split is what is held out. Where it has only one split, a
    hash of each document decides, so that training and held-out text never meet.
    """
    rows, has_own = _open_hub(source, name, split)
    for number, row in enumerate(_reworded(rows, source)):
        text = _column(row, text_column, f"{source}, row {number}")
        if has_own or (_percent(text) < HELDOUT_PERCENT) == (split == "heldout"):
            yield text


def _open_hub(source: str, name: str, split: Split) -> tuple[Iterator[dict[str, Any]], bool]:
    """The rows of one split, and whether the data set itself keeps held-out text apart."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            "hub data sets need the package datasets", "pip install datasets"
        ) from None
    repository, _, configuration = (name, "", "") if Path(name).is_dir() else name.partition(":")
    try:
        found = datasets.load_dataset(repository, configuration or None, streaming=True)
    except Exception as error:
        raise _unreachable(source, error) from error
    own = next((key for key in _HELDOUT_SPLITS if key in found), None)
    train = "train" if "train" in found else next(key for key in found)
    has_own = own is not None and own != train
    chosen = own if has_own and split == "heldout" else train
    return iter(found[chosen]), has_own


def _reworded(rows: Iterator[dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    """The rows, with whatever the network or the files raise turned into InputError."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _unreachable(source, error) from error
        yield row


def _unreachable(source: str, error: Exception) -> InputError:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return InputError(
        f"the data set {source} can't be read ({reason})",
        "check the id (id:configuration where it has several) and the connection, or give a file",
    )


def _column(record: Mapping[str, Any], text_column: str, place: str) -> str:
    if text_column not in record:
        raise _no_column(place, text_column, list(record))
    value = record[text_column]
    if not isinstance(value, str):
        raise InputError(
            f"{place}: column {text_column!r} holds {type(value).__name__}, not text",
            "name another --text-column",
        )
    return value


def _no_column(place: str, text_column: str, found: list[str]) -> InputError:
    columns = ", ".join(found) or "none"
    return InputError(
        f"{place} has no column {text_column!r} (columns: {columns})",
        "name one of them with --text-column",
    )


def _percent(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") % 100


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
