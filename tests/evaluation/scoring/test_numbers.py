"""The number that an answer states, worked by hand."""

from __future__ import annotations

import pytest

from commvq_core.evaluation.scoring.numbers import last_number, same_number, stated_number


@pytest.mark.parametrize(
    ("text", "stated", "last"),
    [
        ("48 + 24 = 72.\nThe answer is 72.", "72", "72"),
        ("#### 1,234", "1234", "1234"),
        ("so the answer is $18.50, not 20", "18.50", "20"),
        ("The answer is -3. 4 more", "-3", "4"),
        ("The final answer is: 7", "7", "7"),
        ("It is 12 apples", None, "12"),
        ("The answer is five", None, None),
        ("The answer is 10. The answer is 11.", "10", "11"),
        ("#### .5", ".5", ".5"),
        ("#### -$5,000.25.", "-5000.25", "-5000.25"),
        ("", None, None),
    ],
)
def test_numbers_are_found(text: str, stated: str | None, last: str | None) -> None:
    assert stated_number(text) == stated
    assert last_number(text) == last


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ("18", "18", True),
        ("18.00", "18", True),
        ("1234", "1,234", True),
        ("18", "81", False),
        (None, "18", False),
        ("-18", "18", False),
    ],
)
def test_numbers_are_compared_by_value(found: str | None, wanted: str, same: bool) -> None:
    assert same_number(found, wanted) == same
