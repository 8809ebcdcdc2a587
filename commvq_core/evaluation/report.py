"""An evaluation's result as rows of a table, for whoever draws it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

Rows = tuple[list[str], list[list[Any]]]  # column names, cells

_FOUND: dict[str, Callable[[dict[str, Any]], Any]] = {
    "found %": lambda metrics: 100 * metrics["accuracy"],
    "of those fp16 found %": lambda metrics: (
        None if metrics["kept"] is None else 100 * metrics["kept"]
    ),
}

# What a task shows beside bits and bytes: column name -> value of its metrics.
_COLUMNS: dict[str, dict[str, Callable[[dict[str, Any]], Any]]] = {
    "perplexity": {
        "perplexity": lambda metrics: metrics["perplexity"],
        "above fp16 %": lambda metrics: metrics["delta_percent"],
        "tokens": lambda metrics: metrics["tokens"],
    },
    "divergence": {
        "KL, nats": lambda metrics: metrics["kl_mean"],
        "KL 99 %": lambda metrics: metrics["kl_p99"],
        "same top-1 %": lambda metrics: 100 * metrics["top1_agreement"],
        "perplexity": lambda metrics: metrics["perplexity"],
        "above fp16 %": lambda metrics: metrics["delta_percent"],
    },
    "niah": _FOUND,
    "kv": _FOUND,
    "passkey": _FOUND,
    "ruler": _FOUND,
    "longbench": {
        "score": lambda metrics: metrics["score"],
        "the paper's 8": lambda metrics: metrics.get("score_paper8"),
    },
    "infinitebench": {"score": lambda metrics: metrics["score"]},
    "gsm8k": {
        "exact match %": lambda metrics: 100 * metrics["exact_match"],
        "of those fp16 got right %": lambda metrics: (
            None if metrics["kept"] is None else 100 * metrics["kept"]
        ),
    },
}


def summary_rows(result: dict[str, Any]) -> Rows:
    """One row a codec: bits, bytes of the cache at the longest context, and the task's metrics."""
    columns = _COLUMNS[result["task"]]
    names = ["cache", "bits/element", "cache bytes", "of fp16 %", *columns, "seconds"]
    cells = [
        [
            entry["codec"],
            entry["bits_per_element"],
            entry["cache_bytes"],
            100 * entry["cache_bytes"] / entry["fp16_cache_bytes"],
            *(value(entry["metrics"]) for value in columns.values()),
            entry["seconds"],
        ]
        for entry in result["results"]
    ]
    return names, cells


def grid_rows(result: dict[str, Any]) -> Rows | None:
    """Percent found, a row a codec and length, a column a depth; None for tasks without a grid.

    Where there are subsets, a row is one of these and a column a length.
    """
    first = result["results"][0]["metrics"].get("grid")
    if first is None:
        return None
    by_subset = result["task"] == "ruler"
    columns = list(dict.fromkeys(column for cells in first.values() for column in cells))
    names = ["cache", "subset" if by_subset else "tokens"]
    names += [f"{column} tokens" if by_subset else f"depth {column}" for column in columns]
    cells = [
        [
            entry["codec"],
            row if by_subset else int(row),
            *(100 * found[column] if column in found else None for column in columns),
        ]
        for entry in result["results"]
        for row, found in entry["metrics"]["grid"].items()
    ]
    return names, cells


def subset_rows(result: dict[str, Any]) -> Rows | None:
    """Scores in percent, a row a subset, a column a codec; None for tasks without subsets.

    None also where `grid_rows` shows them.
    """
    subsets = result["settings"].get("subsets")
    if subsets is None or "grid" in result["results"][0]["metrics"]:
        return None
    entries = result["results"]
    counts = Counter(record["subset"] for record in entries[0]["examples"])
    cells = [
        [name, counts[name], *(entry["metrics"][name] for entry in entries)] for name in subsets
    ]
    return ["subset", "examples", *(entry["codec"] for entry in entries)], cells


def length_rows(result: dict[str, Any]) -> Rows | None:
    """Scores in percent by length, a column a codec; None where a task has none.

    LongBench-E's lengths are over all subsets, InfiniteBench's for each.
    """
    lengths = result["results"][0]["metrics"].get("lengths")
    if lengths is None:
        return None
    whole = not all(isinstance(value, dict) for value in lengths.values())
    found = [
        {"all": entry["metrics"]["lengths"]} if whole else entry["metrics"]["lengths"]
        for entry in result["results"]
    ]
    cells = [
        [name, length, *(by[name][length] for by in found)]
        for name, by_length in found[0].items()
        for length in by_length
    ]
    return ["subset", "length", *(entry["codec"] for entry in result["results"])], cells
