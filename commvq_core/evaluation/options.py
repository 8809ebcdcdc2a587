"""What a user may ask of an evaluation, whatever the task."""

from __future__ import annotations

import math
from dataclasses import dataclass

from commvq_core.errors import InputError

BUILTIN = ("builtin",)


@dataclass(frozen=True)
class EvalOptions:
    """Options of every task; None means the task's own default.

    `datasets` and `text_column` as in calibration. `limit` is a number of examples (for grids: a
    cell), `max_length` of tokens. `lengths` (tokens) and `depths` (percent) span the grid of tasks
    that have one; the other tasks refuse them. Raises InputError for values that no task could use.
    """

    datasets: tuple[str, ...] = BUILTIN
    text_column: str = "text"
    limit: int | None = None
    max_length: int | None = None
    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("--limit", self.limit), ("--max-length", self.max_length)):
            if value is not None and value < 1:
                raise InputError(f"{name} {value}", "give at least 1")
        if any(length < 1 for length in self.lengths or ()):
            raise InputError("a length below 1 token", "give --lengths such as 1024,2048")
        if any(not 0 <= depth <= 100 for depth in self.depths or ()):
            raise InputError(
                "a depth outside 0 to 100 percent", "give --depths such as 0,25,50,75,100"
            )

    def refuse_grid(self, task: str) -> None:
        """Raise InputError when lengths or depths were given to a task without a grid."""
        if self.lengths is not None or self.depths is not None:
            raise InputError(
                f"task {task} has no grid of lengths and depths",
                "leave out --lengths and --depths, or use --task niah or kv",
            )


def parse_numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """ "0,25,50" -> (0.0, 25.0, 50.0), without repeats; None stays None. Raises InputError."""
    if text is None:
        return None
    try:
        numbers = tuple(dict.fromkeys(float(part) for part in text.split(",")))
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError
    except ValueError:
        raise InputError(
            f"{option} {text} is no list of numbers", "give numbers with commas, such as 1,2"
        ) from None
    return numbers


def parse_lengths(text: str | None, option: str) -> tuple[int, ...] | None:
    """ "1024,2048" -> (1024, 2048). Raises InputError for anything but whole numbers."""
    numbers = parse_numbers(text, option)
    if numbers is None:
        return None
    if any(number != number // 1 for number in numbers):
        raise InputError(
            f"{option} {text} are not whole numbers of tokens", "give such as 1024,2048"
        )
    return tuple(int(number) for number in numbers)
