"""Which option an answer chooses, worked by hand."""

from __future__ import annotations

import pytest

from commvq_core.evaluation.scoring.options import chosen_option, named_option


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("B", 1),
        (" B. a tall man", 1),
        ("Because", 1),  # the first letter alone decides
        ("C. a tall man", 0),
        ("a tall man", 1),
        ("the answer is B", 1),
        ("the answer is: C or B", 0),
        ("the right option is a tall man", 1),
        ("the answer is", 0),
        ("perhaps B or C", 1),
        ("perhaps C or B", 0),
        ("no idea", 0),
        ("", 0),
    ],
)
def test_a_letter_or_the_text_chooses(prediction: str, score: float) -> None:
    assert chosen_option(prediction, "B", "a tall man") == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("B.", 1),
        (" B: run_all", 1),
        ("B", 0),
        ("C.", 0),
        ("The answer is: B", 1),
        ("The error is: `run_all`", 1),
        ("The error is:`run_all`", 1),
        ("the correct option is: B", 1),
        ("the answer is:", 0),
        ("run_all", 0),
        ("", 0),
    ],
)
def test_code_wants_a_letter_with_a_mark_or_a_name(prediction: str, score: float) -> None:
    assert named_option(prediction, "B", "run_all") == score
