"""`commvq inspect`: what a calibration, a run or an artifact holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from commvq_cli import options
from commvq_cli.console import session


def command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="CALIB|RUN|ARTIFACT",
            help="What calibrate, train-codebook or export wrote.",
            show_default=False,
        ),
    ],
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw error and bits over the layers.", show_default=False
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the figure.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show what a calibration, a run or an artifact holds."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        from commvq_cli.tables import facts, rows
        from rich.console import Group, RenderableType

        from commvq_core.files import check_output
        from commvq_core.inspect import inspect_path
        from commvq_core.plots import plot_layers

        if png is not None:
            check_output(png, overwrite=overwrite)
        found = inspect_path(path)
        if png is not None:
            plot_layers(found, png)

        def view() -> RenderableType:
            flat = {name: value for name, value in found.items() if name not in ("kind", "layers")}
            parts = [facts(f"{found['kind']} {path}", flat)]
            if layers := found.get("layers"):
                names = dict.fromkeys(name for layer in layers for name in layer)
                columns = [name for name in names if not name.endswith("_heads")]  # in the JSON
                cells = [[layer.get(name) for name in columns] for layer in layers]
                parts.append(rows("layers", columns, cells))
            return Group(*parts)

        ui.result(found, view)
