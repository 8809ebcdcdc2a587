"""Small rich tables that the commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


def facts(title: str, values: Mapping[str, Any]) -> Table:
    """A table of names and values, for a command whose result is one thing."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(Text(name), Text(_words(value)))
    return table


def rows(title: str, columns: Sequence[str], cells: Sequence[Sequence[Any]]) -> Table:
    """A table with one line an item; columns of numbers are aligned to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        numeric = all(isinstance(row[index], (int, float)) or row[index] is None for row in cells)
        table.add_column(name, justify="right" if cells and numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(_words(value)) for value in row))
    return table


def size(count: float) -> str:
    """Bytes in words: ``532 B``, ``1.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    return str(value)
