"""RULER's two scores: how many of the right answers stand in a text (Hsieh et al. 2024)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that the prediction holds, upper or lower case, 0 to 1."""
    return sum(_holds(prediction, answer) for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction holds any of the answers."""
    return max(_holds(prediction, answer) for answer in answers)


def _holds(prediction: str, answer: str) -> float:
    # Control characters are line ends there; an answer that holds one is never found.
    return float(answer.lower() in _CONTROL.sub("\n", prediction).strip().lower())
