"""Rotation: held to complex multiplication, and its ways to and from canonical pairs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from commvq_core.rope import Rotary, from_pairs, pair_table, rotate, to_pairs, unrotate
from tests import reference

HEAD_DIM = 16
CASES = [(layout, dim) for layout in ("half", "interleaved") for dim in (HEAD_DIM, 12, 4, 2)]
TABLES = {
    "a column a pair": lambda table: table,
    "the table twice": lambda table: torch.cat((table, table), dim=-1),
    "each column twice": lambda table: table.repeat_interleave(2, dim=-1),
}


def sample(rotary_dim: int, scale: float = 1.0) -> SimpleNamespace:
    """Vectors [2, 3, 5, head_dim] at positions of their own, and their tables, in float64."""
    generator = torch.Generator().manual_seed(rotary_dim)
    x = torch.randn(2, 3, 5, HEAD_DIM, generator=generator, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 700, 4000], [3, 9, 27, 81, 243]])
    inv_freq = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim).double()
    angles = (positions[:, None, :, None] * inv_freq).double()
    return SimpleNamespace(
        x=x, angles=angles, cos=angles.cos() * scale, sin=angles.sin() * scale, scale=scale
    )


def close(got: Tensor, want: np.ndarray) -> bool:
    return bool(np.abs(got.double().numpy() - want).max() < 1e-5)


@pytest.mark.parametrize("scale", [1.0, 1.35], ids=["plain", "scaled"])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("layout", "rotary_dim"), CASES)
def test_rotation_is_complex_multiplication(
    layout: str, rotary_dim: int, table: str, scale: float
) -> None:
    data, widen = sample(rotary_dim, scale), TABLES[table]
    got = rotate(data.x, widen(data.cos), widen(data.sin), rotary_dim=rotary_dim, layout=layout)
    want = reference.rotate(
        data.x.numpy(), data.angles.numpy(), rotary_dim=rotary_dim, layout=layout, scale=scale
    )
    assert got.dtype == torch.float32
    assert close(got, want)
    assert not close(got, data.x.numpy())


@pytest.mark.parametrize(("layout", "rotary_dim"), CASES)
def test_unrotating_gives_the_vector_back_whatever_the_tables_scale(
    layout: str, rotary_dim: int
) -> None:
    data = sample(rotary_dim, scale=1.35)
    turned = reference.rotate(
        data.x.numpy(), data.angles.numpy(), rotary_dim=rotary_dim, layout=layout, scale=1.35
    )
    back = unrotate(
        torch.from_numpy(turned), data.cos, data.sin, rotary_dim=rotary_dim, layout=layout
    )
    assert close(back, data.x.numpy())


@pytest.mark.parametrize(("layout", "rotary_dim"), CASES)
def test_canonical_order_has_pair_j_at_2j_and_unrotated_dims_last(
    layout: str, rotary_dim: int
) -> None:
    index = torch.arange(HEAD_DIM)
    pairs = to_pairs(index, rotary_dim=rotary_dim, layout=layout)
    for j in range(rotary_dim // 2):
        want = (2 * j, 2 * j + 1) if layout == "interleaved" else (j, j + rotary_dim // 2)
        assert (int(pairs[2 * j]), int(pairs[2 * j + 1])) == want
    assert pairs[rotary_dim:].tolist() == list(range(rotary_dim, HEAD_DIM))
    assert torch.equal(from_pairs(pairs, rotary_dim=rotary_dim, layout=layout), index)


def test_a_layer_without_rope_is_left_alone() -> None:
    x, table = torch.randn(1, 2, HEAD_DIM), torch.randn(1, 2, 8)
    for function in (rotate, unrotate):
        assert torch.equal(function(x, table, table, rotary_dim=0, layout="half"), x)


@pytest.mark.parametrize("width", [3, 8, 12])
def test_a_table_that_describes_no_pairs_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"a rotary table of width {width} does not describe 6"):
        pair_table(torch.randn(4, width), 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tables_equal_the_models_own_bit_for_bit(dtype: torch.dtype) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        head_dim=HEAD_DIM,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 128,
        },
        max_position_embeddings=512,
    )
    embedding = LlamaRotaryEmbedding(config)
    positions = torch.tensor([[0, 1, 7, 500, 100_000]])
    cos, sin = embedding(torch.zeros(1, dtype=dtype), positions)
    rotary = Rotary(HEAD_DIM, "half", embedding.inv_freq, embedding.attention_scaling)
    assert embedding.attention_scaling > 1.1
    for own, ours in zip((cos, sin), rotary.cos_sin(positions, dtype), strict=True):
        assert own.dtype == dtype
        assert torch.equal(pair_table(own, HEAD_DIM).float(), ours)
