"""Metrics: positive definite whatever was measured, and turned into plain squared error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commvq_core.fit.metric import key_metric, key_transform, value_metric, value_transform

DIM = 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ENERGIES = {
    "random": torch.rand(3, DIM // 2, generator=seeded()),
    "some never looked at": torch.tensor([[0.0, 0.0, 1.0, 9.0]]),
    "no query at all": torch.zeros(2, DIM // 2),
    "tiny": torch.full((1, DIM // 2), 1e-12),
    "huge": torch.full((1, DIM // 2), 1e12),
}


@pytest.mark.parametrize("name", ENERGIES)
def test_the_key_metric_is_diagonal_and_positive_and_equal_within_a_pair(name: str) -> None:
    metric = key_metric(ENERGIES[name])
    weights = metric.diagonal(dim1=-2, dim2=-1)
    assert torch.equal(metric, torch.diag_embed(weights))
    assert bool((weights > 0).all())
    assert torch.equal(weights[:, 0::2], weights[:, 1::2])
    assert bool(key_transform(metric[0]).isfinite().all())


def test_the_key_metric_weighs_a_pair_by_its_queries_energy() -> None:
    energy = ENERGIES["random"]
    weights = key_metric(energy).diagonal(dim1=-2, dim2=-1)[:, 0::2]
    extra = weights - energy
    # The floor: a thousandth of the mean, the same for all pairs of a head.
    want = 1e-3 * energy.mean(dim=1, keepdim=True).expand_as(energy)
    torch.testing.assert_close(extra, want, rtol=1e-3, atol=1e-7)


def test_the_weighted_error_of_a_key_is_the_expected_squared_logit_error() -> None:
    """E |q . R e|^2 over queries whose pairs have random phases, as RoPE makes of them."""
    random = np.random.default_rng(0)
    error = random.normal(size=DIM)
    magnitude = random.uniform(0.5, 3.0, size=DIM // 2)
    phases = random.uniform(0, 2 * np.pi, size=(200_000, DIM // 2))
    queries = magnitude * np.exp(1j * phases)
    pairs = error[0::2] + 1j * error[1::2]
    logits = (queries * pairs.conj()).real.sum(axis=1)
    metric = key_metric(torch.from_numpy(magnitude**2)[None])[0].double().numpy()
    # Half of |q_j|^2 |e_j|^2 is left once the phase is averaged: a common factor.
    assert np.isclose((logits**2).mean(), 0.5 * error @ metric @ error, rtol=0.02)


def test_key_factors_turn_the_root_of_the_metric_into_squared_error() -> None:
    metric = key_metric(ENERGIES["random"])[0]
    factors = key_transform(metric)
    error = torch.randn(20, DIM, generator=seeded(1)).double()
    root = metric.diagonal().double().sqrt()
    want = (error.square() * root).sum(dim=1)
    scale = root.mean()
    torch.testing.assert_close((error * factors).square().sum(1) * scale, want, rtol=1e-5, atol=0)
    assert factors.square().mean().item() == pytest.approx(1)


def grams() -> dict[str, torch.Tensor]:
    full = torch.randn(20, DIM, generator=seeded(2))
    flat = torch.randn(3, DIM, generator=seeded(3))
    dead = full.clone()
    dead[:, 2] = 0
    return {
        "full rank": full.T @ full,
        "rank 3": flat.T @ flat,
        "a dim that o_proj ignores": dead.T @ dead,
        "zero": torch.zeros(DIM, DIM),
        "tiny": 1e-12 * (full.T @ full),
    }


@pytest.mark.parametrize("name", grams())
def test_the_value_metric_is_positive_definite(name: str) -> None:
    gram = grams()[name]
    metric = value_metric(torch.stack((gram, 2 * gram)))
    assert metric.shape == (2, DIM, DIM)
    assert bool((torch.linalg.eigvalsh(metric.double()) > 0).all())
    forward, inverse = value_transform(metric[0])
    torch.testing.assert_close(forward @ inverse, torch.eye(DIM), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["full rank", "rank 3", "a dim that o_proj ignores", "tiny"])
def test_the_value_transform_turns_the_metric_into_squared_error(name: str) -> None:
    metric = value_metric(grams()[name][None])[0]
    forward, _ = value_transform(metric)
    error = torch.randn(20, DIM, generator=seeded(4)).double()
    want = torch.einsum("nd,de,ne->n", error, metric.double(), error)
    got = (error @ forward.double()).square().sum(dim=1) * metric.diagonal().double().mean()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_the_value_transform_is_the_symmetric_root_that_keeps_dims_in_place() -> None:
    diagonal = torch.tensor([1.0, 4.0, 9.0, 16.0])
    forward, inverse = value_transform(torch.diag(diagonal))
    torch.testing.assert_close(forward, torch.diag((diagonal / 7.5).sqrt()))
    torch.testing.assert_close(inverse, torch.diag((7.5 / diagonal).sqrt()))
    general, _ = value_transform(value_metric(grams()["full rank"][None])[0])
    torch.testing.assert_close(general, general.T, rtol=0, atol=1e-6)
