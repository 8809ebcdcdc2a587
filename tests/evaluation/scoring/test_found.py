"""Answers that are one thing to be found, worked by hand."""

from __future__ import annotations

import pytest

from commvq_core.evaluation.scoring.found import (
    first_digits,
    first_value,
    has_name,
    has_word,
    last_integer,
    leading_values,
)


def test_the_first_digits_decide() -> None:
    assert first_digits(" 01234. Not 5.", "01234") == 1
    assert first_digits("5, then 01234", "01234") == 0
    assert first_digits("1234", "01234") == first_digits("none", "0") == first_digits("", "0") == 0


def test_the_first_value_decides() -> None:
    assert first_value(" 12.5 or 3", 12.5) == first_value("It is 12.", 12) == 1
    assert first_value("12.5", 12) == first_value("no", 12) == first_value("3 or 12", 12) == 0


def test_words_end_at_punctuation() -> None:
    assert has_word('"ab-cd-ef".', "ab-cd-ef") == 1
    assert has_word("ab-cd-efg", "ab-cd-ef") == 0
    assert has_name("it is Hermione, surely", "HERMIONE") == 1
    assert has_name("Ron", "HERMIONE") == 0


@pytest.mark.parametrize(
    ("prediction", "score"),
    [(" -7", 1), ("f(3) = `-7`.", 1), ("-7 or 8", 0), ("7", 0), ("", 0), ("minus", 0)],
)
def test_the_last_word_is_a_returned_value(prediction: str, score: float) -> None:
    assert last_integer(prediction, -7) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("[2, 7, 6, 9]", 1),
        ("2 7 5 9", 2 / 4),
        ("2, 7", 2 / 4),
        ("3, 7, 6, 9", 0),
        ("", 0),
        ("2 7 6 9 and 100", 1),
    ],
)
def test_values_count_until_the_first_that_is_wrong(prediction: str, score: float) -> None:
    assert leading_values(prediction, [2, 7, 6, 9]) == pytest.approx(score)


def test_negative_values_are_never_right() -> None:
    assert leading_values("2, -1", [2, -1]) == pytest.approx(1 / 2)
