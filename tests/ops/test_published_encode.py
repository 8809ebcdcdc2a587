"""published_encode against the nearest of all 4,096 centres, round by round, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.ops import reference
from tests import reference as naive
from tests.ops.cases import rounds as case

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "op": ops.published_encode,
    "pytorch": reference.published_encode,
}


def each_round(x: Tensor, theta: Tensor, codes: Tensor) -> Any:
    """For every head and round: squared distances [tokens, 4096] to what the given codes of the
    rounds before left, and the given code as a place among them."""
    for head in range(len(x)):
        left = naive.complex_pairs(x[head].numpy())
        for r in range(theta.shape[1]):
            book = naive.complex_pairs(theta[head, r].numpy())
            centres = naive.product_centres(book).reshape(64 * 64, -1)
            gap = left[:, None] - centres[None]
            distance = (gap.real**2 + gap.imag**2).sum(axis=-1)
            a, b = codes[head, :, 2 * r].numpy(), codes[head, :, 2 * r + 1].numpy()
            chosen = a.astype(int) * 64 + b
            yield distance, chosen
            left = left - centres[chosen]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("heads", "tokens", "dim", "count"),
    [(1, 1, 2, 1), (2, 3, 16, 4), (1, 131, 40, 2), (3, 5, 64, 5), (1, 16, 128, 11)],
)
def test_each_round_takes_the_nearest_centre(
    name: str, heads: int, tokens: int, dim: int, count: int
) -> None:
    x, theta, tables = case(heads, tokens, dim, count)
    codes = IMPLEMENTATIONS[name](x, theta, tables)
    assert codes.shape == (heads, tokens, 2 * count)
    for distance, chosen in each_round(x, theta, codes):
        own = distance[np.arange(tokens), chosen]
        # Distances of some `dim` are off by a few units of float32.
        assert (own <= distance.min(axis=1) + 1e-5 * dim).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_first_of_equally_near_centres_wins(name: str) -> None:
    """Small whole numbers: every distance is exact, and most are tied."""
    x, theta, tables = case(2, 50, 4, 3, whole=True)
    codes = IMPLEMENTATIONS[name](x, theta, tables)
    ties = 0
    for distance, chosen in each_round(x, theta, codes):
        assert np.array_equal(chosen, distance.argmin(axis=1))
        ties += int(((distance == distance.min(axis=1, keepdims=True)).sum(axis=1) > 1).sum())
    assert ties > 100


def test_a_vector_alone_gets_what_it_gets_among_others() -> None:
    x, theta, tables = case(2, 300, 16, 3)
    codes = ops.published_encode(x, theta, tables)
    part = ops.published_encode(x[:, 200:203], theta, tables)
    assert torch.equal(part, codes[:, 200:203])


def test_threads_change_nothing() -> None:
    arguments, threads = case(2, 700, 16, 3), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.published_encode(*arguments)
        torch.set_num_threads(4)
        four = ops.published_encode(*arguments)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, four)


def test_nothing_numbers_that_are_none_and_views() -> None:
    x, theta, tables = case(2, 9, 16, 3)
    whole = ops.published_encode(x, theta, tables)
    assert ops.published_encode(x[:, :0], theta, tables).shape == (2, 0, 6)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    assert torch.equal(ops.published_encode(turned, theta, tables), whole)
    x[0, 4, 3] = torch.nan
    x[1, 4, 3] = torch.inf
    codes = ops.published_encode(x, theta, tables)
    assert int(codes.max()) < 64
    rest = torch.arange(9) != 4
    assert torch.equal(codes[:, rest], whole[:, rest])


@pytest.mark.parametrize(
    ("index", "value", "error"),
    [
        (0, torch.zeros(2, 9, 15), ValueError),
        (0, torch.zeros(9, 16), ValueError),
        (0, torch.zeros(2, 9, 16).double(), TypeError),
        (1, torch.zeros(2, 3, 32, 16), ValueError),
        (1, torch.zeros(1, 3, 64, 16), ValueError),
        (2, torch.zeros(2, 2, 64, 64), ValueError),
        (2, torch.zeros(2, 3, 64, 64).half(), TypeError),
    ],
)
def test_wrong_arguments_are_named(index: int, value: Any, error: type[Exception]) -> None:
    arguments = list(case(2, 9, 16, 3))
    arguments[index] = value
    with pytest.raises(error):
        ops.published_encode(*arguments)


def test_the_raw_operator_refuses_what_would_read_beyond_memory() -> None:
    x, theta, tables = case(2, 9, 16, 3)
    if ops.native_available():
        for wrong in ((x[..., :8], theta, tables), (x, theta, tables[:, :2])):
            with pytest.raises(RuntimeError, match="published_encode"):
                torch.ops.commvq.published_encode(*wrong)
