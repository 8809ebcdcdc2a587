"""The CUDA kernels' encoding blocks and packed bits, run on the host, thread by thread."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import reference as naive
from tests.cuda.hosted import address, compiled
from tests.ops.cases import gaussian, integers
from tests.ops.test_additive_encode import ROUNDING, SHAPES


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("host_encode.cpp", tmp_path_factory.mktemp("cuda"))


def encode(
    library: ctypes.CDLL,
    x: Tensor,
    books: Tensor,
    beam: int,
    *,
    together: int = 8,
    backwards: bool = False,
) -> Tensor:
    groups, subs, stages, codewords, sub_dim = books.shape
    sizes = (groups, subs, stages, codewords, sub_dim, x.shape[1], beam, together)
    assert x.stride(2) == 1
    strides = (*x.stride()[:2], *books.stride(), int(backwards))
    codes = torch.full((groups, x.shape[1], subs * stages), 255, dtype=torch.uint8)
    library.commvq_encode(
        (ctypes.c_int64 * 16)(*sizes, *strides),
        address(x),
        address(books),
        address(codes),
    )
    return codes


@pytest.mark.parametrize("beam", [1, 3, 8, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_the_definition(
    library: ctypes.CDLL, shape: tuple[int, ...], beam: int
) -> None:
    x, books = gaussian(*shape)
    expected, margins = naive.additive_encode(x.numpy(), books.numpy(), beam)
    clear = np.repeat(margins > ROUNDING, books.shape[2], axis=2)
    assert clear.mean() > 0.9 or books.shape[3] <= 2
    codes = encode(library, x, books, beam).numpy()
    np.testing.assert_array_equal(codes[clear], expected[clear])


@pytest.mark.parametrize("beam", [1, 2, 5, 8, 30])
def test_ties_go_to_the_earlier_beam_and_then_the_lower_codeword(
    library: ctypes.CDLL, beam: int
) -> None:
    x, books = integers(40)
    expected, margins = naive.additive_encode(x.numpy(), books.numpy(), beam)
    assert (margins == 0).any()
    np.testing.assert_array_equal(encode(library, x, books, beam).numpy(), expected)


@pytest.mark.parametrize("together", [1, 2, 4, 8])
def test_a_code_does_not_depend_on_its_neighbours_nor_on_the_order_of_threads(
    library: ctypes.CDLL, together: int
) -> None:
    x, books = gaussian(2, 21, 2, 3, 64, 32)
    expected = encode(library, x, books, 8)
    for backwards in (False, True):
        codes = encode(library, x, books, 8, together=together, backwards=backwards)
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_codes_of_a_broken_token_are_valid_and_leave_the_others_alone(
    library: ctypes.CDLL, value: float
) -> None:
    x, books = gaussian(1, 12, 1, 3, 10, 8)
    clean = encode(library, x, books, 8)
    x[0, 1, 3] = value
    codes = encode(library, x, books, 8)
    assert codes.max() < 10
    keep = torch.arange(12) != 1
    assert torch.equal(codes[:, keep], clean[:, keep])


def test_strides_do_not_matter(library: ctypes.CDLL) -> None:
    x, books = gaussian(3, 20, 2, 3, 64, 8)
    expected = encode(library, x, books, 4)
    tokens_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    by_codeword = books.transpose(-1, -2).contiguous().transpose(-1, -2)
    wider = x.repeat(1, 1, 2)[..., : x.shape[2]]
    for other in (tokens_first, wider):
        assert torch.equal(encode(library, other, by_codeword, 4), expected)


def test_blocks_take_as_many_tokens_as_keep_the_gpu_busy(library: ctypes.CDLL) -> None:
    choose = library.commvq_tokens_together
    choose.restype = ctypes.c_int64

    def together(tokens: int, beam: int) -> int:
        """Llama-3.1-8B's layer at 1 bit on an H200, 100 KB of shared memory a block."""
        numbers = (8, 2, 8, 64, tokens, beam, 132, 102_400)
        return int(choose(*(ctypes.c_int64(number) for number in numbers)))

    assert [together(tokens, 8) for tokens in (1, 16, 32, 64, 2048)] == [1, 1, 2, 4, 8]
    assert together(2048, 64) == 1
    assert together(2048, 16) == 4


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 33, 100])
def test_packed_bits_are_little_endian(library: ctypes.CDLL, bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(0, 256, (count,), generator=generator).byte()  # extra bits must not spill
    packed = torch.full(((count * bits + 7) // 8,), 255, dtype=torch.uint8)
    back = torch.full_like(codes, 255)
    size = ctypes.c_int64(count)
    library.commvq_pack(address(codes), size, bits, address(packed))
    np.testing.assert_array_equal(packed.numpy(), naive.pack_codes(codes.numpy(), bits))
    library.commvq_unpack(address(packed), size, bits, address(back))
    assert torch.equal(back, codes & (2**bits - 1))
