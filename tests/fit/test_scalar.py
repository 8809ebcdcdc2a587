"""Lloyd's algorithm for single numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from commvq_core.fit.scalar import lloyd_max, nearest_level


def test_two_clusters_get_their_weighted_means() -> None:
    values = torch.tensor([9.0, 1.0, 2.0, 11.0])
    weights = torch.tensor([1.0, 1.0, 3.0, 1.0])
    assert lloyd_max(values, weights, 2).tolist() == [1.75, 10.0]


def test_no_cut_of_a_small_sample_is_better() -> None:
    """Against every way to cut eleven sorted numbers into three stretches."""
    values = torch.tensor([0.0, 0.1, 0.3, 0.35, 2.0, 2.2, 2.3, 2.4, 7.0, 7.1, 7.5]).double()
    levels = lloyd_max(values, torch.ones(11), 3)
    found = (values[:, None] - levels).square().amin(dim=1).sum()
    best = min(
        sum(float(part.var(correction=0)) * len(part) for part in values.tensor_split(cuts))
        for cuts in itertools.combinations(range(1, 11), 2)
    )
    assert float(found) == pytest.approx(best)


def test_fewer_values_than_levels_lose_nothing() -> None:
    values = torch.tensor([3.0, 3.0, 5.0])
    levels = lloyd_max(values, torch.ones(3), 4)
    assert levels.isfinite().all()
    assert (values[:, None] - levels).abs().amin(dim=1).max() == 0


def test_the_nearest_level_is_chosen() -> None:
    levels = torch.tensor([-1.0, 0.0, 4.0])
    values = torch.linspace(-3, 6, 200)
    wanted = (values[:, None] - levels).abs().argmin(dim=1)
    assert nearest_level(values, levels).tolist() == wanted.tolist()
