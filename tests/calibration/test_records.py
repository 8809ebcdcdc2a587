"""Made-up records: of every kind, full of digits, the same for the same seed, never in tests."""

from __future__ import annotations

import re
from itertools import islice

from commvq_core.calibration.builtin import builtin_documents
from commvq_core.calibration.records import records


def is_records(text: str) -> bool:
    return len(re.findall(r"\d", text)) > len(text) / 8


def test_the_seed_decides_them_and_the_length_is_kept() -> None:
    assert records(3, 500) == records(3, 500)
    assert records(3, 500) != records(4, 500)
    assert 500 <= len(records(3, 500)) < 700


def test_all_kinds_of_lines_occur() -> None:
    lines = records(0, 20_000).splitlines()
    for pattern in (
        r'\{"id": \d+, "name"',
        r"20\d\d-\d\d-\d\d \d\d:",
        r"The \w+ number of \w+ is \d+\.",
        r"\w+,\d+,\d+,[\d.]+",
        r"\w+_\w+ = \d+",
        r"Invoice \d+ of",
        r"[0-9a-f]{16}  \w+\.",
        r"Call \w+ \w+ at \+\d",
    ):
        assert sum(re.match(pattern, line) is not None for line in lines) > len(lines) / 30


def test_training_text_holds_a_tenth_of_them_and_held_out_text_none() -> None:
    texts = list(islice(builtin_documents("train"), 120))
    share = sum(len(text) for text in texts if is_records(text)) / sum(map(len, texts))
    assert 0.06 < share < 0.16
    assert not any(is_records(text) for text in islice(builtin_documents("heldout"), 80))
