"""Progress as plain lines, for logs and pipes: a line a task every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

SECONDS_BETWEEN_LINES = 5.0


class Lines:
    """Implements commvq_core.progress.Progress on a stream that is no terminal."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock

    def task(self, description: str, total: float, unit: str = "it", done: float = 0.0) -> LineTask:
        """See commvq_core.progress.Progress."""
        return LineTask(self.message, self._clock, description, total, unit, done)

    def message(self, text: str) -> None:
        """Print one line."""
        print(text, file=self._stream, flush=True)


class LineTask:
    """One task: a line every few seconds, and one when it ends."""

    def __init__(
        self,
        say: Callable[[str], None],
        clock: Callable[[], float],
        description: str,
        total: float,
        unit: str,
        done: float,
    ) -> None:
        self._say = say
        self._clock = clock
        self._description = description
        self._total = total
        self._unit = unit
        self._first = self._done = done
        self._began = self._last_line = clock()

    def advance(self, amount: float = 1.0) -> None:
        """See commvq_core.progress.Task."""
        self._done += amount
        now = self._clock()
        if now - self._last_line >= SECONDS_BETWEEN_LINES and self._done < self._total:
            self._last_line = now
            self._say(self._line(now - self._began))

    def __enter__(self) -> LineTask:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            seconds = self._clock() - self._began
            self._say(f"{self._description}: {self._count()} in {duration(seconds)}")

    def _count(self) -> str:
        return f"{self._done:,.0f}/{self._total:,.0f} {self._unit}"

    def _line(self, seconds: float) -> str:
        speed = (self._done - self._first) / max(seconds, 1e-9)
        left = (self._total - self._done) / speed if speed > 0 else None
        parts = [self._count(), rate(speed, self._unit)]
        parts += [] if left is None else [f"{duration(left)} left"]
        return f"{self._description}: {', '.join(parts)}"


def rate(speed: float | None, unit: str) -> str:
    """Speed in words: ``3.1 windows/s``, or ``4.2 s each`` below one a second."""
    if not speed or speed <= 0:
        return ""
    if speed >= 1:
        return f"{speed:,.0f} {unit}/s" if speed >= 100 else f"{speed:.1f} {unit}/s"
    return f"{1 / speed:,.1f} s each"


def duration(seconds: float) -> str:
    """Seconds in words: ``9 s``, ``2:05`` or ``1:02:03``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
