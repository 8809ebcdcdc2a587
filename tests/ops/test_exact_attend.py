"""exact_attend against a softmax over all tokens at once, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.ops import reference
from tests.ops.cases import exact

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "op": ops.exact_attend,
    "pytorch": reference.exact_attend,
}
CASES = {
    "SmolLM2": {"heads": 3, "dim": 64, "tokens": 144},
    "Llama 3.1 8B": {"heads": 8, "queries": 4, "dim": 128, "tokens": 129},
    "one token, no sinks": {"tokens": 1, "sinks": 0},
    "no tokens": {"tokens": 0},
    "no tokens, no sinks": {"tokens": 0, "sinks": 0},
    "odd head": {"dim": 7, "tokens": 45},
    "head of 80": {"dim": 80, "tokens": 33, "queries": 1},
    "several threads": {"batch": 3, "heads": 4, "dim": 128, "tokens": 700},
    "large logits": {"spread": 40.0},
}


def by_definition(arguments: tuple[Tensor, ...], softcap: float) -> np.ndarray:
    """Output [batch, heads, queries, dim]: what was seen before is one token more."""
    query, keys, values, sink_keys, sink_values, weighted, peak, total = (
        x.double().numpy() for x in arguments
    )
    keys = np.concatenate((keys, sink_keys), axis=2)
    values = np.concatenate((values, sink_values), axis=2)
    scores = query @ keys.swapaxes(-1, -2)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    most = np.concatenate((scores, peak[..., None]), axis=-1).max(axis=-1)
    safe = np.where(np.isinf(most), 0.0, most)
    weights, old = np.exp(scores - safe[..., None]), np.exp(peak - safe)
    sums = weighted * old[..., None] + weights @ values
    return sums / np.maximum(total * old + weights.sum(axis=-1), 1e-30)[..., None]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_it_is_one_softmax_over_all_parts(
    name: str, case: str, dtype: torch.dtype, softcap: float
) -> None:
    arguments = exact(dtype=dtype, **CASES[case])
    got = IMPLEMENTATIONS[name](*arguments, softcap).double().numpy()
    want = by_definition(arguments, softcap)
    # Float32 throughout, whatever the keys are: scores of some 40 are off by a few of its units.
    assert np.abs(got - want).max(initial=0.0) <= 2e-5 * max(1.0, np.abs(want).max(initial=0.0))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_that_had_seen_nothing(name: str) -> None:
    for tokens in (0, 20):
        arguments = list(exact(tokens=tokens, sinks=0))
        arguments[5][:, 0], arguments[6][:, 0], arguments[7][:, 0] = 0.0, -torch.inf, 0.0
        got = IMPLEMENTATIONS[name](*arguments, 0.0)
        assert np.allclose(got.numpy(), by_definition(tuple(arguments), 0.0), atol=1e-5)
        assert bool(got[:, 0].any()) == (tokens > 0)


def test_views_of_larger_tensors_serve() -> None:
    arguments = exact(tokens=50)
    want = ops.exact_attend(*arguments)
    larger = [torch.randn(2, 2, 90, 40) for _ in range(2)]
    for one, own in zip(larger, arguments[1:3], strict=True):
        one[:, :, 20:70, :16] = own
    views = [one[:, :, 20:70, :16] for one in larger]
    assert torch.equal(ops.exact_attend(arguments[0], *views, *arguments[3:]), want)


def test_threads_change_nothing() -> None:
    arguments, threads = exact(batch=4, heads=8, dim=128, tokens=700), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.exact_attend(*arguments)
        torch.set_num_threads(4)
        four = ops.exact_attend(*arguments)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, four)


@pytest.mark.parametrize(
    ("index", "value", "error"),
    [
        (0, torch.zeros(2, 3, 16), ValueError),
        (0, torch.zeros(2, 2, 3, 16).double(), TypeError),
        (1, torch.zeros(2, 2, 9, 16), ValueError),
        (1, torch.zeros(2, 2, 10, 16).half(), TypeError),
        (2, torch.zeros(2, 2, 10, 8), ValueError),
        (3, torch.zeros(2, 2, 16), ValueError),
        (4, torch.zeros(1, 2, 4, 16), ValueError),
        (5, torch.zeros(2, 2, 3, 8), ValueError),
        (6, torch.zeros(2, 2, 3, 1), ValueError),
        (7, torch.zeros(2, 2, 3).bfloat16(), TypeError),
    ],
)
def test_wrong_arguments_are_named(index: int, value: Tensor, error: type[Exception]) -> None:
    arguments = list(exact(tokens=10))
    arguments[index] = value
    with pytest.raises(error):
        ops.exact_attend(*arguments)


def test_the_raw_operator_refuses_what_would_read_beyond_memory() -> None:
    arguments = exact(tokens=10)
    if ops.native_available():
        for index in (1, 2, 4, 6):
            wrong = list(arguments)
            wrong[index] = wrong[index][:, :, :-1]
            with pytest.raises(RuntimeError, match="exact_attend"):
                torch.ops.commvq.exact_attend(*wrong, 0.0)
