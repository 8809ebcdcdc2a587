"""pack_codes and unpack_codes: the bit order of the format, and the round trip."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from commvq_core import ops
from commvq_core.ops import reference
from tests import reference as naive

IMPLEMENTATIONS = {"op": ops, "pytorch": reference}
BITS = range(1, 9)


@pytest.fixture(params=IMPLEMENTATIONS)
def packing(request: pytest.FixtureRequest) -> ModuleType:
    return IMPLEMENTATIONS[request.param]


def random_bytes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 256, shape, generator=generator).byte()


@given(
    bits=st.integers(1, 8),
    rows=st.integers(0, 5),
    count=st.integers(0, 40),
    spare=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)
def test_round_trip(bits: int, rows: int, count: int, spare: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, count), generator=generator).byte()
    for packing in IMPLEMENTATIONS.values():
        packed = packing.pack_codes(codes, bits)
        assert packed.shape == (rows, (count * bits + 7) // 8)
        assert torch.equal(packing.unpack_codes(packed, bits, count), codes)
        longer = torch.nn.functional.pad(packed, (0, spare), value=255)
        assert torch.equal(packing.unpack_codes(longer, bits, count), codes)
        fewer = count // 2
        assert torch.equal(packing.unpack_codes(packed, bits, fewer), codes[:, :fewer])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 33])
def test_rows_are_little_endian_integers(packing: ModuleType, bits: int, count: int) -> None:
    codes = random_bytes(3, count)  # with bits above `bits`, which must not spill
    packed = packing.pack_codes(codes, bits).numpy()
    for row, expected in zip(packed, codes.numpy(), strict=True):
        np.testing.assert_array_equal(row, naive.pack_codes(expected, bits))


def test_the_example_of_the_format(packing: ModuleType) -> None:
    codes = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert packing.pack_codes(codes, 6).tolist() == [0b10_000001, 0b0011_0000, 0b00]


@pytest.mark.parametrize("bits", BITS)
def test_any_leading_axes_and_strides(packing: ModuleType, bits: int) -> None:
    codes = random_bytes(2, 3, 21) & (2**bits - 1)
    strided = codes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    packed = packing.pack_codes(strided, bits)
    assert torch.equal(packed, packing.pack_codes(codes, bits))
    odd = packed.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(packing.unpack_codes(odd, bits, 21), codes)
    assert torch.equal(packing.unpack_codes(packed[0, 0], bits, 21), codes[0, 0])


def test_eight_bits_are_copied(packing: ModuleType) -> None:
    codes = random_bytes(4, 5)
    packed = packing.pack_codes(codes, 8)
    unpacked = packing.unpack_codes(packed, 8, 5)
    assert torch.equal(packed, codes)
    assert len({tensor.data_ptr() for tensor in (codes, packed, unpacked)}) == 3


def test_many_rows_do_not_depend_on_threads() -> None:
    codes = random_bytes(20000, 19)
    before = torch.get_num_threads()
    results = []
    for count in (1, 4):
        torch.set_num_threads(count)
        results.append(ops.pack_codes(codes, 5))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], reference.pack_codes(codes, 5))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ops.pack_codes(torch.zeros(3).int(), 4), TypeError, "codes must be torch.uint8"),
        (lambda: ops.pack_codes(random_bytes(3), 0), ValueError, "bits must be 1 to 8"),
        (lambda: ops.pack_codes(random_bytes(3), 9), ValueError, "bits must be 1 to 8"),
        (lambda: ops.pack_codes(random_bytes(3), 4.0), TypeError, "bits must be an int"),
        (lambda: ops.pack_codes(random_bytes(1)[0], 4), ValueError, "at least one axis"),
        (lambda: ops.unpack_codes(torch.zeros(3), 4, 1), TypeError, "packed must be torch.uint8"),
        (lambda: ops.unpack_codes(random_bytes(3), 6, 5), ValueError, "5 codes of 6 bits take 4"),
        (lambda: ops.unpack_codes(random_bytes(3), 6, -1), ValueError, "must not be negative"),
    ],
)
def test_what_does_not_fit_is_refused(
    call: Callable[[], Tensor], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        call()
