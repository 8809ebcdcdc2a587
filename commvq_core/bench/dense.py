"""The paper's E-step as its release does it: every row against every centre, densely.

The rival of `fit.em.e_step` in `commvq bench train`; nothing else uses it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core.fit.em import Statistics, centres


def dense_e_step(
    rows: Tensor, theta: Tensor, temperature: float, *, squared: bool = False
) -> tuple[Statistics, Tensor]:
    """What `fit.em.e_step` returns, by a dense [n, count^2] matrix of distances."""
    count, dim = theta.shape
    middles = centres(theta)
    distance = torch.cdist(rows, middles, compute_mode="use_mm_for_euclid_dist")
    nearest = distance.argmin(dim=1)
    cost = distance.square() if squared else distance
    share = (-(cost / temperature)).softmax(dim=1)
    sums = (share.T @ rows).double().view(count, count, dim)
    weights = share.sum(dim=0, dtype=torch.float64).view(count, count)
    moments = torch.stack((sums.sum(dim=1), sums.sum(dim=0)))
    error = float((rows - middles[nearest]).double().square().sum(dim=1).mean())
    return Statistics(weights, moments, error), nearest.int()


def dense_encode(rows: Tensor, theta: Tensor) -> Tensor:
    """The nearest centre of each row, [n] int32."""
    return torch.cdist(rows, centres(theta)).argmin(dim=1).int()
