"""product_estep against the definition: native kernel and PyTorch reference alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from commvq_core import ops
from commvq_core.ops import reference
from tests.ops.cases import product

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "op": ops.product_estep,
    "pytorch": reference.product_estep,
}


def by_definition(
    products: torch.Tensor, norms: torch.Tensor, table: torch.Tensor, temperature: float, sq: bool
) -> tuple[np.ndarray, ...]:
    p, n, t = (x.double().numpy() for x in (products, norms, table))
    count = len(t)
    distance = n[:, None, None] + p[:, :count, None] + p[:, None, count:] + t[None]
    cost = np.maximum(distance, 0) if sq else np.sqrt(np.maximum(distance, 0))
    exponent = -cost / temperature
    share = np.exp(exponent - exponent.max(axis=(1, 2), keepdims=True))
    share /= share.sum(axis=(1, 2), keepdims=True)
    flat = distance.reshape(len(p), -1)
    marginals = np.concatenate((share.sum(axis=2), share.sum(axis=1)), axis=1)
    return share.sum(axis=0), marginals, flat.argmin(axis=1), flat.min(axis=1)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (5, 3), (600, 16), (1100, 33), (40, 64)])
@pytest.mark.parametrize("temperature", [30.0, 0.5, 1e-3])
def test_shares_and_nearest_are_those_of_the_definition(
    name: str, squared: bool, tokens: int, count: int, temperature: float
) -> None:
    arguments = product(tokens, count)
    got = IMPLEMENTATIONS[name](*arguments, temperature, squared)
    want = by_definition(*arguments, temperature, squared)
    # float32 distances of some 20 are off by 2e-6; shares by that over the temperature.
    tolerance = 1e-5 + 4e-5 / temperature
    np.testing.assert_allclose(got[0], want[0], atol=tolerance * 4, rtol=tolerance)
    np.testing.assert_allclose(got[1], want[1], atol=tolerance)
    assert (got[2].numpy() == want[2]).mean() > 0.998
    np.testing.assert_allclose(got[3], np.maximum(want[3], 0), atol=5e-5)


def test_equal_centres_share_and_the_first_is_nearest() -> None:
    for implementation in IMPLEMENTATIONS.values():
        weights, marginals, best, _ = implementation(
            torch.zeros(3, 4), torch.ones(3), torch.ones(2, 2), 0.1, False
        )
        assert torch.allclose(weights, torch.full((2, 2), 0.75, dtype=torch.float64))
        assert torch.allclose(marginals, torch.full((3, 4), 0.5))
        assert best.tolist() == [0, 0, 0]


def test_a_row_alone_gets_what_it_gets_among_others() -> None:
    products, norms, table = product(1300, 20)
    _, marginals, best, least = ops.product_estep(products, norms, table, 0.2)
    part = slice(700, 703)
    alone = ops.product_estep(products[part], norms[part], table, 0.2)
    assert torch.equal(alone[1], marginals[part])
    assert torch.equal(alone[2], best[part])
    assert torch.equal(alone[3], least[part])


def test_threads_change_nothing() -> None:
    arguments, threads = product(3000, 24), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.product_estep(*arguments, 0.3)
        torch.set_num_threads(4)
        four = ops.product_estep(*arguments, 0.3)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


def test_no_rows_and_rows_that_are_not_contiguous() -> None:
    products, norms, table = product(6, 5)
    weights, marginals, best, least = ops.product_estep(products[:0], norms[:0], table, 1.0)
    assert float(weights.abs().sum()) == 0
    assert (len(marginals), len(best), len(least)) == (0, 0, 0)
    wide = torch.cat((products, products), dim=1)[:, :10]
    for a, b in zip(
        ops.product_estep(wide, norms, table.T.contiguous().T, 1.0),
        ops.product_estep(products, norms, table, 1.0),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"products": torch.zeros(3, 9)}, ValueError, "do not fit"),
        ({"norms": torch.zeros(4)}, ValueError, "do not fit"),
        ({"table": torch.zeros(5, 4)}, ValueError, "do not fit"),
        ({"products": torch.zeros(10)}, ValueError, "products must be"),
        ({"products": torch.zeros(3, 10, dtype=torch.float64)}, TypeError, "float32"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"products": torch.zeros(3, 0), "table": torch.zeros(0, 0)}, ValueError, "1 to 1024"),
    ],
)
def test_wrong_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    products, norms, table = product(3, 5)
    given: dict[str, Any] = {
        "products": products,
        "norms": norms,
        "table": table,
        "temperature": 1.0,
        **change,
    }
    with pytest.raises(error, match=message):
        ops.product_estep(**given)


def test_the_raw_operator_refuses_what_would_read_beyond_memory() -> None:
    products, norms, table = product(3, 5)
    if ops.native_available():
        with pytest.raises(RuntimeError, match="product_estep"):
            torch.ops.commvq.product_estep(products, norms[:2], table, 1.0, False)
