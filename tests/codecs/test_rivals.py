"""What every rival codec owes as a codec, and its true bits."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from commvq_core.codecs.base import FitData, SideSpec
from commvq_core.codecs.registry import CODECS
from commvq_core.codecs.rival import RivalCodec
from commvq_core.codecs.rivals import METHODS, RIVALS

# Every rival with the usual heads, and each method once with heads of no power of two.
CASES = [(name, side, 64) for name in RIVALS for side in ("key", "value")]
CASES += [(f"{method}-2", side, 80) for method in METHODS for side in ("key", "value")]


def vectors(heads: int, dim: int, tokens: int = 96, seed: int = 0) -> Tensor:
    """float32 [2, heads, tokens, dim], channels of different sizes and means."""
    generator = torch.Generator().manual_seed(123)
    size = 0.2 + torch.rand(heads, 1, dim, generator=generator)
    mean = torch.randn(heads, 1, dim, generator=generator)
    generator.manual_seed(seed)
    return torch.randn(2, heads, tokens, dim, generator=generator) * size + mean


@functools.cache
def rival(name: str, side: str, dim: int, heads: int = 3) -> RivalCodec:
    method, width = RIVALS[name]
    kind = method.key if side == "key" else method.value
    rows = vectors(heads, dim, 512, seed=1)[0].transpose(0, 1)
    data = FitData(rows, torch.eye(dim).expand(heads, -1, -1), seed=0)
    spec = SideSpec(side, heads, dim, dim if side == "key" else 0)
    return kind.make(spec, width, data if method.needs_calibration else None)


@pytest.mark.parametrize(("name", "side", "dim"), CASES)
def test_codes_take_the_bytes_that_are_promised_wherever_they_lie(
    name: str, side: str, dim: int
) -> None:
    codec, x = rival(name, side, dim), vectors(3, dim)
    codes = codec.encode(x)
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, codec.code_rows, 96, codec.code_bytes)
    # Inside a larger buffer, as a cache holds them.
    buffer = torch.zeros(2, codec.code_rows, 160, codec.code_bytes, dtype=torch.uint8)
    buffer[:, :, 32:128] = codes
    decoded = codec.decode(buffer[:, :, 32:128])
    assert decoded.shape == x.shape
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, codec.decode(codes))
    assert torch.equal(decoded[:, :, 32:64], codec.decode(codes[:, :, 32:64]))


@pytest.mark.parametrize(("name", "side", "dim"), CASES)
def test_a_code_depends_on_its_own_group_of_tokens_alone(name: str, side: str, dim: int) -> None:
    codec, x = rival(name, side, dim), vectors(3, dim)
    whole = codec.encode(x)
    parts = x.split([codec.group_tokens, 96 - codec.group_tokens], dim=2)
    assert torch.equal(torch.cat([codec.encode(part) for part in parts], dim=2), whole)
    assert torch.equal(codec.encode(x[1:]), whole[1:])


@pytest.mark.parametrize(("name", "side", "dim"), CASES)
def test_a_rival_comes_back_from_its_own_tensors(name: str, side: str, dim: int) -> None:
    codec, x = rival(name, side, dim), vectors(3, dim)
    twin = type(codec).from_tensors(codec.spec, codec.config(), codec.tensors())
    assert torch.equal(twin.encode(x), codec.encode(x))
    assert torch.equal(codec.to("cpu").encode(x), codec.encode(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["key", "value"])
def test_more_bits_lose_less(method: str, side: str) -> None:
    x, errors = vectors(3, 64), []
    for name in (name for name in RIVALS if name.rpartition("-")[0] == method):
        codec = rival(name, side, 64)
        errors.append(float((codec.decode(codec.encode(x)) - x).square().mean()))
    assert len(errors) > 1
    assert all(more < less / 2 for less, more in itertools.pairwise(errors))


# Counted by hand: 3 heads of 64 dims. KIVI: two fp16 a group of 32. int: two fp16 a head.
# TurboQuant: one fp16 a head. KVQuant: of keys 64 of 32 * 192 numbers as fp16 with two bytes
# of index; of values 2 of 192 with a byte, and two fp16 a token.
BITS = {
    "kivi-2": (3.0, 3.0),
    "kivi-4": (5.0, 5.0),
    "kivi-1": (2.0, 2.0),
    "int-2": (2.5, 2.5),
    "int-8": (8.5, 8.5),
    "turboquant-2": (2.25, 2.25),
    "kvquant-2": (2 + 64 * 32 / (32 * 192), 2 + 2 * 24 / 192 + 32 / 192),
}


@pytest.mark.parametrize("name", BITS)
def test_bits_count_everything_that_is_stored(name: str) -> None:
    found = tuple(rival(name, side, 64).bits_per_element for side in ("key", "value"))
    assert found == pytest.approx(BITS[name])


def test_wide_layers_have_the_papers_bits_and_wider_indices() -> None:
    """KVQuant's 2.33 bits: 1 % of the numbers in fp16 with 16 bits of index."""
    x = vectors(8, 128)
    for side in ("key", "value"):
        codec = rival("kvquant-2", side, 128, heads=8)
        assert codec.bits_per_element == pytest.approx(2.33, abs=0.03)
        assert (codec.decode(codec.encode(x)) - x).square().mean() < 0.2 * x.var()


def test_indices_of_any_width_come_back() -> None:
    wide = rival("kvquant-1", "key", 512, heads=8)  # 32 * 4,096 numbers: four bytes of index
    x = vectors(8, 512, 32)
    x[:, 7, 31, 511] = 1e4
    decoded = wide.decode(wide.encode(x))
    assert (decoded[:, 7, 31, 511] == 1e4).all()


def test_artifacts_never_hold_a_rival() -> None:
    kinds = {kind for method in METHODS.values() for kind in (method.key, method.value)}
    assert not kinds & set(CODECS.values())


def test_a_width_that_a_method_does_not_have_is_refused() -> None:
    spec = SideSpec("key", 1, 64, 64)
    for method in METHODS.values():
        for width in (5, "2", None):
            with pytest.raises(ValueError, match="width"):
                method.key.from_tensors(spec, {"width": width}, {})
