"""Answers that are one thing to be found: a word, a number, or a row of numbers (InfiniteBench)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BREAKS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))
_CODE_BREAKS = str.maketrans(dict.fromkeys("\n.`'\":", " "))


def first_digits(prediction: str, answer: str) -> float:
    """1 where the first run of digits is the answer, leading zeros and all."""
    found = re.search("[0-9]+", prediction)
    return float(found is not None and found.group() == answer)


def first_value(prediction: str, answer: float) -> float:
    """1 where the first number, whole or decimal and without its sign, equals the answer."""
    found = re.search(r"\d+\.\d+|\d+", prediction)
    return float(found is not None and float(found.group()) == answer)


def has_word(prediction: str, answer: str) -> float:
    """1 where the answer is one of the words, which end at blanks and punctuation."""
    return float(answer in prediction.translate(_BREAKS).split())


def has_name(prediction: str, answer: str) -> float:
    """`has_word`, with the prediction in capitals, as scripts write names."""
    words = [word.upper() for word in prediction.translate(_BREAKS).split()]
    return float(answer in words)


def last_integer(prediction: str, answer: int) -> float:
    """1 where the last word is the whole number `answer`."""
    words = prediction.translate(_CODE_BREAKS).split()
    try:
        return float(bool(words) and int(words[-1]) == answer)
    except ValueError:
        return 0.0


def leading_values(prediction: str, answer: Sequence[int]) -> float:
    """The share of the answer that the runs of digits give before the first that is wrong.

    Signs are not read, so that a negative value is always wrong, as it is in the benchmark.
    """
    right = 0
    for found, wanted in zip(re.findall("[0-9]+", prediction), answer, strict=False):
        if int(found) != wanted:
            break
        right += 1
    return right / len(answer)
