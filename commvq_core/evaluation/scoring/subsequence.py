"""The longest common subsequence, on which ROUGE-L and code similarity rest."""

from __future__ import annotations

from collections.abc import Sequence


def common_pairs(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """One longest common subsequence, as index pairs (in `first`, in `second`), in order.

    Of several it is the one found from the end when ties drop the last item of `second`, on which
    ROUGE scores depend where sentences are many.
    """
    table = _lengths(first, second)
    pairs: list[tuple[int, int]] = []
    row, column = len(first), len(second)
    while row and column:
        if first[row - 1] == second[column - 1]:
            row, column = row - 1, column - 1
            pairs.append((row, column))
        elif table[row - 1][column] > table[row][column - 1]:
            row -= 1
        else:
            column -= 1
    return pairs[::-1]


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """How long the longest common subsequence is."""
    return _lengths(first, second)[-1][-1]


def _lengths(first: Sequence[str], second: Sequence[str]) -> list[list[int]]:
    """[i][j]: the length for the first i items of `first` and the first j of `second`."""
    table = [[0] * (len(second) + 1)]
    for item in first:
        above = table[-1]
        row = [0]
        for column, other in enumerate(second):
            best = above[column] + 1 if item == other else max(above[column + 1], row[column])
            row.append(best)
        table.append(row)
    return table
