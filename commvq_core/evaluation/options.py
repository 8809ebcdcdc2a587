"""What a user may ask of an evaluation, whatever the task."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from commvq_core.errors import InputError

BUILTIN = ("builtin",)


# Options that only some tasks have a use for, as the command line calls them.
_SPECIAL = {
    "datasets": "--dataset",
    "lengths": "--lengths",
    "depths": "--depths",
    "subsets": "--subset",
    "data_dir": "--data-dir",
    "chat": "--chat and --no-chat",
    "batch_size": "--batch-size",
    "needles": "--needles",
    "needle": "--needle",
    "question": "--question",
}


@dataclass(frozen=True)
class EvalOptions:
    """Options of every task; None means the task's own default.

    `datasets` and `text_column` as in calibration. `limit` is a number of examples (for grids: a
    cell, for benchmarks: a subset), `max_length` of tokens. `lengths` (tokens) and `depths`
    (percent) span the grid of tasks that have one. `subsets` are parts of a benchmark, `data_dir` a
    folder with its official files, `chat` whether prompts go through the tokenizer's chat template,
    `batch_size` how many examples run side by side where they can. `needles` is how many numbers
    are hidden, `needle` are sentences to hide in their place, and `question` asks for them.
    Raises InputError for values that no task could use.
    """

    datasets: tuple[str, ...] | None = None
    text_column: str = "text"
    limit: int | None = None
    max_length: int | None = None
    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = None
    subsets: tuple[str, ...] | None = None
    data_dir: Path | None = None
    chat: bool | None = None
    batch_size: int | None = None
    needles: int | None = None
    needle: tuple[str, ...] | None = None
    question: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {
            "--limit": self.limit,
            "--max-length": self.max_length,
            "--batch-size": self.batch_size,
            "--needles": self.needles,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise InputError(f"{name} {value}", "give at least 1")
        if any(not text.strip() for text in (*(self.needle or ()), self.question or "none")):
            raise InputError("an empty --needle or --question", "give some text")
        if any(length < 1 for length in self.lengths or ()):
            raise InputError("a length below 1 token", "give --lengths such as 1024,2048")
        if any(not 0 <= depth <= 100 for depth in self.depths or ()):
            raise InputError(
                "a depth outside 0 to 100 percent", "give --depths such as 0,25,50,75,100"
            )
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise InputError(f"--data-dir {self.data_dir} is no folder", "check the path")

    @property
    def texts(self) -> tuple[str, ...]:
        """Where text is read from: `datasets`, or the builtin text."""
        return self.datasets or BUILTIN

    def refuse_useless(self, task: str, uses: Collection[str]) -> None:
        """Raise InputError for an option that was given to a task which does not use it.

        `uses` are the names, as above, of the options in question that it does use.
        """
        for name, option in _SPECIAL.items():
            if name not in uses and getattr(self, name) is not None:
                raise InputError(f"task {task} has no use for {option}", "leave it out")


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
