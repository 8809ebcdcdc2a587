"""Answers that are right or wrong: classes, and numbers among others."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"\d+")


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the prediction names, if the right one is among them.

    A class whose name is part of the right one's does not count as named (LongBench).
    """
    named = [name for name in classes if name in prediction]
    named = [name for name in named if name == answer or name not in answer]
    return 1 / len(named) if answer in named else 0.0


def share_of_numbers(prediction: str, answer: str) -> float:
    """Of all whole numbers in the prediction, the share that are the answer's first.

    Serves LongBench's counts ("7") and retrieval ("Paragraph 7", "段落7"); 0 without a number.
    """
    wanted = _NUMBER.search(answer)
    numbers = _NUMBER.findall(prediction)
    if wanted is None or not numbers:
        return 0.0
    return numbers.count(wanted.group()) / len(numbers)
