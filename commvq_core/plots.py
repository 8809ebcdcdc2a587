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
    figure_class = _figure()
    figure = figure_class(figsize=(8, 5), layout="constrained")
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


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing needs matplotlib", "pip install 'commvq[plots]'") from None
    return Figure
