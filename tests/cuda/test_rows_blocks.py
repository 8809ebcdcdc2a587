"""The blocks that attend with many rows of queries, run on the host, thread by thread."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.cuda.hosted import attend, attend_rows
from tests.cuda.plain import assert_better_than_bf16
from tests.cuda.test_attend_blocks import GEOMETRIES, SHARED
from tests.ops.cases import attention


@pytest.fixture
def library(many_rows: ctypes.CDLL) -> ctypes.CDLL:
    return many_rows


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_layout(library: ctypes.CDLL, geometry: tuple[int, int, int]) -> None:
    dim, subs, stages = geometry
    arguments = attention(
        dim=dim, subs=subs, stages=stages, rotary=dim, queries=20, tokens=150, heads=1,
        spread=2 / dim,
    )  # fmt: skip
    for stop in (150, 129):
        assert_better_than_bf16(attend_rows(library, arguments, stop), arguments, stop)


@pytest.mark.parametrize("memory", ["sm_86", "sm_90"])
@pytest.mark.parametrize("dim", [64, 160, 256])
def test_every_block_that_fits_a_gpu(library: ctypes.CDLL, dim: int, memory: str) -> None:
    arguments = attention(
        dim=dim, rotary=dim, subs=dim // 32, stages=4, queries=70, tokens=130, batch=1, heads=1,
        spread=2 / dim,
    )  # fmt: skip
    result = attend_rows(library, arguments, 130, shared_memory=SHARED[memory])
    assert_better_than_bf16(result, arguments, 130)


@pytest.mark.parametrize("queries", [1, 16, 17, 64, 65, 128, 129, 300])
def test_every_number_of_rows(library: ctypes.CDLL, queries: int) -> None:
    arguments = attention(queries=queries, tokens=70, dim=64, rotary=64, batch=1, heads=2)
    assert_better_than_bf16(attend_rows(library, arguments, 70), arguments, 70)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("room", [64, 128, 1 << 30])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300, 700])
def test_any_number_of_tokens_parts_and_splits(
    library: ctypes.CDLL, tokens: int, room: int, softcap: float
) -> None:
    arguments = attention(tokens=tokens, batch=1, heads=1, dim=32, rotary=32, queries=20)
    for splits in (1, 2, 5):
        result = attend_rows(library, arguments, tokens, softcap, splits=splits, room=room)
        assert_better_than_bf16(result, arguments, tokens, softcap)


@pytest.mark.parametrize("rotary", [0, 18, 64])
def test_any_part_of_a_head_rotates(library: ctypes.CDLL, rotary: int) -> None:
    arguments = attention(rotary=rotary, dim=64, subs=2, tokens=140, rows=2, queries=20)
    assert_better_than_bf16(attend_rows(library, arguments, 140, room=64), arguments, 140)


def test_keys_and_values_have_layouts_of_their_own(library: ctypes.CDLL) -> None:
    keys = attention(dim=96, subs=2, stages=3, rotary=96, tokens=100, spread=0.1, queries=20)
    values = attention(dim=96, subs=6, stages=5, rotary=96, tokens=100, queries=20)
    arguments = (*keys[:6], *values[6:9], *keys[9:])
    assert_better_than_bf16(attend_rows(library, arguments, 100), arguments, 100)


@pytest.mark.parametrize("memory", ["little", "sm_90"])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("stages", [1, 2, 5, 7, 8])
def test_stages_that_add_up_within_a_byte(
    library: ctypes.CDLL, stages: int, group: int, memory: str
) -> None:
    arguments = attention(dim=64, rotary=64, stages=stages, group=group, tokens=90, queries=20)
    extreme = list(arguments)
    extreme[2] = arguments[2].sign() * (127 // group)  # sums go as far as a byte does
    for given in (arguments, tuple(extreme)):
        result = attend_rows(library, given, 90, shared_memory=SHARED[memory])
        assert_better_than_bf16(result, given, 90)


@pytest.mark.parametrize("first", [[0, 63, 64], [1, 130, 199], [200, 0, 300]])
def test_padding_is_not_seen(library: ctypes.CDLL, first: list[int]) -> None:
    given = attention(batch=3, heads=1, tokens=200, rows=3, queries=20)
    arguments = (*given[:-1], torch.tensor(first))
    for splits, room in ((1, 1 << 30), (3, 1 << 30), (2, 128)):
        result = attend_rows(library, arguments, 200, splits=splits, room=room)
        assert_better_than_bf16(result, arguments, 200)


@pytest.mark.parametrize("stages", [3, 16])
def test_codebooks_that_do_not_fit_are_paged(library: ctypes.CDLL, stages: int) -> None:
    arguments = attention(
        dim=64, stages=stages, rotary=64, tokens=90, spread=0.05, queries=20, batch=1
    )
    result = attend_rows(library, arguments, 90, shared_memory=SHARED["little"])
    assert_better_than_bf16(result, arguments, 90)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_numbers_of_any_size(library: ctypes.CDLL, size: float) -> None:
    arguments = list(attention(dim=64, rotary=64, stages=8, tokens=80, queries=20))
    arguments[0] /= size
    arguments[8] *= size
    given = tuple(arguments)
    assert_better_than_bf16(attend_rows(library, given, 80), given, 80)


def test_peaks_that_rise_late_and_large_logits(library: ctypes.CDLL) -> None:
    """Each part's peak lies above the one before, by far."""
    arguments = attention(dim=64, rotary=64, stages=8, tokens=256, queries=20, spread=60.0)
    result = attend_rows(library, arguments, 256, room=64)
    assert_better_than_bf16(result, arguments, 256)


def test_the_order_of_threads_changes_no_bit(library: ctypes.CDLL) -> None:
    arguments = attention(dim=160, rotary=64, subs=2, stages=5, queries=70, tokens=260, heads=1)
    plan = {"room": 128, "shared_memory": SHARED["sm_80"]}
    forwards = attend_rows(library, arguments, 260, **plan)
    backwards = attend_rows(library, arguments, 260, **plan, backwards=True)
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_how_many_heads_share_a_launch_changes_no_bit(library: ctypes.CDLL) -> None:
    arguments = attention(batch=2, heads=2, tokens=100, queries=20)
    one = attend_rows(library, arguments, 100)
    other = attend_rows(library, arguments, 100, units_together=3)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_it_agrees_with_the_blocks_for_few_rows(
    library: ctypes.CDLL, few_rows: ctypes.CDLL
) -> None:
    arguments = attention(dim=64, rotary=64, stages=8, queries=40, tokens=300)
    weighted, peak, total = attend_rows(library, arguments, 300)
    for together in (1, 2):
        want = attend(few_rows, arguments, 300, tiles_together=together)
        torch.testing.assert_close(peak, want[1], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(
            weighted / total[..., None], want[0] / want[2][..., None], rtol=0, atol=5e-3
        )


def test_blocks_are_as_large_as_fits(library: ctypes.CDLL) -> None:
    def shape(queries: int, dim: int, memory: str) -> list[int]:
        found = (ctypes.c_int * 4)()
        limit = ctypes.c_int64(SHARED[memory])
        library.commvq_rows_shape(ctypes.c_int64(queries), ctypes.c_int64(dim), limit, found)
        return list(found)

    assert shape(8192, 128, "sm_90") == [8, 2, 16, 1]
    assert shape(8192, 128, "sm_86") == [8, 2, 16, 1]
    assert shape(64, 128, "sm_90") == [4, 2, 16, 1]
    assert shape(8192, 64, "sm_86") == [8, 2, 8, 1]
    assert shape(8192, 80, "sm_90") == [8, 2, 12, 1]
    assert shape(8192, 256, "sm_80") == [8, 2, 16, 2]
    assert shape(8192, 256, "sm_86") == [4, 1, 16, 2]
    assert shape(8192, 576, "sm_86")[0] == 0  # none fits: blocks for few rows serve


@pytest.mark.parametrize(("units", "stop"), [(8, 131_072), (8, 100), (64, 131_072), (1, 1 << 33)])
def test_what_is_decoded_at_a_time_stays_small(library: ctypes.CDLL, units: int, stop: int) -> None:
    plan = (ctypes.c_int64 * 2)()
    library.commvq_part_plan(ctypes.c_int64(units), ctypes.c_int64(stop), ctypes.c_int64(512), plan)
    together, room = plan
    assert 1 <= together <= units
    assert room % 64 == 0
    assert together * room * 512 <= 32 << 20
    assert room >= min(stop, 8192)


@pytest.mark.parametrize("keys", [0, 1])
def test_decoded_tokens_lie_apart_and_without_gaps(library: ctypes.CDLL, keys: int) -> None:
    library.commvq_place.restype = ctypes.c_int64
    places = [
        library.commvq_place(keys, ctypes.c_int64(t), ctypes.c_int64(d), ctypes.c_int64(96))
        for t in range(64)
        for d in range(96)
    ]
    assert sorted(places) == list(range(64 * 96))
