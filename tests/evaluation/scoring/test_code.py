"""Code similarity: which line counts, and the ratio against rapidfuzz."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz import fuzz

from commvq_core.evaluation.scoring.code import code_similarity, similarity

lines = st.text("abcd() =.é", max_size=30)


@given(lines, lines)
def test_the_ratio_is_rapidfuzzs(first: str, second: str) -> None:
    assert 100 * similarity(first, second) == pytest.approx(fuzz.ratio(first, second))


def test_a_hand_worked_ratio() -> None:
    # "retrn x" is one insertion away: 1 - 1 / (7 + 8), and a percent is the unit.
    assert similarity("retrn x", "return x") == pytest.approx(14 / 15)
    assert code_similarity("retrn x", "return x") == 0.93


@pytest.mark.parametrize(
    "prediction",
    ["return x\nprint(y)", "\n\nreturn x", "```python\n# comes next\n// or here\nreturn x\n```"],
)
def test_the_first_line_of_code_counts(prediction: str) -> None:
    assert code_similarity(prediction, "return x") == 1


def test_an_answer_without_code_scores_nothing() -> None:
    assert code_similarity("# nothing", "return x") == code_similarity("", "return x") == 0
