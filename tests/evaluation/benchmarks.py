"""Files of benchmarks as they are published, with made-up rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = " ".join(f"word{number} is here." for number in range(60))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def longbench_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """One row in LongBench's format."""
    row = {
        "input": f"Which word is number {number}?",
        "context": f"Row {number}. {WORDS}",
        "answers": [f"word{number}", "another"],
        "length": 3000 + 3000 * number,
        "dataset": "made-up",
        "language": "en",
        "all_classes": None,
        "_id": f"id-{number}",
    }
    return row | changes


def longbench(folder: Path, *names: str, rows: int = 3) -> Path:
    """A folder like LongBench's, with some rows of each of the named subsets."""
    for name in names:
        classes = ["Food", "Sport"] if name.removesuffix("_e") in ("trec", "lsht") else None
        write_rows(
            folder / "data" / f"{name}.jsonl",
            [longbench_row(number, all_classes=classes) for number in range(rows)],
        )
    return folder
