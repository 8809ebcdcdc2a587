"""The additive codec: bytes and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from commvq_core.codecs.additive import AdditiveCodec, AdditiveConfig
from commvq_core.codecs.base import SideSpec
from commvq_core.errors import InputError
from tests import reference
from tests.codecs.samples import additive_codec, decoded_by_hand, exact_sums

GEOMETRIES: list[dict[str, Any]] = [
    {"code_bits": 8, "stages": 2, "sub_dim": 16},
    {"code_bits": 6, "stages": 3, "sub_dim": 8},
    {"code_bits": 3, "stages": 1, "sub_dim": 2},
    {"code_bits": 1, "stages": 4, "sub_dim": 4},
]


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_sums_of_codewords_survive_encoding_exactly(side: str, geometry: dict[str, Any]) -> None:
    codec = additive_codec(side, **geometry)
    vectors, codes = exact_sums(codec, tokens=40)
    packed = codec.encode(vectors)
    for head in range(2):
        for token in range(40):
            want = reference.pack_codes(codes[head, token].numpy(), geometry["code_bits"])
            assert packed[0, head, token].tolist() == want.tolist()
    error = (codec.decode(packed).double() - vectors).abs().max()
    assert error < 1e-5 * vectors.abs().max()


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_decoding_adds_the_codewords_that_the_codes_name(
    side: str, geometry: dict[str, Any]
) -> None:
    codec = additive_codec(side, **geometry)
    _, subs, stages, count, _ = codec.books.words.shape
    codes = np.random.default_rng(3).integers(count, size=(2, 2, 7, subs * stages))
    packed = np.stack(
        [reference.pack_codes(row, geometry["code_bits"]) for row in codes.reshape(28, -1)]
    )
    got = codec.decode(torch.from_numpy(packed).view(2, 2, 7, -1))
    assert got.dtype == torch.float32
    for batch in range(2):
        want = decoded_by_hand(codec, torch.from_numpy(codes[batch]))
        assert (got[batch].double() - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("side", ["key", "value"])
def test_encoding_chooses_what_the_reference_chooses(side: str) -> None:
    codec = additive_codec(side, beam=3)
    vectors = torch.randn(1, 2, 60, 16, generator=torch.Generator().manual_seed(5)).double()
    tensors = {name: tensor.double() for name, tensor in codec.tensors().items()}
    if side == "key":
        rows = vectors[0] / tensors["inverse"][:, None] - tensors["means"][:, None]
        rows = rows * tensors["spread"][:, None]
    else:
        rows = vectors[0] @ tensors["inverse"].inverse()
    want, margins = reference.additive_encode(rows.numpy(), codec.books.codebooks.numpy(), beam=3)
    packed = codec.encode(vectors)
    sure = 0
    for head, token in np.ndindex(2, 60):
        if margins[head, token].min() > 1e-4:
            sure += 1
            choice = reference.pack_codes(want[head, token], 4)
            assert packed[0, head, token].tolist() == choice.tolist()
    assert sure > 100


@pytest.mark.parametrize("side", ["key", "value"])
def test_tokens_are_encoded_alone_whatever_their_batch_and_memory_layout(side: str) -> None:
    codec = additive_codec(side)
    # Sums of codewords, so that no choice hangs on the last bit of a matrix product.
    vectors = torch.cat([exact_sums(codec, 9, seed)[0] for seed in range(3)])
    together = codec.encode(vectors)
    assert together.shape == (3, 2, 9, codec.code_bytes)
    assert together.dtype == torch.uint8
    assert together.is_contiguous()
    for batch, token in np.ndindex(3, 9):
        alone = codec.encode(vectors[batch, None, :, token, None])
        assert torch.equal(alone[0, :, 0], together[batch, :, token])
    strided = vectors.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(codec.encode(strided), together)
    decoded = codec.decode(together)
    torch.testing.assert_close(codec.decode(together[1:2, :, 4:5]), decoded[1:2, :, 4:5])
    torch.testing.assert_close(codec.decode(together[:, :, ::2]), decoded[:, :, ::2])


def test_half_precision_vectors_are_encoded_as_their_float32_values() -> None:
    codec = additive_codec()
    vectors = torch.randn(1, 2, 20, 16, generator=torch.Generator().manual_seed(7)).half()
    assert torch.equal(codec.encode(vectors), codec.encode(vectors.float()))


def test_no_tokens_make_no_codes() -> None:
    codec = additive_codec()
    codes = codec.encode(torch.zeros(2, 2, 0, 16))
    assert codes.shape == (2, 2, 0, codec.code_bytes)
    assert codec.decode(codes).shape == (2, 2, 0, 16)


@pytest.mark.parametrize(
    ("geometry", "code_bytes"),
    [
        ({"sub_dim": 32, "stages": 4, "code_bits": 8}, 16),
        ({"sub_dim": 32, "stages": 5, "code_bits": 6}, 15),
        ({"sub_dim": 64, "stages": 3, "code_bits": 3}, 3),  # 18 bits take 3 whole bytes
    ],
)
def test_bits_an_element_count_every_stored_byte(geometry: dict[str, int], code_bytes: int) -> None:
    codec = additive_codec(head_dim=128, **geometry)
    assert codec.encode(torch.zeros(1, 2, 1, 128)).shape[-1] == code_bytes
    assert codec.code_bytes == code_bytes
    assert codec.bits_per_element == 8 * code_bytes / 128
    assert AdditiveCodec.bits(codec.spec, codec.config()) == codec.bits_per_element


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_codec_is_rebuilt_from_its_tensors_and_config(side: str) -> None:
    codec = additive_codec(side)
    twin = AdditiveCodec.from_tensors(codec.spec, codec.config(), codec.tensors())
    vectors = torch.randn(1, 2, 30, 16, generator=torch.Generator().manual_seed(8))
    codes = codec.encode(vectors)
    assert torch.equal(twin.encode(vectors), codes)
    assert torch.equal(twin.decode(codes), codec.decode(codes))
    moved = codec.to("cpu")
    assert torch.equal(moved.decode(codes), codec.decode(codes))


@pytest.mark.parametrize("side", ["key", "value"])
def test_resident_bytes_count_every_tensor_that_a_codec_holds(side: str) -> None:
    codec = additive_codec(side)
    held = [value for value in vars(codec.books).values() if isinstance(value, torch.Tensor)]
    assert len(held) == (5 if side == "key" else 4)
    assert next(tensor for tensor in held if tensor.dim() == 5).dtype == torch.int8
    assert codec.resident_bytes == sum(tensor.nbytes for tensor in held)


def test_heads_fitted_apart_are_joined_in_order() -> None:
    codec = additive_codec("value")
    units = [{n: t[h : h + 1] for n, t in codec.tensors().items()} for h in range(2)]
    joined = AdditiveCodec.join(codec.spec, codec.config(), units)
    assert torch.equal(joined.books.codebooks, codec.books.codebooks)
    assert torch.equal(joined.books.inverse, codec.books.inverse)


BITS = [bits / 4 for bits in range(1, 17)]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_every_quarter_of_a_bit_can_be_planned(head_dim: int, bits: float) -> None:
    spec = SideSpec("key", 2, head_dim, head_dim)
    plan = AdditiveCodec.plan(spec, bits)
    assert AdditiveCodec.bits(spec, plan) == bits
    assert plan["sub_dim"] in ((48, 32) if head_dim == 96 else (64,))
    assert head_dim % plan["sub_dim"] == 0
    assert AdditiveConfig(**plan).codewords == 256


@pytest.mark.parametrize("bits", BITS)
def test_heads_of_80_dims_take_the_bits_that_divide_them_and_name_the_nearest_others(
    bits: float,
) -> None:
    spec = SideSpec("value", 1, 80, 0)
    if (bits * 2).is_integer():
        assert AdditiveCodec.bits(spec, AdditiveCodec.plan(spec, bits)) == bits
        return
    with pytest.raises(InputError, match=f"{bits:g} bits can't be reached with heads of 80") as no:
        AdditiveCodec.plan(spec, bits)
    for offered in no.value.mend.removeprefix("give ").split(" or "):
        plan = AdditiveCodec.plan(spec, float(offered))
        assert AdditiveCodec.bits(spec, plan) == float(offered)
        assert abs(float(offered) - bits) <= 0.25


@pytest.mark.parametrize("head_dim", [63, 100, 4])
def test_heads_that_no_sub_vector_divides_are_refused_in_one_line(head_dim: int) -> None:
    with pytest.raises(InputError, match=f"heads of {head_dim} dims can't be split") as refused:
        AdditiveCodec.plan(SideSpec("value", 1, head_dim, 0), 1.0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sub_dim": 7}, "sub_dim is 7, not an even number"),
        ({"sub_dim": 0}, "sub_dim is 0, not an even number"),
        ({"sub_dim": 32.0}, "sub_dim is 32.0, not a whole number"),
        ({"sub_dim": "32"}, "sub_dim is '32', not a whole number"),
        ({"stages": True}, "stages is True, not a whole number"),
        ({"stages": 0}, "impossible geometry"),
        ({"code_bits": 9}, "impossible geometry"),
        ({"code_bits": 0}, "impossible geometry"),
        ({"beam": 0}, "impossible knobs"),
        ({"fit_beam": 0}, "impossible knobs"),
        ({"rounds": -1}, "impossible knobs"),
    ],
)
def test_impossible_geometry_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdditiveConfig(**{"sub_dim": 32, "stages": 4, **change})


def _without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def _with(name: str, change: Any) -> Any:
    return lambda tensors: tensors.update({name: change(tensors[name].clone())})


def _put(value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("side", "damage", "message"),
    [
        ("key", _without("codebooks"), "tensor codebooks is missing"),
        ("key", _without("inverse"), "tensor inverse is missing"),
        ("key", _with("codebooks", lambda t: t[:, :1]), r"codebooks has shape \[2, 1, 3, 16, 8\]"),
        ("value", _with("inverse", lambda t: t[..., 0]), r"inverse has shape \[2, 16\], not"),
        ("key", _with("codebooks", torch.Tensor.float), "codebooks has dtype torch.float32, not"),
        ("key", _with("inverse", torch.Tensor.int), "inverse has dtype torch.int32"),
        ("key", _without("means"), "tensor means is missing"),
        ("key", _with("spread", _put(float("nan"))), "spread holds NaN"),
        ("key", _with("spread", torch.zeros_like), "spread holds a factor that is not positive"),
        ("key", _with("gains", lambda t: t * 0 + 255), "add up past 23000"),
        ("value", _with("scales", _put(float("inf"))), "scales holds NaN or infinity"),
        ("value", _with("inverse", _put(float("nan"))), "inverse holds NaN"),
        ("key", _with("inverse", torch.zeros_like), "factor that is not positive"),
        ("key", _with("inverse", torch.neg), "factor that is not positive"),
        ("value", _with("inverse", torch.zeros_like), "singular"),
    ],
)
def test_damaged_tensors_are_refused_by_name(side: str, damage: Any, message: str) -> None:
    codec = additive_codec(side)
    tensors = codec.tensors()
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        AdditiveCodec.from_tensors(codec.spec, codec.config(), tensors)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "does not describe an additive codec"),
        ({"stages": 3}, "does not describe an additive codec"),
        ({"sub_dim": 8, "stages": 3, "code_bits": 4, "extra": 1}, "does not describe"),
        ({"sub_dim": 10, "stages": 3, "code_bits": 4}, "sub_dim 10 does not divide head_dim 16"),
        ({"sub_dim": 8, "stages": 2, "code_bits": 4}, "codebooks has shape"),
    ],
)
def test_a_config_that_is_not_the_tensors_own_is_refused(
    config: dict[str, Any], message: str
) -> None:
    codec = additive_codec()
    with pytest.raises(ValueError, match=message):
        AdditiveCodec.from_tensors(codec.spec, config, codec.tensors())


@pytest.mark.parametrize(
    "fields",
    [("query", 1, 16, 0), ("key", 0, 16, 0), ("key", 1, 0, 0), ("key", 1, 16, 18)],
)
def test_an_impossible_side_is_refused(fields: tuple[str, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"side is 'query'|impossible geometry"):
        SideSpec(*fields)


def test_configs_go_through_json_unchanged() -> None:
    import json

    config = AdditiveConfig(sub_dim=16, stages=2, code_bits=5, beam=2)
    assert AdditiveConfig(**json.loads(json.dumps(asdict(config)))) == config
