"""The operators on a GPU: skipped where there is none, run by recipes/gpu_check.sh where there is.

Tests called small are also run under compute-sanitizer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.ops import reference
from tests import reference as naive
from tests.cuda.plain import assert_better_than_bf16, assert_float32
from tests.cuda.test_attend_blocks import GEOMETRIES
from tests.ops.cases import attention, gaussian, integers, product, published, rounds
from tests.ops.test_additive_attend import CASES
from tests.ops.test_additive_encode import ROUNDING, SHAPES
from tests.ops.test_published_attend import CASES as PUBLISHED_CASES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")


def on_gpu(*arguments: Any) -> tuple[Any, ...]:
    return tuple(x.cuda() if isinstance(x, Tensor) else x for x in arguments)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_small_attention_of_every_case(case: str, softcap: float) -> None:
    arguments = attention(**CASES[case])
    stop = arguments[1].shape[2]
    result = ops.additive_attend(*on_gpu(*arguments), stop, softcap)
    assert_better_than_bf16(result, arguments, stop, softcap)


@pytest.mark.parametrize("queries", [4, 16, 70])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_small_attention_of_every_layout(geometry: tuple[int, int, int], queries: int) -> None:
    dim, subs, stages = geometry
    arguments = attention(
        dim=dim, subs=subs, stages=stages, rotary=dim, queries=queries, tokens=150, spread=2 / dim
    )
    for stop in (150, 131, 1):
        result = ops.additive_attend(*on_gpu(*arguments), stop, 0.0)
        assert_better_than_bf16(result, arguments, stop)


@pytest.mark.parametrize("queries", [1, 8, 9, 17, 64, 256, 2100])
@pytest.mark.parametrize("batch", [1, 3])
def test_long_attention_agrees_with_the_reference(batch: int, queries: int) -> None:
    arguments = on_gpu(
        *attention(
            batch=batch, heads=2, queries=queries, dim=128, subs=2, stages=8, rotary=128,
            tokens=20_000, spread=0.05,
        )
    )  # fmt: skip
    for stop in (20_000, 8191, 64):
        got = ops.additive_attend(*arguments, stop, 0.0)
        want = reference.additive_attend(*arguments, stop, 0.0)
        values = [w / t[..., None] for w, _, t in (got, want)]
        assert float((values[0] - values[1]).abs().max() / values[1].abs().max()) < 5e-3
        sums = [p + t.log() for _, p, t in (got, want)]
        assert float((sums[0] - sums[1]).abs().max()) < 5e-3


@pytest.mark.parametrize("queries", [20, 130])
@pytest.mark.parametrize("dim", [256, 1024])
def test_small_attention_with_wide_heads(dim: int, queries: int) -> None:
    """Of 1,024 dims, no block of many rows fits: those for few rows serve."""
    arguments = attention(
        dim=dim, rotary=64, subs=dim // 64, stages=2, queries=queries, tokens=100, spread=2 / dim
    )
    result = ops.additive_attend(*on_gpu(*arguments), 100, 0.0)
    assert_better_than_bf16(result, arguments, 100)


def test_a_whole_prompts_queries_are_taken() -> None:
    assert ops.most_rows(torch.device("cuda")) >= 2048 * 16


def test_what_is_decoded_in_parts_agrees_with_the_reference() -> None:
    """Five rows of 16 heads of 40,000 tokens: several parts, and units in several launches."""
    arguments = on_gpu(
        *attention(
            batch=5, heads=16, queries=40, dim=128, subs=2, stages=8, rotary=128, tokens=40_000,
            spread=0.05,
        )
    )  # fmt: skip
    got = ops.additive_attend(*arguments, 40_000, 0.0)
    want = reference.additive_attend(*arguments, 40_000, 0.0)
    values = [w / t[..., None] for w, _, t in (got, want)]
    assert float((values[0] - values[1]).abs().max() / values[1].abs().max()) < 5e-3


@pytest.mark.parametrize("queries", [4, 200])
def test_attention_neither_waits_nor_varies(queries: int) -> None:
    arguments = on_gpu(*attention(dim=64, rotary=64, stages=8, queries=queries, tokens=3000))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # what makes the host wait for the GPU raises
    try:
        first = ops.additive_attend(*arguments, 3000, 0.0)
        second = ops.additive_attend(*arguments, 3000, 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("queries", [4, 200])
def test_attention_is_captured_in_a_graph(queries: int) -> None:
    arguments = on_gpu(*attention(dim=64, rotary=64, stages=8, queries=queries, tokens=3000))
    want = ops.additive_attend(*arguments, 3000, 0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.additive_attend(*arguments, 3000, 0.0)
    for tensor in got:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    arguments[0].mul_(0.5)
    graph.replay()
    want = ops.additive_attend(*arguments, 3000, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_current_stream_is_used() -> None:
    arguments = on_gpu(*attention(tokens=500))
    want = ops.additive_attend(*arguments, 500, 0.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = arguments[0].clone()
        late.mul_(1.0)
        got = ops.additive_attend(late, *arguments[1:], 500, 0.0)
    assert not stream.query()  # it went behind the sleep, not beside it
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_offsets_are_64_bits() -> None:
    """Tokens a megabyte apart: the last begins beyond 4 GB."""
    stride, tokens = 1 << 20, 4200
    if torch.cuda.mem_get_info()[0] < 2 * stride * tokens:
        pytest.skip(f"needs {2 * stride * tokens >> 30} GB of GPU memory")
    arguments = list(on_gpu(*attention(batch=1, heads=1, tokens=tokens, stages=4)))
    want = ops.additive_attend(*arguments, tokens, 0.0)
    store = torch.empty(1, 1, tokens, stride, dtype=torch.uint8, device="cuda")
    for index in (1, 6):
        view = store[..., 4 * index : 4 * index + 4]
        view.copy_(arguments[index])
        arguments[index] = view
    got = ops.additive_attend(*arguments, tokens, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("beam", [1, 3, 8, 20, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_small_codes_are_those_of_the_definition(shape: tuple[int, ...], beam: int) -> None:
    x, books = gaussian(*shape)
    expected, margins = naive.additive_encode(x.numpy(), books.numpy(), beam)
    clear = np.repeat(margins > ROUNDING, books.shape[2], axis=2)
    codes = ops.additive_encode(*on_gpu(x, books), beam).cpu().numpy()
    np.testing.assert_array_equal(codes[clear], expected[clear])


@pytest.mark.parametrize("beam", [1, 2, 5, 8, 30])
def test_small_ties_go_to_the_earlier_beam_and_then_the_lower_codeword(beam: int) -> None:
    x, books = integers(40)
    expected, _ = naive.additive_encode(x.numpy(), books.numpy(), beam)
    got = ops.additive_encode(*on_gpu(x, books), beam)
    np.testing.assert_array_equal(got.cpu().numpy(), expected)


def test_codes_do_not_depend_on_their_neighbours_nor_on_strides() -> None:
    x, books = on_gpu(*gaussian(2, 1000, 2, 4, 256, 32))
    expected = ops.additive_encode(x, books, 8)
    for count in (1, 7, 100):
        assert torch.equal(ops.additive_encode(x[:, :count], books, 8), expected[:, :count])
    laid_out = books.mT.contiguous().mT
    assert torch.equal(ops.additive_encode(x, laid_out, 8), expected)
    by_token = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.additive_encode(by_token, books, 8), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_codes_of_a_broken_token_are_valid(value: float) -> None:
    x, books = on_gpu(*gaussian(1, 40, 1, 3, 10, 8))
    clean = ops.additive_encode(x, books, 8)
    x[0, 1, 3] = value
    codes = ops.additive_encode(x, books, 8)
    assert int(codes.max()) < 10
    keep = torch.arange(40) != 1
    assert torch.equal(codes[:, keep], clean[:, keep])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 8, 33])
def test_small_packing_is_that_of_the_reference(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 5, count), generator=generator).byte()
    packed = ops.pack_codes(codes.cuda(), bits)
    assert torch.equal(packed.cpu(), reference.pack_codes(codes, bits))
    back = ops.unpack_codes(packed, bits, count)
    assert torch.equal(back.cpu(), codes & (2**bits - 1))


def test_small_operators_keep_torchs_rules() -> None:
    check = torch.library.opcheck
    arguments = on_gpu(*attention(tokens=70))
    check(torch.ops.commvq.additive_attend.default, (*arguments, 70, 0.0))
    check(torch.ops.commvq.additive_encode.default, (*on_gpu(*gaussian()), 4))
    codes = torch.randint(0, 16, (3, 9), device="cuda").byte()
    check(torch.ops.commvq.pack_codes.default, (codes, 4))
    check(torch.ops.commvq.unpack_codes.default, (ops.pack_codes(codes, 4), 4, 9))
    check(torch.ops.commvq.product_estep.default, (*on_gpu(*product(20, 8)), 0.5, False))


def test_small_wrong_arguments_are_refused() -> None:
    arguments = on_gpu(*attention())
    for index, value in ((1, arguments[1][:, :, :50]), (11, arguments[11].cpu())):
        wrong = [*arguments[:index], value, *arguments[index + 1 :]]
        with pytest.raises(RuntimeError):
            torch.ops.commvq.additive_attend(*wrong, 100, 0.0)
    x, books = gaussian()
    with pytest.raises(RuntimeError):
        torch.ops.commvq.additive_encode(x.cuda(), books, 4)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("case", PUBLISHED_CASES)
def test_small_attention_over_published_codes(case: str, softcap: float) -> None:
    arguments = published(**PUBLISHED_CASES[case])
    stop = arguments[1].shape[2]
    assert_float32(
        ops.published_attend(*on_gpu(*arguments), stop, softcap), arguments, stop, softcap
    )


@pytest.mark.parametrize("queries", [1, 4, 12, 256])
def test_long_attention_over_published_codes(queries: int) -> None:
    """Views of a larger store; the same bits every time, and no waiting."""
    arguments = list(
        published(
            tokens=20_000, dim=128, rotary=128, rounds=11, groups=512, heads=2, queries=queries,
            spread=0.1,
        )
    )  # fmt: skip
    stop = 19_990
    on_device = on_gpu(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one = ops.published_attend(*on_device, stop)
        two = ops.published_attend(*on_device, stop)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    want = reference.published_attend(*on_device, stop, 0.0)
    values = [sums / total[..., None] for sums, _, total in (one, want)]
    assert float((values[0] - values[1]).abs().max() / values[1].abs().max()) < 1e-3
    narrow = list(on_device)
    for index in (1, 3):
        narrow[index] = narrow[index][:, :, :stop]
    assert all(
        torch.equal(a, b) for a, b in zip(one, ops.published_attend(*narrow, stop), strict=True)
    )


def test_attention_over_published_codes_is_captured_in_a_graph() -> None:
    arguments = on_gpu(*published(tokens=3000, dim=64, rotary=64))
    want = ops.published_attend(*arguments, 3000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.published_attend(*arguments, 3000)
    for tensor in got:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_small_published_rows_that_see_nothing() -> None:
    arguments = on_gpu(*published(batch=3, tokens=20))
    for stop in (0, 7):
        sums, peak, total = ops.published_attend(*arguments, stop)
        rows = slice(0 if stop == 0 else 1, 3)
        assert not sums[rows].any()
        assert not total[rows].any()
        assert bool((peak[rows] == -torch.inf).all())


def test_small_published_arguments_keep_torchs_rules() -> None:
    arguments = on_gpu(*published())
    torch.library.opcheck(torch.ops.commvq.published_attend.default, (*arguments, 90, 0.0))
    for index, value in (
        (1, arguments[1][:, :, :50]),
        (3, arguments[3][..., :-1]),
        (7, arguments[7].cpu()),
    ):
        wrong = [*arguments[:index], value, *arguments[index + 1 :]]
        with pytest.raises(RuntimeError, match="published_attend"):
            torch.ops.commvq.published_attend(*wrong, 100, 0.0)


def test_small_published_keys_get_the_references_codes() -> None:
    """There the PyTorch reference serves."""
    case = rounds(2, 300, 16, 3, whole=True)
    codes = ops.published_encode(*on_gpu(*case)).cpu()
    assert torch.equal(codes, reference.published_encode(*case))
