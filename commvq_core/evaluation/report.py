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
    "longbench": {
        "score": lambda metrics: metrics["score"],
        "the paper's 8": lambda metrics: metrics.get("score_paper8"),
    },
    "infinitebench": {"score": lambda metrics: metrics["score"]},
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
    """Percent found, a row a codec and length, a column a depth; None for tasks without a grid."""
    first = result["results"][0]["metrics"].get("grid")
    if first is None:
        return None
    depths = list(next(iter(first.values())))
    names = ["cache", "tokens", *(f"depth {depth}" for depth in depths)]
    cells = [
        [entry["codec"], int(length), *(100 * by_depth[depth] for depth in depths)]
        for entry in result["results"]
        for length, by_depth in entry["metrics"]["grid"].items()
    ]
    return names, cells


def subset_rows(result: dict[str, Any]) -> Rows | None:
    """Scores in percent, a row a subset, a column a codec; None for tasks without subsets."""
    subsets = result["settings"].get("subsets")
    if subsets is None:
        return None
    entries = result["results"]
    counts = Counter(record["subset"] for record in entries[0]["examples"])
    cells = [
        [name, counts[name], *(entry["metrics"][name] for entry in entries)] for name in subsets
    ]
    return ["subset", "examples", *(entry["codec"] for entry in entries)], cells
