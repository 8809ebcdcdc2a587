"""published_attend against attention over decoded, rotated tokens in float64."""

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
from tests.ops.cases import published

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "op": ops.published_attend,
    "pytorch": reference.published_attend,
}
# Pattern -> its two 0/1 codes (paper section 4.2).
BITS = np.array([(1, 0), (0, 1), (1, 1), (0, 0)])


def norms(codes: Tensor) -> np.ndarray:
    """[batch, tokens] float64, from the first two bytes of every row."""
    return np.ascontiguousarray(codes[:, 0, :, :2].numpy()).view(np.float16)[..., 0].astype(float)


def keys_and_bits(arguments: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rotated keys [batch, heads, tokens, dim], and 0/1 codes times norms [batch, tokens, 2 *
    groups], float64."""
    query, key_codes, words, value_codes, groups, turns, steps, _ = arguments
    batch, heads, _, dim = query.shape
    rounds, tokens = words.shape[1], key_codes.shape[2]
    parts = words.double().numpy().transpose(0, 1, 2, 4, 3, 5).reshape(heads, rounds, 64, 2, -1)
    book = parts[..., 0, : dim // 2] + 1j * parts[..., 1, : dim // 2]
    keys = np.zeros((batch, heads, tokens, dim // 2), np.complex128)
    ones = np.zeros((batch, tokens, 2 * groups))
    for row, token in np.ndindex(batch, tokens):
        packed = key_codes[row, 0, token, 2:].numpy()
        codes = naive.unpack_codes(packed, 6, heads * rounds * 2).reshape(heads, rounds, 2)
        for head, r in np.ndindex(heads, rounds):
            a, b = codes[head, r]
            keys[row, head, token] += book[head, r, a] + 1j * book[head, r, b]
        packed = value_codes[row, 0, token, 2:].numpy()
        ones[row, token] = BITS[naive.unpack_codes(packed, 2, groups)].ravel()
    at, pairs = np.arange(tokens), turns.shape[3]
    start, step = turns.double().numpy(), steps.double().numpy()
    turn = (start[:, :, 0] + 1j * start[:, :, 1])[:, at // 32]
    turn = turn * (step[:, 0] + 1j * step[:, 1])[at % 32]
    keys[..., :pairs] *= turn[:, None]
    keys *= norms(key_codes)[:, None, :, None]
    flat = np.stack((keys.real, keys.imag), axis=-1).reshape(batch, heads, tokens, dim)
    return flat, ones * norms(value_codes)[..., None]


def by_definition(arguments: tuple[Any, ...], stop: int, softcap: float) -> Any:
    """Sums over weights [batch, heads, queries, 2 * groups] and log-sum-exp."""
    query, first = arguments[0], arguments[-1]
    keys, ones = keys_and_bits(arguments)
    output = np.zeros((*query.shape[:3], ones.shape[-1]))
    sums = np.full(query.shape[:3], -np.inf)
    for row, head, q in np.ndindex(*query.shape[:3]):
        seen = slice(int(first[row]), stop)
        scores = keys[row, head, seen] @ query[row, head, q].double().numpy()
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if len(scores):
            weights = np.exp(scores - scores.max())
            output[row, head, q] = weights @ ones[row, seen] / weights.sum()
            sums[row, head, q] = scores.max() + np.log(weights.sum())
    return output, sums


def in_bfloat16(arguments: tuple[Any, ...], stop: int, softcap: float) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's plain low precision, scores and weights summed in float32."""
    query, first = arguments[0].bfloat16(), arguments[-1]
    keys, ones = (torch.from_numpy(x).bfloat16() for x in keys_and_bits(arguments))
    scores = (query @ keys.transpose(-1, -2)).float()
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    tokens = torch.arange(keys.shape[2])
    seen = (tokens < stop) & (tokens >= first[:, None])
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    weights = scores.softmax(dim=-1).nan_to_num()
    return (weights.bfloat16() @ ones[:, None]).double(), scores.double().logsumexp(dim=-1)


CASES = {
    "one token": {"tokens": 1, "batch": 1},
    "no whole block": {"tokens": 63},
    "blocks": {"tokens": 128},
    "several chunks": {"tokens": 2500, "batch": 1, "heads": 1},
    "partial rotation": {"rotary": 6},
    "no rotation": {"rotary": 0},
    "one round": {"rounds": 1, "heads": 3},
    "odd head": {"dim": 80, "rotary": 80, "rounds": 5, "groups": 37, "heads": 3},
    "wide head": {"dim": 256, "rotary": 64, "rounds": 21, "batch": 1, "heads": 1},
    "Llama 3.1 8B": {"dim": 128, "rounds": 11, "groups": 512, "rotary": 128, "heads": 8},
    "SmolLM2": {"dim": 64, "rounds": 5, "groups": 96, "rotary": 64, "heads": 3},
    "two bits": {"dim": 64, "rounds": 11, "groups": 192, "rotary": 64, "heads": 3},
    "many queries": {"queries": 70},
    "rows of their own": {"rows": 2},
    "large logits": {"spread": 60.0},
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_it_is_attention_over_the_decoded_tokens(name: str, case: str, softcap: float) -> None:
    arguments = published(**CASES[case])
    stop = arguments[1].shape[2]
    weighted, peak, total = IMPLEMENTATIONS[name](*arguments, stop, softcap)
    got = weighted / total.clamp_min(1e-30)[..., None]
    want, want_sums = by_definition(arguments, stop, softcap)
    low, low_sums = in_bfloat16(arguments, stop, softcap)
    sums = (peak + total.log()).double().numpy()
    seen = np.isfinite(want_sums)
    assert np.array_equal(seen, np.isfinite(sums))
    if seen.any():
        # At most twice the error of plain low precision, and a few units of float32.
        worst = np.abs(low.numpy()[seen] - want[seen]).max()
        assert np.abs(got.double().numpy()[seen] - want[seen]).max() <= 2 * worst + 1e-6
        worst = np.abs(low_sums.numpy()[seen] - want_sums[seen]).max()
        assert np.abs(sums[seen] - want_sums[seen]).max() <= 2 * worst + 1e-6


def test_sums_times_a_codebook_are_sums_of_values() -> None:
    """The promise that lets no value be decoded: softmax(scores) V = sums C / total."""
    arguments = published(tokens=300)
    sums, _, total = ops.published_attend(*arguments, 300)
    book = np.random.default_rng(3).normal(size=(20, 16))
    keys, ones = keys_and_bits(arguments)
    values = ones @ book
    for row, head, q in np.ndindex(*arguments[0].shape[:3]):
        seen = slice(int(arguments[-1][row]), 300)
        query = arguments[0][row, head, q].double().numpy()
        want = naive.softmax_attention(query, keys[row, head, seen], values[row, seen], 1.0)
        got = sums[row, head, q].double().numpy() @ book / float(total[row, head, q])
        np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(values).max())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_that_see_nothing(name: str) -> None:
    arguments = published(batch=3, tokens=20)  # the third row begins at token 14
    for stop in (0, 7):
        weighted, peak, total = IMPLEMENTATIONS[name](*arguments, stop, 0.0)
        blind = 3 if stop == 0 else 2
        rows = slice(3 - blind, 3)
        assert not weighted[rows].any()
        assert not total[rows].any()
        assert bool((peak[rows] == -torch.inf).all())
        assert bool(total[: 3 - blind].bool().all())


def test_a_view_of_a_larger_store_serves() -> None:
    arguments = list(published(tokens=150))
    whole = ops.published_attend(*arguments, 100, 0.0)
    for index in (1, 3):
        arguments[index] = arguments[index][:, :, :100]
        assert not arguments[index].is_contiguous()
    for a, b in zip(whole, ops.published_attend(*arguments, 100, 0.0), strict=True):
        assert torch.equal(a, b)


def test_a_peak_that_rises_late_lowers_what_was_collected() -> None:
    """In the same chunk: 2,048 rows of queries leave room for 512 tokens at once."""
    arguments = list(published(tokens=1000, batch=1, heads=8, queries=256, rounds=1, groups=4))
    arguments[1][:, :, :600, :2] = torch.tensor([2.0**-6], dtype=torch.float16).view(torch.uint8)
    got = ops.published_attend(*arguments, 1000)
    want = reference.published_attend(*arguments, 1000, 0.0)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


def test_threads_change_nothing() -> None:
    arguments, threads = published(tokens=5000), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.published_attend(*arguments, 5000)
        torch.set_num_threads(4)
        four = ops.published_attend(*arguments, 5000)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


@pytest.mark.parametrize(
    ("index", "value", "error"),
    [
        (0, torch.zeros(2, 2, 300, 16), ValueError),
        (0, torch.zeros(2, 2, 3, 15), ValueError),
        (0, torch.zeros(2, 2, 3, 16).double(), TypeError),
        (1, torch.zeros(2, 1, 50, 11).byte(), ValueError),
        (1, torch.zeros(2, 2, 100, 11).byte(), ValueError),
        (1, torch.zeros(2, 1, 100, 10).byte(), ValueError),
        (2, torch.zeros(2, 3, 64, 2, 2, 32).short(), ValueError),
        (2, torch.zeros(2, 3, 64, 1, 2, 32), TypeError),
        (3, torch.zeros(2, 1, 100, 6).byte(), ValueError),
        (4, 0, ValueError),
        (4, 12.0, TypeError),
        (5, torch.zeros(1, 1, 2, 8), ValueError),
        (6, torch.zeros(64, 2, 8), ValueError),
        (7, torch.zeros(3).long(), ValueError),
        (7, torch.zeros(2), TypeError),
    ],
)
def test_wrong_arguments_are_named(index: int, value: Any, error: type[Exception]) -> None:
    arguments = list(published())
    arguments[index] = value
    with pytest.raises(error):
        ops.published_attend(*arguments, 100)


def test_the_raw_operator_refuses_what_would_read_beyond_memory() -> None:
    arguments = published()
    if ops.native_available():
        changes = (
            (1, arguments[1][:, :, :50]),
            (2, arguments[2][:, :, :32].contiguous()),
            (3, arguments[3][..., :-1]),
            (4, 60),
            (5, arguments[5][:, :1]),
        )
        for index, value in changes:
            wrong = [*arguments[:index], value, *arguments[index + 1 :]]
            with pytest.raises(RuntimeError, match="published_attend"):
                torch.ops.commvq.published_attend(*wrong, 100, 0.0)
