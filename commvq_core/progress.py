"""How long work reports its progress, without knowing who shows it.

The core calls ``progress.task(...)`` and ``task.advance(n)``; the command line passes an
implementation that draws bars, and library callers pass nothing and see nothing.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol


class Task(Protocol):
    """One unit of long work, used as a context manager."""

    def advance(self, amount: float = 1.0) -> None:
        """Say that `amount` more units are done."""

    def __enter__(self) -> Task: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Progress(Protocol):
    """Where tasks and single lines of news go."""

    def task(self, description: str, total: float, unit: str = "it", done: float = 0.0) -> Task:
        """Open a task of `total` units of which `done` were finished by an earlier run."""

    def message(self, text: str) -> None:
        """Say one line."""


class _SilentTask:
    def advance(self, amount: float = 1.0) -> None:
        return None

    def __enter__(self) -> _SilentTask:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class Silent:
    """Progress that nobody sees: the default of every core function."""

    def task(self, description: str, total: float, unit: str = "it", done: float = 0.0) -> Task:
        return _SilentTask()

    def message(self, text: str) -> None:
        return None
