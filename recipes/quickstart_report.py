"""The last step of quickstart.sh: one table, and results.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from commvq_core.files import read_json, write_json


def collect(folder: Path) -> dict[str, Any]:
    """Join what the steps wrote: {"model", "task", "results": [one a cache], ...}."""
    perplexity = read_json(folder / "perplexity.json", "the quickstart")
    needles = read_json(folder / "niah.json", "the quickstart")
    answer = read_json(folder / "answer.json", "the quickstart")
    found = {entry["codec"]: entry for entry in needles["results"]}
    results = []
    for entry in perplexity["results"]:
        needle = found[entry["codec"]]
        kept = {name: value for name, value in entry.items() if name not in ("examples", "metrics")}
        metrics = {
            **entry["metrics"],
            "needle_accuracy": needle["metrics"]["accuracy"],
            "needle_kept": needle["metrics"]["kept"],
        }
        kept["seconds"] = entry["seconds"] + needle["seconds"]
        results.append({**kept, "metrics": metrics})
    return {
        "model": perplexity["model"],
        "task": "quickstart",
        "settings": {"perplexity": perplexity["settings"], "niah": needles["settings"]},
        "results": results,
        "needle_grids": {name: entry["metrics"]["grid"] for name, entry in found.items()},
        "answer": answer,
        "versions": perplexity["versions"],
    }


def table(result: dict[str, Any]) -> Table:
    """One row a cache, in words that a newcomer knows."""
    context = result["results"][0]["context"]
    shown = Table(title=f"{Path(result['model']).name}, {context:,} tokens of context")
    names = (
        "cache",
        "bits a number",
        "cache memory",
        "codebooks",
        "perplexity",
        "worse by",
        "needles",
    )
    for name in names:
        shown.add_column(name, justify="left" if name == "cache" else "right")
    for entry in result["results"]:
        metrics = entry["metrics"]
        shown.add_row(
            entry["codec"],
            f"{entry['bits_per_element']:.2f}",
            f"{entry['cache_bytes'] / 2**20:.1f} MiB",
            f"{entry['resident_bytes'] / 2**20:.1f} MiB",
            f"{metrics['perplexity']:.2f}",
            f"{metrics['delta_percent']:.1f} %",
            f"{metrics['needle_accuracy']:.0%}",
        )
    return shown


def main() -> None:
    folder = Path(sys.argv[1])
    result = collect(folder)
    write_json(folder / "results.json", result)
    console = Console(width=100)
    console.print(table(result))
    answer = result["answer"]
    console.print(f"[bold]{answer['codec']} says:[/bold] ", end="")
    console.print(answer["text"].strip(), markup=False, highlight=False)
    console.print(
        "perplexity: how surprised the model is by unseen text, lower is better; "
        "needles: numbers hidden in a long text that it finds again",
        style="dim",
    )
    console.print(f"all figures: {folder / 'results.json'}", style="dim")


if __name__ == "__main__":
    main()
