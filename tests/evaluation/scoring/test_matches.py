"""Right or wrong: classes, numbers among others."""

from __future__ import annotations

import pytest

from commvq_core.evaluation.scoring.matches import classification, share_of_numbers

CLASSES = ["Sport", "Food", "Team sport", "Sport club or team"]


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Food", "Food", 1),
        ("It is Food, not Sport", "Food", 1 / 2),
        ("Sport", "Food", 0),
        ("no idea", "Food", 0),
        # "Sport" is named by naming "Sport club or team", and does not count against it.
        ("Sport club or team", "Sport club or team", 1),
        ("Sport club or team", "Sport", 1 / 2),
    ],
)
def test_naming_more_classes_costs(prediction: str, answer: str, score: float) -> None:
    assert classification(prediction, answer, CLASSES) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Paragraph 7", "Paragraph 7", 1),
        ("7 or 17, perhaps 7", "Paragraph 7", 2 / 3),
        ("Paragraph 17", "Paragraph 7", 0),
        ("段落7。", "段落7", 1),
        ("none of them", "7", 0),
        ("", "7", 0),
    ],
)
def test_other_numbers_cost(prediction: str, answer: str, score: float) -> None:
    assert share_of_numbers(prediction, answer) == pytest.approx(score)
