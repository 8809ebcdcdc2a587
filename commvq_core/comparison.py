"""A comparison as text and pictures: Markdown, one HTML page, a PNG."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commvq_core.compare import BASELINE, Row, Table, smaller_is_better
from commvq_core.files import atomic_write, write_text
from commvq_core.plots import figure_class, plain_numbers

_PLOTS_A_ROW = 3
_BITS = re.compile(r"-\d+(?:\.\d+)?(?:bit)?(-(?:key|value)s)?(?::.*)?$")
_STYLE = (
    "body{font-family:sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.other{color:#888}img{max-width:100%}"
)


def method_of(codec: str) -> str:
    """A codec's name without its bits: "kivi-2" and "kivi-4" are one method, "kivi"."""
    return _BITS.sub(r"\1", codec)


def turned_cells(
    names: Sequence[str], cells: Sequence[Sequence[Any]]
) -> tuple[list[str], list[list[Any]]]:
    """The same with a column a cache, for tables of many metrics."""
    caches, *metrics = zip(names, *cells, strict=True)
    return list(caches), [list(line) for line in metrics]


def table_cells(table: Table) -> tuple[list[str], list[list[Any]], list[str]]:
    """(column names, a row of cells a cache, notes). Rows that can't be compared have a mark, such
    as [1], whose note says why."""
    notes = list(dict.fromkeys(row.why for row in table.rows if row.why))
    cells = [
        [
            row.codec + (f" [{notes.index(row.why) + 1}]" if row.why else ""),
            row.bits_per_element,
            row.cache_bytes,
            row.resident_bytes,
            *(row.metrics[name] for name in table.columns),
        ]
        for row in table.rows
    ]
    names = ["cache", "bits/element", "cache bytes", "resident bytes", *table.columns]
    return names, cells, [f"[{i}] not comparable: {'; '.join(why)}" for i, why in _numbered(notes)]


def markdown(tables: Sequence[Table]) -> str:
    """Every table as Markdown, with its notes."""
    parts = []
    for table in tables:
        names, cells, notes = table_cells(table)
        lines = [f"## {_title(table)}", "", _line(names), _line(["---"] * len(names))]
        lines += [_line([_number(cell) for cell in row]) for row in cells]
        parts.append("\n".join([*lines, *(f"\n{note}" for note in notes)]))
    return "\n\n".join(parts) + "\n"


def write_html(tables: Sequence[Table], path: Path) -> None:
    """One page with tables and plots, which needs no other file. Raises InputError as `plot`."""
    parts = []
    for table in tables:
        names, cells, notes = table_cells(table)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        body = "".join(
            f"<tr{' class=other' if row.why else ''}>"
            + "".join(f"<td>{html.escape(_number(cell))}</td>" for cell in line)
            + "</tr>"
            for row, line in zip(table.rows, cells, strict=True)
        )
        picture = base64.b64encode(_png([table])).decode()
        parts.append(
            f"<h2>{html.escape(_title(table))}</h2><table><tr>{head}</tr>{body}</table>"
            + "".join(f"<p class=other>{html.escape(note)}</p>" for note in notes)
            + f'<img alt="accuracy against bits" src="data:image/png;base64,{picture}">'
        )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>commvq compare</title>'
        f"<style>{_STYLE}</style><h1>commvq compare</h1>{''.join(parts)}</html>\n"
    )
    write_text(path, page)


def write_png(tables: Sequence[Table], path: Path) -> None:
    """All plots in one picture. Raises InputError without matplotlib."""
    data = _png(tables)

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    atomic_write(path, write)


def _png(tables: Sequence[Table]) -> bytes:
    """A plot a metric: its value against bits, a line a method, fp16 as a dashed one, and hollow
    what can't be compared."""
    wanted = [(table, column) for table in tables for column in table.columns]
    rows = -(-len(wanted) // _PLOTS_A_ROW)
    columns = min(_PLOTS_A_ROW, len(wanted))
    figure = figure_class()(figsize=(5 * columns, 3.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (table, column) in zip(grid, wanted, strict=False):
        _plot(axes, table, column)
    for axes in grid[len(wanted) :]:
        axes.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _plot(axes: Any, table: Table, column: str) -> None:
    points = [
        (row, value)
        for row in table.rows
        if row.codec != BASELINE and (value := row.metrics[column]) is not None
    ]
    baseline = table.baseline(column)
    # Errors of caches lie orders of magnitude apart; a line at 0 has no place among them.
    if smaller_is_better(column) and points and min(value for _, value in points) > 0:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    if baseline is not None and (baseline > 0 or axes.get_yscale() == "linear"):
        axes.axhline(baseline, color="black", linestyle="--", linewidth=1, label=BASELINE)
        axes.legend(fontsize="small")
    for method, own in _methods(points).items():
        colour = _colour(table, method)
        like = sorted((row.bits_per_element, value) for row, value in own if not row.why)
        if len(like) > 1:
            axes.plot(*zip(*like, strict=True), "-", color=colour, alpha=0.5)
    for index, (row, value) in enumerate(sorted(points, key=lambda p: p[0].bits_per_element)):
        _point(axes, row, value, _colour(table, method_of(row.codec)), below=index % 2 == 1)
    axes.margins(x=0.15, y=0.12)  # room for names
    axes.set_xlabel("bits an element")
    axes.set_ylabel(f"{column} ({'smaller' if smaller_is_better(column) else 'larger'} is better)")
    axes.set_title(_title(table), fontsize="small")
    axes.grid(alpha=0.3)


def _methods(points: Sequence[tuple[Row, float]]) -> dict[str, list[tuple[Row, float]]]:
    found: dict[str, list[tuple[Row, float]]] = {}
    for row, value in points:
        found.setdefault(method_of(row.codec), []).append((row, value))
    return found


def _colour(table: Table, method: str) -> str:
    """The same for a method in every plot of a table, whichever metrics it has."""
    place = list(dict.fromkeys(method_of(row.codec) for row in table.rows)).index(method)
    return f"C{place % 10}"


def _point(axes: Any, row: Row, value: float, colour: str, *, below: bool) -> None:
    face = "none" if row.why else colour
    axes.plot([row.bits_per_element], [value], "o", color=colour, markerfacecolor=face)
    axes.annotate(
        row.codec,
        (row.bits_per_element, value),
        textcoords="offset points",
        xytext=(4, -10 if below else 4),  # neighbours' names do not touch
        fontsize="x-small",
    )


def _title(table: Table) -> str:
    return f"{table.task}, {Path(table.model).name}"


def _numbered(notes: Sequence[tuple[str, ...]]) -> list[tuple[int, tuple[str, ...]]]:
    return list(enumerate(notes, start=1))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _number(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return str(cell)
