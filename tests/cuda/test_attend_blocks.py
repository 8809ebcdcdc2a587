"""The blocks of the CUDA kernels of attention over codes, run on the host, thread by thread.

Their shared memory and results start as NaN and end before memory that may not be touched.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.hosted import attend
from tests.cuda.plain import assert_better_than_bf16
from tests.ops.cases import attention

# Shared memory that a block may have: sm_80, sm_86 and sm_89, sm_90, and little.
SHARED = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "little": 49_152}


@pytest.fixture
def library(few_rows: ctypes.CDLL) -> ctypes.CDLL:
    return few_rows


# head_dim, sub-vectors, stages: widths of a slice of 16, 32, 48 and 64 dims, with and without
# padding, sub-vectors of several slices, codes that can be read four at a time and that can't.
GEOMETRIES = [
    (64, 1, 8),
    (64, 2, 4),
    (64, 4, 3),
    (64, 8, 1),
    (80, 2, 5),
    (80, 1, 9),
    (96, 2, 6),
    (96, 3, 4),
    (96, 1, 12),
    (128, 2, 8),
    (128, 1, 5),
    (128, 16, 1),
    (256, 4, 8),
    (256, 2, 7),
    (40, 1, 5),
    (24, 4, 2),
    (16, 8, 1),
]


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_layout(library: ctypes.CDLL, geometry: tuple[int, int, int], tiles: int) -> None:
    dim, subs, stages = geometry
    arguments = attention(
        dim=dim, subs=subs, stages=stages, rotary=dim, queries=5, tokens=150, spread=2 / dim
    )
    for stop in (150, 131):
        result = attend(library, arguments, stop, tiles=tiles)
        assert_better_than_bf16(result, arguments, stop)


@pytest.mark.parametrize("memory", SHARED)
@pytest.mark.parametrize("stages", [3, 8, 16])
def test_codebooks_that_do_not_fit_are_paged(
    library: ctypes.CDLL, memory: str, stages: int
) -> None:
    arguments = attention(dim=128, subs=2, stages=stages, rotary=128, tokens=90, spread=0.05)
    result = attend(library, arguments, 90, shared_memory=SHARED[memory])
    assert_better_than_bf16(result, arguments, 90)


@pytest.mark.parametrize("groups", [1, 2, 4, 7, 8, 16])
@pytest.mark.parametrize("length", [1, 2, 16])
def test_every_number_of_rows(library: ctypes.CDLL, groups: int, length: int) -> None:
    arguments = attention(queries=groups * length, tokens=70, dim=64, rotary=64, heads=1)
    assert_better_than_bf16(attend(library, arguments, 70), arguments, 70)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("splits", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 300, 700])
def test_any_number_of_tokens_and_splits(
    library: ctypes.CDLL, tokens: int, splits: int, softcap: float
) -> None:
    arguments = attention(tokens=tokens, batch=1, dim=32, rotary=32, stages=4)
    result = attend(library, arguments, tokens, softcap, splits=splits)
    assert_better_than_bf16(result, arguments, tokens, softcap)


@pytest.mark.parametrize("rotary", [0, 2, 18, 40, 64])
def test_any_part_of_a_head_rotates(library: ctypes.CDLL, rotary: int) -> None:
    arguments = attention(rotary=rotary, dim=64, subs=2, stages=4, tokens=140, rows=2)
    assert_better_than_bf16(attend(library, arguments, 140), arguments, 140)


def test_keys_and_values_have_layouts_of_their_own(library: ctypes.CDLL) -> None:
    keys = attention(dim=96, subs=2, stages=3, rotary=96, tokens=100, spread=0.1)
    values = attention(dim=96, subs=6, stages=5, rotary=96, tokens=100)
    arguments = (*keys[:6], *values[6:9], *keys[9:])
    assert_better_than_bf16(attend(library, arguments, 100), arguments, 100)


@pytest.mark.parametrize("memory", ["little", "sm_90"])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("stages", [1, 2, 5, 7, 8])
def test_stages_that_add_up_within_a_byte(
    library: ctypes.CDLL, stages: int, group: int, memory: str
) -> None:
    arguments = attention(dim=64, rotary=64, stages=stages, group=group, tokens=90)
    extreme = list(arguments)
    extreme[2] = arguments[2].sign() * (127 // group)  # sums go as far as a byte does
    for given in (arguments, tuple(extreme)):
        result = attend(library, given, 90, shared_memory=SHARED[memory])
        assert_better_than_bf16(result, given, 90)


@pytest.mark.parametrize("first", [[0, 0, 0], [0, 63, 64], [1, 130, 199], [200, 0, 300]])
def test_padding_is_not_seen(library: ctypes.CDLL, first: list[int]) -> None:
    arguments = (*attention(batch=3, tokens=200, rows=3)[:-1], torch.tensor(first))
    for splits in (1, 2, 4):
        assert_better_than_bf16(attend(library, arguments, 200, splits=splits), arguments, 200)


def test_an_empty_prefix_gives_nothing(library: ctypes.CDLL) -> None:
    arguments = attention(tokens=20)
    weighted, peak, total = attend(library, arguments, 0)
    assert not weighted.any()
    assert not total.any()
    assert bool((peak == -torch.inf).all())


@pytest.mark.parametrize("size", [1e-12, 1e-4, 1e4, 1e12])
def test_numbers_of_any_size(library: ctypes.CDLL, size: float) -> None:
    """Half precision ends at 65,504 and begins to lose digits at 0.00006."""
    arguments = list(attention(dim=64, rotary=64, stages=8, tokens=80))
    arguments[0] /= size
    arguments[8] *= size
    given = tuple(arguments)
    assert_better_than_bf16(attend(library, given, 80), given, 80)


def test_stages_of_very_different_size(library: ctypes.CDLL) -> None:
    arguments = list(attention(dim=64, rotary=64, stages=8, tokens=80, spread=1.0, group=1))
    arguments[3] = (2 ** torch.arange(7, -1, -1)).byte().expand(2, 1, 8).contiguous()
    arguments[8] *= 0.5 ** torch.arange(8)
    given = tuple(arguments)
    assert_better_than_bf16(attend(library, given, 80), given, 80)


def test_far_tokens_of_little_weight_count(library: ctypes.CDLL) -> None:
    """One token with a score of 12 above 4,095 equal ones: each weighs 6e-6, together 2.5 %."""
    arguments = list(attention(batch=1, heads=1, queries=1, tokens=4096, rotary=0, stages=1))
    codes = torch.zeros(1, 1, 4096, 1, dtype=torch.uint8)
    codes[0, 0, 0] = 1
    arguments[1], arguments[6] = codes, codes.clone()
    key_book, value_book = torch.zeros(2, 1, 1, 1, 256, 16, dtype=torch.int8)
    key_book[..., 1, 0], value_book[..., 0, 1] = 120, 100
    arguments[2], arguments[7] = key_book, value_book
    arguments[3] = torch.ones_like(arguments[3])
    arguments[4] = torch.zeros_like(arguments[4])
    arguments[8] = torch.full((1, 1, 1), 0.1)
    arguments[0] = torch.zeros(1, 1, 1, 16)
    arguments[0][..., 0] = 0.1
    weighted, _, total = attend(library, tuple(arguments), 4096)
    share = 4095 / (4095 + np.exp(12))
    assert float(weighted[0, 0, 0, 1] / total) == pytest.approx(10 * share, rel=2e-3)


@pytest.mark.parametrize("queries", [4, 12])
def test_as_many_warps_as_on_a_gpu(library: ctypes.CDLL, queries: int) -> None:
    arguments = attention(dim=128, subs=2, stages=4, rotary=128, queries=queries, tokens=1200)
    result = attend(library, arguments, 1200, few_warps=False, splits=1)
    assert_better_than_bf16(result, arguments, 1200)


@pytest.mark.parametrize("queries", [4, 9])
def test_the_order_of_threads_changes_no_bit(library: ctypes.CDLL, queries: int) -> None:
    arguments = attention(dim=64, rotary=64, stages=8, queries=queries, tokens=400)
    memory = SHARED["little"]
    forwards = attend(library, arguments, 400, shared_memory=memory, few_warps=False)
    backwards = attend(
        library, arguments, 400, shared_memory=memory, few_warps=False, backwards=True
    )
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


@pytest.mark.parametrize("together", [1, 2, 3])
def test_how_many_heads_share_a_launch_changes_no_bit(library: ctypes.CDLL, together: int) -> None:
    arguments = attention(batch=2, heads=2, tokens=100, queries=20)
    one = attend(library, arguments, 100)
    other = attend(library, arguments, 100, units_together=together)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_pages_hold_as_much_as_fits(library: ctypes.CDLL) -> None:
    """Llama-3.1-8B: sub-vectors of 64 dims, 16 KB a stage."""

    def page(keys: int, stages: int, memory: int) -> int:
        limit = ctypes.c_int64(memory)
        return int(library.commvq_stages_a_page(keys, stages, 4, 1, 16, limit))

    gpus = [SHARED[name] for name in ("sm_80", "sm_86", "sm_90")]
    for keys in (0, 1):
        assert [page(keys, 8, memory) for memory in gpus] == [8, 4, 8]  # 1 bit
        # 2 bits. Values need less beside their table: 6, 6 and 4 of 16 stages on sm_86.
        assert [page(keys, 16, memory) for memory in gpus] == [8, 4 if keys else 6, 8]
    assert page(1, 8, 20_000) == 0  # not even one
    assert page(1, 13, SHARED["sm_90"]) == 13
    assert page(1, 14, SHARED["sm_90"]) == 8  # two, codes read four at a time
    assert page(1, 5, SHARED["sm_86"]) == 5


@pytest.mark.parametrize("stop", [1, 64, 1000, 8192, 131_072, 3_000_000_000])
@pytest.mark.parametrize("jobs", [1, 8, 64, 200, 1000])
def test_splits_fill_the_gpu(library: ctypes.CDLL, jobs: int, stop: int) -> None:
    choose = library.commvq_choose_splits
    choose.restype = ctypes.c_int64
    splits = choose(ctypes.c_int64(jobs), ctypes.c_int64(stop), ctypes.c_int64(132))
    blocks = -(-stop // 32)
    assert 1 <= splits <= blocks

    def waves(parts: int) -> int:
        """Tokens that the busiest processor works through, tables counted as 512."""
        return -(-jobs * parts // 132) * (-(-blocks // parts) * 32 + 512)

    assert waves(splits) == min(waves(parts) for parts in range(1, min(blocks, 528) + 1))
    if jobs == 8 and stop == 131_072:
        assert splits == 16  # 128 of 132 processors, once


def test_slices_are_whole_steps_of_an_mma(library: ctypes.CDLL) -> None:
    for sub_dim in range(2, 300, 2):
        width = library.commvq_slice_width(sub_dim)
        assert width in (16, 32, 48, 64)
        slices = -(-sub_dim // 64)
        assert width * (slices - 1) < sub_dim <= width * slices


def test_the_host_rounds_to_half_as_ieee_does(library: ctypes.CDLL) -> None:
    rounded = library.commvq_round_half
    rounded.restype = ctypes.c_float
    generator = torch.Generator().manual_seed(0)
    mantissas = torch.randn(2000, generator=generator)
    values = mantissas * 2.0 ** torch.randint(-28, 18, (2000,), generator=generator)
    special = torch.tensor([0.0, 65519.9, 65520.0, -1e9, 2.0**-24, 2.0**-25, 3 * 2.0**-26])
    values = torch.cat((values, special))
    want: Tensor = values.half().float()
    got = torch.tensor([rounded(ctypes.c_float(value)) for value in values.tolist()])
    assert torch.equal(got, want)
