"""Progress as rich bars, for terminals."""

from __future__ import annotations

from types import TracebackType
from typing import TextIO

from commvq_cli.lines import rate
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class RateColumn(ProgressColumn):
    """Speed of a task in its own unit."""

    def render(self, task: Task) -> Text:
        """Part of rich's contract."""
        return Text(rate(task.finished_speed or task.speed, task.fields["unit"]), style="cyan")


class CountColumn(ProgressColumn):
    """How many are done, of how many."""

    def render(self, task: Task) -> Text:
        """Part of rich's contract."""
        return Text(f"{task.completed:,.0f}/{task.total or 0:,.0f} {task.fields['unit']}")


class Bars:
    """Implements commvq_core.progress.Progress on a terminal; a context manager."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            CountColumn(),
            RateColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            redirect_stdout=False,
        )

    def task(self, description: str, total: float, unit: str = "it", done: float = 0.0) -> BarTask:
        """See commvq_core.progress.Progress."""
        self._bars.start()
        task = self._bars.add_task(description, total=total, completed=int(done), unit=unit)
        return BarTask(self._bars, task)

    def message(self, text: str) -> None:
        """Print one line above the bars."""
        self._console.print(text, style="dim", markup=False, soft_wrap=True)

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()


class BarTask:
    """One bar."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, amount: float = 1.0) -> None:
        """See commvq_core.progress.Task."""
        self._bars.advance(self._task, amount)

    def __enter__(self) -> BarTask:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop_task(self._task)
