"""The paper's EM: its E-step, its M-step and what a round promises, against dense float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from commvq_core.fit import em
from tests import reference


def clustered(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(12, dim, generator=generator)
    chosen = torch.randint(12, (n,), generator=generator)
    return middles[chosen] + 0.3 * torch.randn(n, dim, generator=generator)


def from_complex(z: np.ndarray) -> np.ndarray:
    return np.stack((z.real, z.imag), axis=-1).reshape(*z.shape[:-1], -1)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("squared", [False, True])
def test_the_product_e_step_is_the_dense_one(temperature: float, squared: bool) -> None:
    rows, theta = clustered(90, 12), clustered(7, 12, seed=1)
    statistics, nearest = em.e_step(rows, theta, temperature, squared=squared)
    x, complex_theta = reference.complex_pairs(rows.numpy()), reference.complex_pairs(theta.numpy())
    share, distance = reference.dense_estep(x, complex_theta, temperature, squared)
    np.testing.assert_allclose(statistics.weights, share.sum(axis=0), atol=5e-3)
    first = from_complex(np.einsum("nab,nj->aj", share, x))
    second = from_complex(np.einsum("nab,nj->bj", share, x))
    np.testing.assert_allclose(statistics.moments[0], first, atol=2e-2)
    np.testing.assert_allclose(statistics.moments[1], second, atol=2e-2)
    np.testing.assert_array_equal(nearest, distance.reshape(len(x), -1).argmin(axis=1))
    assert statistics.error == pytest.approx(distance.min(axis=(1, 2)).mean(), rel=1e-4)


def test_centres_are_theta_a_plus_i_theta_b() -> None:
    theta = clustered(5, 8)
    expected = reference.product_centres(reference.complex_pairs(theta.numpy()))
    np.testing.assert_allclose(
        em.centres(theta), from_complex(expected).reshape(25, 8), rtol=1e-6, atol=1e-6
    )
    index = torch.arange(25)
    assert torch.equal(em.decode_round(theta, index), em.centres(theta))


def test_the_m_step_is_the_least_squares_optimum() -> None:
    rows, theta = clustered(60, 6), clustered(5, 6, seed=2)
    statistics, _ = em.e_step(rows, theta, 0.5)
    x, old = reference.complex_pairs(rows.numpy()), reference.complex_pairs(theta.numpy())
    share, _ = reference.dense_estep(x, old, 0.5)
    expected = reference.dense_mstep(x, share, 5)
    np.testing.assert_allclose(em.m_step(statistics, theta), from_complex(expected), atol=2e-3)


def test_an_index_that_nothing_uses_stays_where_it_was() -> None:
    theta = clustered(4, 6)
    weights = torch.zeros(4, 4, dtype=torch.float64)
    weights[0, 1] = 5.0
    moments = torch.zeros(2, 4, 6, dtype=torch.float64)
    moments[0, 0] = moments[1, 1] = 5.0
    solved = em.m_step(em.Statistics(weights, moments, 0.0), theta)
    assert torch.allclose(solved[2:], theta[2:], atol=1e-4)
    assert torch.allclose(em.decode_round(solved, torch.tensor(1)), torch.ones(6), atol=1e-4)


def test_the_objective_never_rises_at_a_fixed_temperature() -> None:
    """With squared distances the two steps are an exact EM: free energy falls at each."""
    rows, temperature = clustered(400, 8), 0.2
    theta = em.start(rows, 6, torch.Generator().manual_seed(3))
    x, energies = reference.complex_pairs(rows.numpy()), []
    for _ in range(12):
        statistics, _ = em.e_step(rows, theta, temperature, squared=True)
        distance = reference.dense_estep(
            x, reference.complex_pairs(theta.numpy()), temperature, True
        )[1].reshape(len(x), -1)
        least = distance.min(axis=1, keepdims=True)
        sums = np.exp((least - distance) / temperature).sum(axis=1)
        energies.append(float((least[:, 0] - temperature * np.log(sums)).mean()))
        theta = em.m_step(statistics, theta)
    assert all(after <= before + 1e-6 for before, after in pairwise(energies))
    assert energies[-1] < energies[0] - 0.01


def test_a_round_returns_the_best_that_it_saw() -> None:
    rows = clustered(600, 8)
    first = em.start(rows, 8, torch.Generator().manual_seed(0))
    before = em.e_step(rows, first, 1e-3)[0].error
    theta, error = em.fit_round(rows, first, 1.0, em.Annealing(steps=20))
    assert error < before
    assert em.e_step(rows, theta, 1e-3)[0].error == pytest.approx(error, rel=1e-5)


def test_every_round_lowers_what_is_left_and_the_seed_decides() -> None:
    rows = clustered(800, 8)

    def fit(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return em.fit_rounds(rows, 3, 8, em.Annealing(steps=15), generator)

    theta, residual = fit(1), rows
    left = [float(residual.square().sum())]
    for book in theta:
        residual = residual - em.decode_round(book, em.encode_round(residual, book))
        left.append(float(residual.square().sum()))
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.2 * left[0]
    assert torch.equal(theta, fit(1))
    assert not torch.equal(theta, fit(2))


def test_temperatures_fall_as_the_paper_says() -> None:
    annealing = em.Annealing(steps=100)
    assert annealing.temperature(0, 1.0) == pytest.approx(1e-3)
    assert annealing.temperature(99, 0.1) == pytest.approx(1e-6)
    assert [em.round_scale(r) for r in (0, 1, 4, 5, 8, 9)] == pytest.approx(
        [1, 0.1, 0.1, 0.01, 0.01, 0.001]
    )
