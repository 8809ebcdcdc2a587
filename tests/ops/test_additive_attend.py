"""additive_attend against attention over decoded, rotated tokens in float64."""

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
from tests.ops.cases import attention

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "op": ops.additive_attend,
    "pytorch": reference.additive_attend,
}


def decoded(codes: Tensor, books: Tensor, scales: Tensor) -> np.ndarray:
    """[batch, heads, tokens, dim] float64, one codeword after the other."""
    heads, subs, stages, _, sub_dim = books.shape
    batch, _, tokens, _ = codes.shape
    out = np.zeros((batch, heads, tokens, subs, sub_dim))
    table = books.double().numpy() * scales.double().numpy()[..., None, None]
    for head in range(heads):
        for sub in range(subs):
            for stage in range(stages):
                chosen = codes[:, head, :, sub * stages + stage].numpy()
                out[:, head, :, sub] += table[head, sub, stage][chosen]
    return out.reshape(batch, heads, tokens, subs * sub_dim)


def keys_and_values(arguments: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rotated keys and values [1 or batch, heads, tokens, dim] float64."""
    _, kc, kb, gains, means, _, vc, vb, vs, turns, steps, _ = arguments
    keys = decoded(kc, kb, gains) + means.double().numpy()[:, None]
    rotary, tokens = 2 * turns.shape[3], np.arange(kc.shape[2])
    start, step = turns.double().numpy(), steps.double().numpy()
    turn = (start[:, :, 0] + 1j * start[:, :, 1])[:, tokens // 32]
    turn = turn * (step[:, 0] + 1j * step[:, 1])[tokens % 32]
    pairs = naive.complex_pairs(keys[..., :rotary]) * turn[:, None]
    keys[..., :rotary:2], keys[..., 1:rotary:2] = pairs.real, pairs.imag
    return keys, decoded(vc, vb, vs)


def by_definition(arguments: tuple[Any, ...], stop: int, softcap: float) -> Any:
    """Output [batch, heads, queries, dim] and log-sum-exp [batch, heads, queries]."""
    query, first = arguments[0], arguments[-1]
    keys, values = keys_and_values(arguments)
    output = np.zeros(query.shape)
    sums = np.full(query.shape[:3], -np.inf)
    for row, head, q in np.ndindex(*query.shape[:3]):
        seen = slice(int(first[row]), stop)
        scores = keys[row, head, seen] @ query[row, head, q].double().numpy()
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if len(scores):
            weights = np.exp(scores - scores.max())
            output[row, head, q] = weights @ values[row, head, seen] / weights.sum()
            sums[row, head, q] = scores.max() + np.log(weights.sum())
    return output, sums


def in_bfloat16(arguments: tuple[Any, ...], stop: int, softcap: float) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's plain low precision, scores and weights summed in float32."""
    query, first = arguments[0].bfloat16(), arguments[-1]
    keys, values = (torch.from_numpy(x).bfloat16() for x in keys_and_values(arguments))
    scores = (query @ keys.transpose(-1, -2)).float()
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    tokens = torch.arange(keys.shape[2])
    seen = (tokens < stop) & (tokens >= first[:, None])
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    weights = scores.softmax(dim=-1).nan_to_num()
    return (weights.bfloat16() @ values).double(), scores.double().logsumexp(dim=-1)


CASES = {
    "one token": {"tokens": 1, "batch": 1},
    "no whole block": {"tokens": 63},
    "blocks": {"tokens": 128},
    "several parts": {"tokens": 4500, "batch": 1},
    "partial rotation": {"rotary": 6},
    "no rotation": {"rotary": 0},
    "narrow sub-vectors": {"dim": 40, "subs": 5, "rotary": 40},
    "odd head": {"dim": 80, "subs": 2, "rotary": 80, "stages": 5},
    "Llama 3.1 8B": {"dim": 128, "subs": 2, "stages": 8, "rotary": 128, "heads": 2},
    "SmolLM2": {"dim": 64, "subs": 1, "stages": 8, "rotary": 64, "heads": 3},
    "two bits": {"dim": 64, "stages": 16, "rotary": 64},
    "one stage": {"dim": 64, "stages": 1, "rotary": 64},
    "a byte for each stage": {"dim": 128, "subs": 2, "stages": 5, "rotary": 128, "group": 1},
    "a byte for four stages": {"dim": 128, "subs": 2, "stages": 7, "rotary": 128, "group": 4},
    "three bytes for four each": {"dim": 64, "stages": 10, "rotary": 64, "group": 4},
    "seven rows": {"dim": 64, "rotary": 64, "queries": 7},
    "head of 256": {"dim": 256, "subs": 4, "rotary": 256, "batch": 1, "heads": 1},
    "rows of their own": {"rows": 2},
    "large logits": {"spread": 60.0},
}
# So many that tokens are decoded once for all of them.
CASES |= {f"{name}, many queries": {**case, "queries": 41} for name, case in CASES.items()}
CASES |= {
    "several pieces of queries": {"queries": 1100, "batch": 1, "heads": 1, "tokens": 300},
    "between few and many": {"queries": 33},
    "the most that count as few": {"queries": 32, "tokens": 700},
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_it_is_attention_over_the_decoded_tokens(name: str, case: str, softcap: float) -> None:
    arguments = attention(**CASES[case])
    tokens = arguments[1].shape[2]
    for stop in {tokens, max(1, tokens - 3)}:
        weighted, peak, total = IMPLEMENTATIONS[name](*arguments, stop, softcap)
        want, sums = by_definition(arguments, stop, softcap)
        got = (weighted / total.clamp_min(1e-30)[..., None]).numpy()
        low, low_sums = in_bfloat16(arguments, stop, softcap)
        share = 2.0 if name == "op" else 0.05  # PyTorch's is float32
        assert np.abs(got - want).max() <= share * np.abs(low.numpy() - want).max()
        seen = np.isfinite(sums)
        error = np.abs((peak + total.log()).numpy() - sums)[seen]
        allowed = np.abs(low_sums.numpy() - sums)[seen]
        assert error.max(initial=0.0) <= share * allowed.max(initial=0.0) + 1e-6


@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_that_see_nothing(name: str, queries: int) -> None:
    # The third row begins at token 14.
    arguments = attention(batch=3, tokens=20, queries=queries)
    for stop in (0, 7):
        weighted, peak, total = IMPLEMENTATIONS[name](*arguments, stop, 0.0)
        blind = 3 if stop == 0 else 2
        rows = slice(3 - blind, 3)
        assert not weighted[rows].any()
        assert not total[rows].any()
        assert bool((peak[rows] == -torch.inf).all())
        assert bool(total[: 3 - blind].bool().all())


@pytest.mark.parametrize("queries", [3, 40])
def test_a_view_of_a_larger_store_serves(queries: int) -> None:
    arguments = list(attention(tokens=150, queries=queries))
    whole = ops.additive_attend(*arguments, 100, 0.0)
    for index in (1, 6):
        arguments[index] = arguments[index][:, :, :100]
        assert not arguments[index].is_contiguous()
    for a, b in zip(whole, ops.additive_attend(*arguments, 100, 0.0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("queries", [3, 40, 1100])
def test_threads_change_nothing(queries: int) -> None:
    arguments, threads = attention(tokens=5000, queries=queries), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.additive_attend(*arguments, 5000)
        torch.set_num_threads(4)
        four = ops.additive_attend(*arguments, 5000)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


@pytest.mark.parametrize(
    ("index", "value", "error"),
    [
        (0, torch.zeros(2, 2, 0, 16), ValueError),
        (0, torch.zeros(2, 2, 3, 16).double(), TypeError),
        (1, torch.zeros(2, 2, 50, 3).byte(), ValueError),
        (2, torch.zeros(2, 1, 3, 16, 16).char(), ValueError),
        (3, torch.zeros(2, 3).byte(), ValueError),
        (3, torch.zeros(2, 1, 3), TypeError),
        (4, torch.zeros(2, 8).short(), ValueError),
        (5, 3, ValueError),
        (6, torch.zeros(2, 2, 100, 4).byte(), ValueError),
        (8, torch.zeros(2, 3), ValueError),
        (9, torch.zeros(1, 1, 2, 8), ValueError),
        (10, torch.zeros(64, 2, 8), ValueError),
        (11, torch.zeros(3).long(), ValueError),
        (11, torch.zeros(2), TypeError),
    ],
)
def test_wrong_arguments_are_named(index: int, value: Any, error: type[Exception]) -> None:
    arguments = list(attention())
    arguments[index] = value
    with pytest.raises(error):
        ops.additive_attend(*arguments, 100)


def test_queries_are_counted_against_what_a_device_takes() -> None:
    most = ops.most_rows(torch.device("cpu"))
    assert most >= 256
    arguments = list(attention())
    # Without memory for as many rows: expanded.
    arguments[0] = arguments[0][:, :, :1].expand(-1, -1, most + 1, -1)
    with pytest.raises(ValueError, match=f"1 to {most} queries"):
        ops.additive_attend(*arguments, 100)


def test_the_raw_operator_refuses_what_would_read_beyond_memory() -> None:
    arguments = attention()
    if ops.native_available():
        for index, value in ((1, arguments[1][:, :, :50]), (9, arguments[9][:, :1])):
            wrong = [*arguments[:index], value, *arguments[index + 1 :]]
            with pytest.raises(RuntimeError, match="additive_attend"):
                torch.ops.commvq.additive_attend(*wrong, 100, 0.0)
