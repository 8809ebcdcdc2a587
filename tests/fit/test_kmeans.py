"""k-means, and the residual start of several stages."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from commvq_core.fit.kmeans import kmeans, nearest, residual_start


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int, each: int = 20) -> tuple[Tensor, Tensor]:
    """Tight groups of rows in 3 dims, and their centres."""
    centres = 10 * torch.randn(count, 3, generator=seeded(1))
    rows = centres.repeat_interleave(each, dim=0)
    return rows + 0.01 * torch.randn(rows.shape, generator=seeded(2)), centres


def cost(rows: Tensor, codewords: Tensor) -> float:
    return float(torch.cdist(rows.double(), codewords.double()).min(dim=1).values.square().sum())


def test_nearest_is_the_codeword_at_the_least_distance() -> None:
    rows, codewords = torch.randn(50, 6, generator=seeded()), torch.randn(9, 6, generator=seeded(1))
    distances = ((rows.numpy()[:, None] - codewords.numpy()[None]) ** 2).sum(-1)
    index = nearest(rows, codewords)
    assert index.dtype == torch.int64
    assert index.tolist() == distances.argmin(axis=1).tolist()


def test_each_codeword_ends_at_the_mean_of_its_rows() -> None:
    rows = torch.randn(300, 3, generator=seeded())
    codewords = kmeans(rows, 4, iterations=200, generator=seeded())
    index = nearest(rows, codewords)
    means = np.stack([rows.double().numpy()[index.numpy() == k].mean(axis=0) for k in range(4)])
    assert np.allclose(codewords.numpy(), means, atol=1e-5)


def test_more_iterations_never_cost_more() -> None:
    rows = torch.randn(400, 4, generator=seeded())
    costs = [cost(rows, kmeans(rows, 8, n, seeded(3))) for n in range(10)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(costs))
    assert costs[-1] < 0.9 * costs[0]


def test_codewords_that_lose_their_rows_start_again_where_the_fit_is_worst() -> None:
    # 24 copies of one row and 8 far outliers: random starts are mostly copies, of which all but one
    # lose their rows. Only by starting again can 9 codewords reach the 9 places.
    outliers = 100 * torch.eye(8, 3) + torch.arange(8.0)[:, None] * 37
    rows = torch.cat((torch.zeros(240, 3), outliers))
    codewords = kmeans(rows, 9, iterations=20, generator=seeded())
    assert cost(rows, codewords) < 1e-6


def test_rows_that_are_all_alike_are_no_trouble() -> None:
    codewords = kmeans(torch.full((40, 3), 2.5), 8, iterations=5, generator=seeded())
    assert torch.equal(codewords, torch.full((8, 3), 2.5))


def test_kmeans_leaves_its_rows_alone_and_depends_on_the_seed_alone() -> None:
    rows, _ = blobs(6)
    before = rows.clone()
    first = kmeans(rows, 4, 5, seeded(7))
    assert torch.equal(rows, before)
    assert torch.equal(kmeans(rows, 4, 5, seeded(7)), first)
    assert not torch.equal(kmeans(rows, 4, 5, seeded(8)), first)


def test_every_stage_starts_from_what_the_stages_before_left_over() -> None:
    coarse, fine = (
        10 * torch.randn(4, 3, generator=seeded(1)),
        torch.randn(4, 3, generator=seeded(2)),
    )
    rows = (coarse[:, None] + fine[None]).reshape(16, 3).repeat(10, 1)
    rows = rows + 1e-3 * torch.randn(rows.shape, generator=seeded(3))
    before = rows.clone()
    codebooks = residual_start(rows, 3, 4, 30, seeded())
    assert torch.equal(rows, before)
    assert codebooks.shape == (3, 4, 3)
    residual, energies = rows.clone(), [float(rows.square().sum())]
    for stage in codebooks:
        residual -= stage[nearest(residual, stage)]
        energies.append(float(residual.square().sum()))
    assert energies[1] < 0.2 * energies[0]
    assert energies[2] < 0.2 * energies[1]
    assert energies[3] <= energies[2]
