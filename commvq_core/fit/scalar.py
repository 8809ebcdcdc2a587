"""Non-uniform levels for single numbers: Lloyd's algorithm on a sorted sample (Lloyd-Max)."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_ROUNDS = 1000


def lloyd_max(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """The `count` levels that lose least of `values` [n], each loss weighted: float64, ascending.

    `weights` [n] at least 0. Starts from weighted quantiles and stops when no value changes its
    level, so a sample always gives the same levels.
    """
    values, order = values.double().sort()
    weights = weights.double()[order]
    # Sums up to every value, so that those of a stretch are a difference.
    mass = torch.nn.functional.pad(weights.cumsum(0), (1, 0))
    moment = torch.nn.functional.pad((weights * values).cumsum(0), (1, 0))
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count * mass[-1]
    levels = values[torch.searchsorted(mass[1:], shares).clamp_max(len(values) - 1)]
    before = None
    for _ in range(_MOST_ROUNDS):
        inner = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat((inner.new_zeros(1), inner, inner.new_full((1,), len(values))))
        if before is not None and torch.equal(ends, before):
            break
        before, own = ends, mass[ends].diff()
        levels = torch.where(own > 0, moment[ends].diff() / own.clamp_min(1e-300), levels)
    return levels.sort().values


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """Index uint8 of the level nearest to each value; `levels` [n] ascending, n at most 256."""
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(values, middles.to(values.dtype)).to(torch.uint8)
