"""Files of examples that RULER's own scripts made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from commvq_core.evaluation.data import read_rows

_ROUND = 1024  # tokens


@dataclass(frozen=True)
class MadeRow:
    """One ready-made prompt: the text before its last line, that line, and the answers."""

    context: str
    question: str
    expected: tuple[str, ...]


def find_made(data_dir: Path | None, subset: str) -> Path | None:
    """`SUBSET/validation.jsonl` or `SUBSET.jsonl` in the folder, if it is there."""
    names = (f"{subset}/validation.jsonl", f"{subset}/test.jsonl", f"{subset}.jsonl")
    paths = [] if data_dir is None else [data_dir / name for name in names]
    return next((path for path in paths if path.is_file()), None)


def read_made(path: Path, limit: int | None) -> tuple[int, list[MadeRow]]:
    """The length that the file was made for, to the next 1,024 tokens, and its rows.

    Newer files keep the beginning of the answer apart, in `answer_prefix`. Raises InputError naming
    line and field.
    """
    fields = {"input": str, "outputs": list[str], "length": int}
    with path.open("rb") as handle:
        if b'"answer_prefix"' in handle.readline():
            fields["answer_prefix"] = str
    rows = read_rows(path, fields, limit=limit)
    made = []
    for row in rows:
        text = row["input"] + row.get("answer_prefix", "")
        context, newline, question = text.rstrip("\n").rpartition("\n")
        made.append(MadeRow(context + newline, question, tuple(row["outputs"])))
    longest = max(row["length"] for row in rows)
    return -(-longest // _ROUND) * _ROUND, made
