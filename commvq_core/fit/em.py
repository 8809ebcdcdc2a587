"""The paper's key codebooks: soft expectation maximisation over product centres (section 4.1).

A centre is c_ab = theta_a + i theta_b, complex over the pairs that RoPE rotates, so `count`
codewords make count^2 centres. Vectors stay real here: pair j is dims 2j and 2j + 1 of a canonical
vector, and i theta swaps them with a sign.

The E-step never makes a centre or a dense matrix of distances: |x - theta_a - i theta_b|^2 needs
the inner products of x with 2 * count codewords and one count x count table. The M-step needs
W_ab, how much weight each centre has, and the first moments of both indices, so that vectors are
streamed in blocks and memory does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from commvq_core import ops

_BLOCK = 8192  # vectors at once
_HARD = 1e-30  # a temperature at which only the nearest centre has a share
_RIDGE = 1e-6  # of the mean diagonal: indices that no vector uses stay where they were


@dataclass(frozen=True)
class Annealing:
    """How one round is fitted. Temperatures are in units of the distance, before `scale`."""

    steps: int = 100
    hottest: float = 1e-3
    coldest: float = 1e-5
    patience: int = 3

    def temperature(self, step: int, scale: float) -> float:
        """Falls exponentially from `hottest` to `coldest`."""
        share = step / max(1, self.steps - 1)
        return scale * self.hottest * (self.coldest / self.hottest) ** share


@dataclass(frozen=True)
class Statistics:
    """What an M-step needs. `weights` [count, count], `moments` [2, count, dim], all float64.

    moments[0, a] = sum over rows of the share of a times x, moments[1, b] the same for b. `error`
    is the mean of |x - c|^2 for the nearest centre c of every row.
    """

    weights: Tensor
    moments: Tensor
    error: float


def times_i(x: Tensor) -> Tensor:
    """i * x for complex pairs stored as neighbours: (re, im) -> (-im, re)."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)


def centres(theta: Tensor) -> Tensor:
    """theta [count, dim] -> [count * count, dim]; row a * count + b is theta_a + i theta_b."""
    return (theta[:, None] + times_i(theta)[None]).flatten(0, 1)


def centre_norms(theta: Tensor) -> Tensor:
    """theta [..., count, dim] -> [..., count, count] of |theta_a + i theta_b|^2, float32."""
    exact = theta.double()
    norms = exact.square().sum(dim=-1)
    mixed = exact @ times_i(exact).transpose(-1, -2)
    return (norms[..., :, None] + norms[..., None, :] + 2 * mixed).float()


def e_step(
    rows: Tensor, theta: Tensor, temperature: float, *, squared: bool = False
) -> tuple[Statistics, Tensor]:
    """Shares of every row in every centre, as statistics, and the nearest centre [n] int32.

    `rows` [n, dim] and `theta` [count, dim] float32. Shares are softmax(-distance / temperature),
    of the distance as in the paper or, `squared`, of its square.
    """
    count, dim = theta.shape
    books, table = torch.cat((theta, times_i(theta))), centre_norms(theta)
    weights = torch.zeros(count, count, dtype=torch.float64)
    moments = torch.zeros(2 * count, dim, dtype=torch.float64)
    total, nearest = 0.0, []
    for block in rows.split(_BLOCK):
        products = block @ (-2.0 * books).T
        share, marginals, best, least = ops.product_estep(
            products, block.square().sum(dim=-1), table, temperature, squared
        )
        weights += share
        moments += (marginals.T @ block).double()
        total += float(least.double().sum())
        nearest.append(best)
    statistics = Statistics(weights, moments.view(2, count, dim), total / max(1, len(rows)))
    return statistics, torch.cat(nearest)


def m_step(statistics: Statistics, theta: Tensor) -> Tensor:
    """The theta that minimises sum_ab W_ab |m_ab - theta_a - i theta_b|^2, float32 [count, dim].

    The normal equations G theta = R - i C have G = diag(row sums + column sums) + i (W - W^T),
    Hermitian and the same for every pair. `theta` is what indices without weight keep.
    """
    weights = statistics.weights
    used = weights.sum(dim=1) + weights.sum(dim=0)
    ridge = _RIDGE * float(used.mean()) + 1e-30
    gram = torch.complex(torch.diag(used + ridge), weights - weights.T)
    first, second = (torch.view_as_complex(m.unflatten(-1, (-1, 2))) for m in statistics.moments)
    old = torch.view_as_complex(theta.double().unflatten(-1, (-1, 2)))
    solved = torch.linalg.solve(gram, first - 1j * second + ridge * old)
    return torch.view_as_real(solved).flatten(-2).float()


def start(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A first theta: count^2 random rows as free centres, one E-step at temperature 1, one M-step.

    The rows are free centres, not products, so this step alone needs their dense distances.
    """
    dim = rows.shape[1]
    chosen = torch.randint(len(rows), (count * count,), generator=generator)
    free = rows[chosen]
    weights = torch.zeros(count * count, dtype=torch.float64)
    sums = torch.zeros(count * count, dim, dtype=torch.float64)
    for block in rows[torch.randperm(len(rows), generator=generator)[:_BLOCK]].split(1024):
        share = (-torch.cdist(block, free)).softmax(dim=-1)
        weights += share.sum(dim=0)
        sums += (share.T @ block).double()
    grid = sums.view(count, count, dim)
    moments = torch.stack((grid.sum(dim=1), grid.sum(dim=0)))
    statistics = Statistics(weights.view(count, count), moments, math.inf)
    return m_step(statistics, torch.zeros(count, dim))


EStep = Callable[[Tensor, Tensor, float], tuple[Statistics, Tensor]]


def fit_round(
    rows: Tensor, theta: Tensor, scale: float, annealing: Annealing, *, e_step: EStep = e_step
) -> tuple[Tensor, float]:
    """Anneal one round from `theta`; returns the best theta by hard assignment and its error.

    Stops when the error has not fallen for `patience` steps.
    """
    best, lowest, stale = theta, math.inf, 0
    for step in range(annealing.steps):
        statistics, _ = e_step(rows, theta, annealing.temperature(step, scale))
        if statistics.error < lowest:
            best, lowest, stale = theta, statistics.error, 0
        else:
            stale += 1
            if stale >= annealing.patience:
                break
        theta = m_step(statistics, theta)
    else:
        statistics, _ = e_step(rows, theta, annealing.temperature(annealing.steps - 1, scale))
        if statistics.error < lowest:
            best, lowest = theta, statistics.error
    return best, lowest


def round_scale(index: int) -> float:
    """The temperature's scale in round `index`: a tenth after rounds 0, 4, 8, ..."""
    return 10.0 ** -((index + 3) // 4)


def fit_rounds(
    rows: Tensor,
    rounds: int,
    count: int,
    annealing: Annealing,
    generator: torch.Generator,
    *,
    e_step: EStep = e_step,
) -> Tensor:
    """Residual rounds, each fitted to what the rounds before left: theta [rounds, count, dim]."""
    residual, books = rows.clone(), []
    for index in range(rounds):
        theta = start(residual, count, generator)
        theta, _ = fit_round(residual, theta, round_scale(index), annealing, e_step=e_step)
        residual -= decode_round(theta, e_step(residual, theta, _HARD)[1])
        books.append(theta)
    return torch.stack(books)


def encode_round(rows: Tensor, theta: Tensor) -> Tensor:
    """The nearest centre of each row, [n] int32, a * count + b."""
    return e_step(rows, theta, _HARD)[1]


def decode_round(theta: Tensor, index: Tensor) -> Tensor:
    """The centres of `index` [...]: [..., dim]."""
    count, chosen = theta.shape[0], index.long()
    return theta[chosen // count] + times_i(theta)[chosen % count]
