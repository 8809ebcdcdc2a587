"""`commvq export`: the artifact that inference loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from commvq_cli import options
from commvq_cli.console import session


def command(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="What train-codebook wrote.", show_default=False),
    ],
    out: Annotated[Path, options.out("ARTIFACT", "Folder to write.")],
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Also upload it as this hub repository.", show_default=False
        ),
    ] = None,
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Take an unfinished run: layers without codes stay exact."),
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Pack a finished run into an artifact."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        from commvq_cli.tables import facts

        from commvq_core.artifact import export_run
        from commvq_core.artifact import push_to_hub as upload

        summary = export_run(run, out, partial=partial, overwrite=overwrite, progress=ui.progress)
        if push_to_hub is not None:
            summary = {**summary, "hub": upload(out, push_to_hub)}
        ui.result(summary, lambda: facts("exported", summary))
