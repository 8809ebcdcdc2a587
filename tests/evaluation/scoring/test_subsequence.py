"""Longest common subsequences, against all subsequences there are."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from commvq_core.evaluation.scoring.subsequence import common_length, common_pairs

short = st.lists(st.sampled_from("abc"), max_size=7)


def subsequences(items: list[str]) -> set[tuple[str, ...]]:
    return {kept for size in range(len(items) + 1) for kept in combinations(items, size)}


@given(short, short)
def test_none_is_longer(first: list[str], second: list[str]) -> None:
    shared = subsequences(first) & subsequences(second)
    pairs = common_pairs(first, second)
    assert len(pairs) == common_length(first, second) == max(map(len, shared))
    assert all(first[i] == second[j] for i, j in pairs)
    assert pairs == sorted(set(pairs))
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)


def test_a_hand_worked_case() -> None:
    assert common_pairs("xcatdown", "ycatlown") == [(1, 1), (2, 2), (3, 3), (5, 5), (6, 6), (7, 7)]
    assert common_length("kitten", "sitting") == 4
