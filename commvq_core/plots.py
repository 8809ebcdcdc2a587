"""Figures. Needs matplotlib, which the extra `plots` brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from commvq_core.errors import InputError
from commvq_core.files import atomic_write
from commvq_core.sides import SIDES


def plot_layers(facts: dict[str, Any], path: Path) -> None:
    """Draw distortion and bits over the layers of a run or artifact (`inspect_path`) to a PNG.

    Raises InputError without matplotlib, for what has no distortion, and when it can't be written.
    """
    layers = [row for row in facts["layers"] if "key_bits" in row]
    if not layers:
        raise InputError(
            f"a {facts['kind']} has no distortion to draw", "give a run or an artifact"
        )
    figure = figure_class()(figsize=(8, 5), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    for side in SIDES:
        numbers = [row["layer"] for row in layers]
        errors = [row[f"{side}_distortion"] for row in layers]
        top.plot(
            numbers, [float("nan") if e is None else e for e in errors], "o-", label=f"{side}s"
        )
        bottom.step(numbers, [row[f"{side}_bits"] for row in layers], where="mid", label=f"{side}s")
    top.set_ylabel("relative error, held out")
    top.set_ylim(bottom=0)
    top.legend()
    bottom.set_ylabel("bits an element")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("layer")
    top.set_title(str(facts["model"]))
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def plot_grid(result: dict[str, Any], path: Path) -> None:
    """Draw an evaluation's grid to a PNG: a heat map a cache, side by side, green where found.

    Of needles that are scored by ROUGE, it is ROUGE-1 that is drawn. Raises InputError without
    matplotlib, and when the file can't be written.
    """
    entries = result["results"]
    name = "grid_rouge_1" if "grid_rouge_1" in entries[0]["metrics"] else "grid"
    grids = [entry["metrics"][name] for entry in entries]
    rows = list(grids[0])
    columns = list(dict.fromkeys(column for cells in grids[0].values() for column in cells))
    across = "depth of the needle, percent" if result["task"] != "ruler" else "tokens"
    size = (1.5 + len(entries) * max(2.5, 0.55 * len(columns)), 1.5 + 0.4 * len(rows))
    figure = figure_class()(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(entries), squeeze=False, sharey=True)[0]
    for axis, entry, grid in zip(axes, entries, grids, strict=True):
        values = [[100 * grid[row].get(column, float("nan")) for column in columns] for row in rows]
        image = axis.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value == value:  # NaN where a subset has no such length
                    axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_xlabel(across)
        axis.set_title(f"{entry['codec']}, {entry['bits_per_element']:.2f} bits", fontsize=9)
    axes[0].set_ylabel("" if result["task"] == "ruler" else "tokens")
    what = "ROUGE-1" if name == "grid_rouge_1" else "found"
    figure.colorbar(image, ax=axes.tolist(), label=f"{what}, percent")
    figure.suptitle(f"{result['task']}, {Path(result['model']).name}", fontsize=10)
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def plot_decode(result: dict[str, Any], path: Path) -> None:
    """Draw milliseconds against context, both on a log scale, of `bench_decode` to a PNG.

    Raises InputError without matplotlib, and when it can't be written.
    """
    figure = figure_class()(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    rows = result["rows"]
    for name in dict.fromkeys(row["impl"] for row in rows):
        own = [row for row in rows if row["impl"] == name]
        axes.plot(
            [row["context"] for row in own],
            [row["ms_median"] for row in own],
            "k--" if name.endswith("roofline") else "o-" if name.startswith("commvq") else "s:",
            label=name,
        )
    contexts = sorted({row["context"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("milliseconds of one layer, one new token")
    axes.set_title(f"{result['shape']}, {result['device']}, {result['threads']} threads")
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize="small")
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def plain_numbers(axis: Any) -> None:
    """Let a log axis say 20, not 2 x 10^1, between powers of ten too where these are few."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))


def require_matplotlib() -> None:
    """Raise InputError where figures can't be drawn, before work whose result is to be one."""
    figure_class()


def figure_class() -> Any:
    """matplotlib's Figure, without its state of global figures. Raises InputError without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing needs matplotlib", "pip install 'commvq[plots]'") from None
    return Figure
