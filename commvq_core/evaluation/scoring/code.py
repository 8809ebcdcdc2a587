"""How alike two lines of code are."""

from __future__ import annotations

from commvq_core.evaluation.scoring.subsequence import common_length

_NO_CODE = ("`", "#", "//")


def code_similarity(prediction: str, answer: str) -> float:
    """Similarity of the prediction's first line of code to the answer (LongBench).

    The first line without a backtick, # or // counts, and nothing where there is none. Similarity
    is one minus insertions and deletions over the characters of both, rounded to a percent, as
    fuzzywuzzy's ratio is with its Levenshtein package.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _NO_CODE)), "")
    return round(100 * similarity(line, answer)) / 100


def similarity(first: str, second: str) -> float:
    """Twice the longest common subsequence over the length of both; 1 for two empty texts."""
    if not first and not second:
        return 1.0
    return 2 * common_length(first, second) / (len(first) + len(second))
