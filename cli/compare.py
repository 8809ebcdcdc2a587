"""`commvq compare`: results of several evaluations side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from commvq_cli import options
from commvq_cli.console import session

_MOST_COLUMNS = 9  # of a table; with more metrics, caches are the columns


def command(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS.json",
            help="What eval or lm-eval wrote. The first file of a task says what the others must "
            "agree with.",
            show_default=False,
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One page, plots inside.", show_default=False),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plots: every metric against bits.", show_default=False),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The tables.", show_default=False)
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compare results of evaluations: accuracy against bits, and what is not comparable."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as ui:
        from commvq_cli.tables import rows
        from rich.console import Group, RenderableType
        from rich.text import Text

        from commvq_core import compare, comparison
        from commvq_core.files import check_output, write_text

        for path in (html, png, markdown):
            if path is not None:
                check_output(path, overwrite=overwrite)
        tables = compare.compare_files(results)
        if html is not None:
            comparison.write_html(tables, html)
        if png is not None:
            comparison.write_png(tables, png)
        if markdown is not None:
            write_text(markdown, comparison.markdown(tables))

        def view() -> Group:
            parts: list[RenderableType] = []
            for table in tables:
                names, cells, notes = comparison.table_cells(table)
                if len(names) > _MOST_COLUMNS:
                    names, cells = comparison.turned_cells(names, cells)
                parts.append(rows(f"{table.task}, {table.model}", names, cells))
                parts += [Text(note) for note in notes]
            return Group(*parts)

        ui.result(compare.as_json(tables), view)
