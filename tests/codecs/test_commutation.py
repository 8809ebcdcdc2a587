"""What CommVQ stands on: decoding is a sum, rotation is linear, so the two change places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commvq_core.codecs.additive import AdditiveCodec, AdditiveConfig
from commvq_core.codecs.base import FitData, SideSpec
from commvq_core.fit.metric import key_metric
from commvq_core.rope import Rotary, rotate_pairs
from tests import reference
from tests.codecs.samples import additive_codec, exact_sums

TOKENS = 6


def codeword_vectors(codec: AdditiveCodec, codes: torch.Tensor, head: int) -> np.ndarray:
    """Each codeword that `codes` [tokens, columns] names, as a key of its own, and the mean:
    [tokens, columns + 1, head_dim] float64, zero outside its sub-vector."""
    tensors = {name: tensor[head].double().numpy() for name, tensor in codec.tensors().items()}
    _, stages, _, sub_dim = tensors["codebooks"].shape
    tokens, columns = codes.shape
    out = np.zeros((tokens, columns + 1, codec.spec.head_dim))
    for token, column in np.ndindex(tokens, columns):
        sub, stage = divmod(column, stages)
        part = slice(sub * sub_dim, (sub + 1) * sub_dim)
        codeword = tensors["codebooks"][sub, stage, int(codes[token, column])]
        out[token, column, part] = (
            codeword * tensors["gains"][sub, stage] * tensors["inverse"][part]
        )
    out[:, columns] = tensors["means"] * tensors["inverse"]
    return out


def angles_of(positions: np.ndarray, rotary_dim: int) -> np.ndarray:
    return positions[:, None] * 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)


@pytest.mark.parametrize("sub_dim", [2, 8, 16])
def test_a_querys_score_is_the_sum_of_its_scores_with_the_rotated_codewords(sub_dim: int) -> None:
    codec = additive_codec(sub_dim=sub_dim)
    keys, codes = exact_sums(codec, TOKENS)
    positions = np.array([0.0, 1.0, 5.0, 63.0, 1000.0, 4095.0])
    angles = angles_of(positions, 16)
    query = np.random.default_rng(0).normal(size=16)
    for head in range(2):
        words = codeword_vectors(codec, codes[head], head)
        turned = reference.rotate(words, angles[:, None], rotary_dim=16, layout="interleaved")
        of_codewords = (turned @ query).sum(axis=1)
        whole = reference.rotate(keys[0, head].numpy(), angles, rotary_dim=16, layout="interleaved")
        assert np.allclose(whole @ query, of_codewords, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rotary_dim", [16, 8, 0])
def test_decoding_then_rotating_equals_rotating_each_codeword_then_adding(rotary_dim: int) -> None:
    codec = additive_codec()
    keys, codes = exact_sums(codec, TOKENS)
    positions = torch.tensor([0, 1, 5, 63, 1000, 4095])
    inv_freq = 10000.0 ** (-torch.arange(0, max(1, rotary_dim), 2)[: rotary_dim // 2] / 16)
    cos, sin = Rotary(rotary_dim, "half", inv_freq).cos_sin(positions)
    decoded = codec.decode(codec.encode(keys))
    fast = rotate_pairs(decoded, cos, sin)
    angles = positions.double().numpy()[:, None] * inv_freq.double().numpy()
    for head in range(2):
        words = codeword_vectors(codec, codes[head], head)
        turned = reference.rotate(
            words, angles[:, None], rotary_dim=rotary_dim, layout="interleaved"
        )
        assert np.abs(fast[0, head].double().numpy() - turned.sum(axis=1)).max() < 2e-3
        # The tolerance is float32's angle at position 4,095; nearer positions show the identity.
        assert np.abs(fast[0, head, :4].double().numpy() - turned[:4].sum(axis=1)).max() < 2e-5


def test_a_fitted_key_codec_scales_both_dims_of_a_pair_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    spec = SideSpec("key", 1, 16, 16)
    config = AdditiveConfig(sub_dim=8, stages=1, code_bits=2, rounds=1)
    energy = torch.rand(1, 8, generator=generator) * 50
    rows = torch.randn(64, 1, 16, generator=generator)
    fitted = AdditiveCodec.fit(spec, vars(config), FitData(rows, key_metric(energy), seed=0))
    inverse = fitted["inverse"]
    assert torch.equal(inverse[:, 0::2], inverse[:, 1::2])
    assert inverse.unique().numel() == 8


def test_factors_that_differ_within_a_pair_are_refused_since_they_do_not_commute() -> None:
    codec = additive_codec()
    tensors = codec.tensors()
    tensors["inverse"] = tensors["inverse"].clone()
    tensors["inverse"][1, 5] *= 1.01
    with pytest.raises(ValueError, match="inverse differs within a pair"):
        AdditiveCodec.from_tensors(codec.spec, codec.config(), tensors)
    unrotated = SideSpec("key", 2, 16, 4)  # dims from 4 on do not rotate and may differ
    AdditiveCodec.from_tensors(unrotated, codec.config(), tensors)
