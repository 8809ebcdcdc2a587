"""Each rival computes what its paper says: compared with rivals_reference's loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from commvq_core.codecs.hadamard_int import HadamardIntCodec
from commvq_core.codecs.kivi import KiviKeyCodec, KiviValueCodec
from commvq_core.codecs.kvquant import KVQuantKeyCodec
from commvq_core.codecs.rival import RivalCodec
from commvq_core.codecs.rotation import hadamard, random_rotation
from commvq_core.codecs.turboquant import sphere_levels
from tests.codecs import rivals_reference as naive
from tests.codecs.test_rivals import rival, vectors


def decoded(codec: RivalCodec, x: Tensor) -> np.ndarray:
    return codec.decode(codec.encode(x)).double().numpy()


def close_but_for_ties(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal up to float32, but for numbers halfway between two levels or steps halfway in fp16."""
    return bool(np.isclose(found, wanted, rtol=1e-4, atol=1e-4).mean() > 0.99)


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("width", KiviKeyCodec.widths)
def test_kivi_is_per_channel_for_keys_and_per_token_for_values(width: int, dim: int) -> None:
    x = vectors(2, dim)
    keys = decoded(rival(f"kivi-{width}", "key", dim, heads=2), x)
    values = decoded(rival(f"kivi-{width}", "value", dim, heads=2), x)
    group = {64: 32, 80: 20}[dim]
    for row in range(2):
        for head in range(2):
            one = x[row, head].double().numpy()
            assert close_but_for_ties(keys[row, head], naive.kivi_keys(one, width))
            assert close_but_for_ties(values[row, head], naive.kivi_values(one, width, group))


def test_groups_without_a_range_and_large_numbers_survive() -> None:
    flat = torch.full((1, 1, 32, 64), -3.25)
    large = torch.full((1, 1, 32, 64), 6e4)
    large[..., 0] = -6e4
    spec = rival("kivi-2", "key", 64, heads=1).spec
    for x in (flat, large, torch.zeros(1, 1, 32, 64)):
        for kind in (KiviKeyCodec, KiviValueCodec, HadamardIntCodec):
            codec = kind(spec, 2)
            assert codec.decode(codec.encode(x)).isfinite().all()
    assert (decoded(KiviValueCodec(spec, 2), flat) == -3.25).all()


@pytest.mark.parametrize(("dim", "block"), [(64, 64), (80, 16), (96, 32)])
def test_the_hadamard_rotation_is_walshs_with_signs_in_blocks(dim: int, block: int) -> None:
    rotation = hadamard(dim).double().numpy()
    assert np.allclose(rotation @ rotation.T, np.eye(dim), atol=1e-6)
    signs = np.sign(rotation[:, np.arange(dim) // block * block].diagonal())
    assert set(signs) == {-1.0, 1.0}
    for start in range(0, dim, block):
        part = slice(start, start + block)
        own = signs[part, None] * rotation[part, part] * block**0.5
        assert np.allclose(own, naive.walsh(block), atol=1e-6)
    assert np.count_nonzero(rotation) == dim * block


@pytest.mark.parametrize("width", HadamardIntCodec.widths)
def test_int_quantizes_the_rotated_token_between_clipped_ends(width: int) -> None:
    x = vectors(2, 64)
    found = decoded(rival(f"int-{width}", "value", 64, heads=2), x)
    rotation = hadamard(64).double().numpy()
    wanted = np.empty_like(found)
    clip = 1.0 if width == 8 else 0.95
    for index in np.ndindex(2, 2, 96):
        rotated = x[index].double().numpy() @ rotation
        wanted[index] = naive.asymmetric(rotated, width, clip) @ rotation.T
    errors = np.abs(found - wanted).max(axis=-1)
    # A tie that float32 breaks the other way moves a whole token a little.
    assert (errors < 1e-4).mean() > 0.97


def test_turboquants_levels_become_those_of_the_normal_distribution() -> None:
    for width in (1, 2, 3, 4):
        wide = sphere_levels(20_000, width).double() * 20_000**0.5
        assert wide.tolist() == pytest.approx(naive.normal_levels(2**width), abs=5e-3)


def test_turboquants_levels_are_the_best_for_directions() -> None:
    """Against 200,000 random directions: every level is the mean of what is stored as it."""
    dim, generator = 16, torch.Generator().manual_seed(0)
    x = torch.randn(200_000, dim, generator=generator)
    x = (x / x.norm(dim=1, keepdim=True)).flatten()
    levels = sphere_levels(dim, 2)
    index = (x[:, None] - levels).abs().argmin(dim=1)
    means = torch.stack([x[index == i].mean() for i in range(4)])
    assert (means - levels).abs().max() < 2e-3


def test_turboquant_stores_the_nearest_levels_of_the_rotated_direction() -> None:
    x, rotation = vectors(2, 64), random_rotation(64).double().numpy()
    assert np.allclose(rotation @ rotation.T, np.eye(64), atol=1e-6)
    found = decoded(rival("turboquant-3", "key", 64, heads=2), x)
    levels = sphere_levels(64, 3).double().numpy()
    wanted = np.empty_like(found)
    for index in np.ndindex(2, 2, 96):
        one = x[index].double().numpy()
        norm = np.linalg.norm(one)
        rotated = [naive.nearest(y, levels) for y in one / norm @ rotation]
        wanted[index] = np.float16(norm) * (np.array(rotated) @ rotation.T)
    assert close_but_for_ties(found, wanted)


def test_turboquants_error_is_the_papers() -> None:
    """Theorem 1 of the paper: 0.36, 0.117, 0.03, 0.009 of the energy at 1 to 4 bits."""
    x = torch.randn(1, 1, 2000, 128, generator=torch.Generator().manual_seed(0))
    for width, expected in ((1, 0.36), (2, 0.117), (3, 0.034), (4, 0.009)):
        codec = rival(f"turboquant-{width}", "key", 128, heads=1)
        error = (codec.decode(codec.encode(x)) - x).square().sum() / x.square().sum()
        assert float(error) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("width", KVQuantKeyCodec.widths)
def test_kvquant_maps_ranges_to_levels_and_keeps_outliers(width: int) -> None:
    x = vectors(3, 64)
    x[:, 1, ::5, 7] *= 30  # outliers
    keys, values = (rival(f"kvquant-{width}", side, 64) for side in ("key", "value"))
    middle, half = keys.tensors()["ends"].double().numpy()
    rows = x.transpose(1, 2).flatten(2).double().numpy()
    for codec, wanted in (
        (keys, [naive.kvquant_keys(r, levels_of(keys), middle, half, 64, 32) for r in rows]),
        (values, [naive.kvquant_values(r, levels_of(values), 1) for r in rows]),
    ):
        found = torch.from_numpy(decoded(codec, x)).transpose(1, 2).flatten(2).numpy()
        assert close_but_for_ties(found, np.stack(wanted))


def levels_of(codec: RivalCodec) -> np.ndarray:
    return codec.tensors()["levels"].double().numpy()


def test_kvquants_ends_leave_one_number_in_a_hundred_outside() -> None:
    rows = vectors(3, 64, 512, seed=1)[0].transpose(0, 1).flatten(1)
    middle, half = rival("kvquant-2", "key", 64).tensors()["ends"]
    outside = ((rows - middle).abs() > half * (1 + 1e-6)).float().mean(dim=0)
    assert ((outside > 0.004) & (outside <= 0.012)).all()


def test_kvquants_levels_are_weighted_by_what_an_error_costs() -> None:
    """Half of the channels are normal, half have two values; the metric says which count."""
    from commvq_core.codecs.base import FitData, SideSpec

    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, 1, 8, generator=generator)
    two = torch.randint(2, (4000, 1, 8), generator=generator) * 2.0 - 1
    rows, spec = torch.cat((normal, two), dim=2), SideSpec("key", 1, 16, 16)
    levels = []
    for weights in ((1.0, 1e-6), (1e-6, 1.0)):
        metric = torch.diag(torch.tensor(weights).repeat_interleave(8))[None]
        codec = KVQuantKeyCodec.make(spec, 1, FitData(rows, metric, seed=0))
        levels.append(levels_of(codec))
    # A normal channel's ends are at 2.58 standard deviations, its best two levels at 0.8.
    assert levels[0] == pytest.approx([-0.8 / 2.58, 0.8 / 2.58], abs=0.03)
    assert levels[1] == pytest.approx([-1, 1], abs=0.01)
