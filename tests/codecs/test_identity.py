"""The oracle loses nothing."""

from __future__ import annotations

import torch

from commvq_core.codecs.base import SideSpec
from commvq_core.codecs.identity import IdentityCodec
from commvq_core.codecs.registry import CODECS, PRESETS


def test_the_identity_codec_gives_every_float_back_in_32_bits() -> None:
    codec = IdentityCodec(SideSpec("key", 2, 16, 16))
    vectors = torch.randn(3, 2, 5, 16).transpose(2, 3).contiguous().transpose(2, 3)
    vectors[0, 0, 0, 0], vectors[0, 0, 0, 1] = float("inf"), -0.0
    codes = codec.encode(vectors)
    assert codes.shape == (3, 2, 5, codec.code_bytes)
    assert torch.equal(codec.decode(codes), vectors)
    assert codec.bits_per_element == 32
    assert codec.resident_bytes == 0
    twin = IdentityCodec.from_tensors(codec.spec, codec.config(), codec.tensors())
    assert torch.equal(twin.decode(codes), vectors)


def test_codecs_are_found_by_their_own_names_and_presets_name_known_ones() -> None:
    assert all(codec.name == name for name, codec in CODECS.items())
    assert all(codec in CODECS.values() for pair in PRESETS.values() for codec in pair)
