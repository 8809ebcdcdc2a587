"""Results of several evaluations side by side, and which of them may be compared.

Two results of a task are comparable when nothing but the caches differs: the same model, the same
examples and the same settings. What differs is said of every row, not hidden.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from commvq_core.errors import InputError
from commvq_core.files import read_json

BASELINE = "fp16"
# What a task is judged by first, in this order; smaller is better for the first three.
_HEADLINES = ("kl_mean", "perplexity", "delta_percent", "accuracy", "score", "exact_match")
_SMALLER = ("kl_", "perplexity", "delta_percent", "word_perplexity", "byte_perplexity", "bits_per_")
# Of metrics, but no measure of a cache; "kept" is accuracy again, relative to fp16.
_COUNTS = ("tokens", "kept")
# Settings that say the same as others, or nothing about a score.
_NOT_SETTINGS = ("sources", "examples_sha256", "batch_size")
_IN_WORDS = 40  # characters of a setting that a reason shows


@dataclass(frozen=True)
class Row:
    """One cache in one result. `why` says why it can't be compared with the table's first result;
    empty: it can. `metrics` maps a column to its value, None where the result has none."""

    file: str
    codec: str
    bits_per_element: float
    resident_bytes: int
    cache_bytes: int | None
    metrics: dict[str, float | None]
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """All results of one task. `columns` are metrics, the one that the task is judged by first."""

    task: str
    model: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def baseline(self, column: str) -> float | None:
        """What fp16 has there, in the first result."""
        return next(row.metrics[column] for row in self.rows if row.codec == BASELINE)


def smaller_is_better(column: str) -> bool:
    """Whether a metric counts errors."""
    return column.rpartition(" ")[2].startswith(_SMALLER)


def load_result(path: Path) -> dict[str, Any]:
    """Read what `commvq eval` or `lm-eval` wrote. Raises InputError for anything else."""
    result = read_json(path, "the evaluation")
    kinds = {"model": str, "task": str, "settings": dict, "results": list}
    mend = "give files that commvq eval or commvq lm-eval wrote"
    for name, kind in kinds.items():
        if not isinstance(result.get(name), kind):
            raise InputError(f"{path} is no evaluation ({name} is missing or of no use)", mend)
    needed = ("codec", "bits_per_element", "resident_bytes", "metrics")
    for index, entry in enumerate(result["results"]):
        missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise InputError(
                f"{path} is no evaluation (results[{index}] has no {missing[0]})", mend
            )
    if not any(entry["codec"] == BASELINE for entry in result["results"]):
        raise InputError(f"{path} has no {BASELINE} result to compare with", mend)
    return result


def compare_files(paths: Sequence[Path]) -> list[Table]:
    """One table a task, in the order of the files; the first file of a task sets what counts.

    A codec that several results have in exactly the same way appears once. Raises InputError for a
    file that is no evaluation.
    """
    by_task: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for path in dict.fromkeys(paths):
        result = load_result(path)
        by_task.setdefault(result["task"], []).append((str(path), result))
    return [_table(task, results) for task, results in by_task.items()]


def as_json(tables: Sequence[Table]) -> dict[str, Any]:
    """What `compare --json` prints."""
    return {"tables": [asdict(table) for table in tables]}


def _table(task: str, results: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    first = results[0][1]
    rows, seen = [], set()
    for file, result in results:
        why = differences(first, result)
        for entry in result["results"]:
            row = Row(
                file,
                entry["codec"],
                float(entry["bits_per_element"]),
                int(entry["resident_bytes"]),
                entry.get("cache_bytes"),
                flat_metrics(entry["metrics"]),
                (*why, *_other_exact_tokens(first, entry)),
            )
            key = json.dumps([row.codec, row.bits_per_element, row.metrics, row.why])
            if key not in seen:
                seen.add(key)
                rows.append(row)
    found = dict.fromkeys(name for row in rows for name in row.metrics)
    columns = sorted(found, key=_rank)
    rows = [_with_columns(row, columns) for row in rows]
    return Table(task, first["model"], tuple(columns), tuple(rows))


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """Why `other` can't be compared with `first`, one short text a reason."""
    reasons = []
    if first["model"] != other["model"]:
        reasons.append(f"other model ({other['model']})")
    elif first.get("model_fingerprint") != other.get("model_fingerprint"):
        reasons.append("other model of the same name")
    mine, theirs = first["settings"], other["settings"]
    names = [n for n in dict.fromkeys((*mine, *theirs)) if n not in _NOT_SETTINGS]
    for name in names:
        if mine.get(name) != theirs.get(name):
            reasons.append(f"{name} {_words(theirs.get(name))}, not {_words(mine.get(name))}")
    if mine.get("examples_sha256") != theirs.get("examples_sha256"):
        reasons.append("other examples")
    return tuple(reasons)


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers by column: nested ones as "outer inner"; a grid as the mean at each length."""
    flat: dict[str, float | None] = {}
    for name, value in metrics.items():
        if name in _COUNTS:
            continue
        if name == "grid" and "subsets" in metrics:
            value = _turned(value)  # RULER's rows are subsets, which have columns already
        if isinstance(value, Mapping):
            for inner, part in value.items():
                column = f"{'tokens' if name == 'grid' else name} {inner}"
                if isinstance(part, Mapping):
                    numbers = [float(x) for x in part.values() if _is_number(x)]
                    flat[column] = sum(numbers) / len(numbers) if numbers else None
                elif _is_number(part):
                    flat[column] = float(part)
        elif value is None or _is_number(value):
            flat[name] = None if value is None else float(value)
    return flat


def _turned(grid: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows as columns."""
    turned: dict[str, dict[str, Any]] = {}
    for row, cells in grid.items():
        for column, value in cells.items():
            turned.setdefault(column, {})[row] = value
    return turned


def _other_exact_tokens(first: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Windows and sinks that differ from those of the first result's compressed caches.

    transformers' own caches have theirs fixed, which is part of what they are.
    """
    entries = (e for e in first["results"] if "sinks" in e.get("identity", {}))
    identities = [e["identity"] for e in entries if not e["codec"].startswith("hf-")]
    mine: dict[str, Any] = identities[0] if identities else {}
    theirs = entry.get("identity", {})
    if entry["codec"].startswith("hf-"):
        return ()
    return tuple(
        f"{name} {theirs[name]}, not {mine[name]}"
        for name in ("window", "sinks")
        if name in mine and name in theirs and mine[name] != theirs[name]
    )


def _rank(column: str) -> int:
    return _HEADLINES.index(column) if column in _HEADLINES else len(_HEADLINES)


def _with_columns(row: Row, columns: Sequence[str]) -> Row:
    return Row(**{**vars(row), "metrics": {name: row.metrics.get(name) for name in columns}})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _words(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _IN_WORDS else f"{text[: _IN_WORDS - 3]}..."
