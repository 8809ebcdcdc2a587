"""The blocks that attend over the published preset's codes, run on the host, thread by thread."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.hosted import compiled, pointers
from tests.cuda.plain import assert_float32
from tests.ops.cases import published
from tests.ops.test_published_attend import CASES


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("host_published.cpp", tmp_path_factory.mktemp("cuda"))


def attend(
    library: ctypes.CDLL,
    arguments: tuple[Any, ...],
    stop: int,
    softcap: float = 0.0,
    *,
    splits: int = 2,
    backwards: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """ops.published_attend as its CUDA kernels work it out."""
    query, keys, words, values, groups, turns, steps, first = arguments
    batch, heads, queries, dim = query.shape
    sizes = (
        *(batch, heads, queries, dim, turns.shape[3], keys.shape[2], stop, *turns.shape[:2]),
        *(words.shape[1], words.shape[3], groups, keys.shape[3], values.shape[3]),
        *(splits, int(backwards)),
    )
    sums = torch.full((batch, heads, queries, 2 * groups), torch.nan)
    peak = torch.full((batch, heads, queries), torch.nan)
    total = torch.full_like(peak, torch.nan)
    failed = library.commvq_published(
        (ctypes.c_int64 * len(sizes))(*sizes),
        pointers(query, keys, words, values, turns, steps, first, sums, peak, total),
        ctypes.c_float(softcap),
    )
    assert failed == 0
    return sums, peak, total


def assert_right(
    library: ctypes.CDLL,
    arguments: tuple[Any, ...],
    stop: int,
    softcap: float = 0.0,
    **options: Any,
) -> None:
    """Against float64 and against the operator in PyTorch."""
    assert_float32(attend(library, arguments, stop, softcap, **options), arguments, stop, softcap)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_it_is_attention_over_the_decoded_tokens(
    library: ctypes.CDLL, case: str, softcap: float
) -> None:
    arguments = published(**CASES[case])
    assert_right(library, arguments, arguments[1].shape[2], softcap)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 511, 512, 513, 1100])
def test_any_number_of_tokens_and_splits(library: ctypes.CDLL, tokens: int) -> None:
    arguments = published(tokens=tokens, batch=2, heads=1)
    for splits in (1, 2, 5):
        assert_right(library, arguments, tokens, splits=splits)


@pytest.mark.parametrize("queries", [1, 4, 5, 8, 9, 12, 256])
def test_every_number_of_rows(library: ctypes.CDLL, queries: int) -> None:
    arguments = published(queries=queries, tokens=70, heads=2)
    assert_right(library, arguments, 70)


@pytest.mark.parametrize("groups", [1, 3, 4, 5, 257, 300])
@pytest.mark.parametrize("dim", [2, 62, 64, 66, 160])
def test_every_width(library: ctypes.CDLL, dim: int, groups: int) -> None:
    """Heads that fill panels or not, and more groups than a block has threads."""
    arguments = published(
        dim=dim, rotary=dim // 4 * 2, groups=groups, tokens=40, batch=1, heads=3, rounds=3,
        queries=6,
    )  # fmt: skip
    assert_right(library, arguments, 40)


def test_a_peak_that_rises_late_lowers_what_was_collected(library: ctypes.CDLL) -> None:
    """Within a split, and from split to split."""
    arguments = published(tokens=1500, batch=1, heads=1, groups=9, spread=4.0)
    arguments[1][:, :, :1000, :2] = torch.tensor([2.0**-6], dtype=torch.float16).view(torch.uint8)
    for splits in (1, 3):
        assert_right(library, arguments, 1500, splits=splits)


def test_norms_of_any_half_are_read(library: ctypes.CDLL) -> None:
    """Negative, zero, subnormal and large ones."""
    arguments = published(tokens=64, batch=1, heads=1, spread=1e-3)
    norms = torch.tensor([-1.5, 0.0, 2.0**-24, 3e-6, 60000.0, 1.0], dtype=torch.float16)
    own = norms[torch.arange(64) % 6].view(torch.uint8).view(64, 2)
    arguments[1][0, 0, :, :2] = own
    arguments[3][0, 0, :, :2] = own
    assert_right(library, arguments, 64)


def test_hidden_tokens_may_hold_anything(library: ctypes.CDLL) -> None:
    arguments = published(batch=3, tokens=100)
    arguments[-1][:] = torch.tensor([0, 45, 100])
    want = attend(library, arguments, 90)
    nothing = torch.tensor([torch.nan], dtype=torch.float16).view(torch.uint8)
    for index in (1, 3):
        arguments[index][1, :, :45, :2] = nothing
        arguments[index][:, :, 90:, :2] = nothing
        arguments[index][2, :, :, :2] = nothing
    got = attend(library, arguments, 90)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert not got[0][2].any()
    assert bool((got[1][2] == -torch.inf).all())


def test_nothing_is_attended_to_before_the_first_token(library: ctypes.CDLL) -> None:
    sums, peak, total = attend(library, published(), 0)
    assert not sums.any()
    assert not total.any()
    assert bool((peak == -torch.inf).all())


@pytest.mark.parametrize("queries", [3, 20])
def test_the_order_of_threads_and_blocks_changes_nothing(
    library: ctypes.CDLL, queries: int
) -> None:
    arguments = published(tokens=700, queries=queries, dim=80, rotary=80, groups=37, heads=2)
    one = attend(library, arguments, 690, 5.0, splits=3)
    other = attend(library, arguments, 690, 5.0, splits=3, backwards=True)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
