"""Numbers that tasks report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 512  # rows of logits turned to float32 at once


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, in nats, float32 [n] on the CPU.

    `logits` [n, vocabulary] of any float dtype, `targets` int64 [n]. Works in slices, so that the
    float32 copy of the logits never exists whole.
    """
    parts = [
        F.cross_entropy(rows.float(), wanted, reduction="none")
        for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    ]
    return torch.cat(parts).cpu()


def token_kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) of each row, in nats, float32 [n] on the CPU.

    Both [n, vocabulary] of any float dtype; works in slices, as `token_nll` does.
    """
    parts = [
        F.kl_div(
            q.float().log_softmax(-1), p.float().log_softmax(-1), reduction="none", log_target=True
        )
        .sum(-1)
        .clamp_min(0)
        for p, q in zip(reference.split(_ROWS), logits.split(_ROWS), strict=True)
    ]
    return torch.cat(parts).cpu()


def perplexity(nll_sum: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood."""
    return math.exp(nll_sum / tokens)


def delta_percent(value: float, baseline: float) -> float:
    """How far `value` is above `baseline`, in percent of it."""
    return 100.0 * (value / baseline - 1.0)


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean of at least one value."""
    listed = list(values)
    return sum(listed) / len(listed)


def percentile(values: Iterable[float], percent: float) -> float:
    """The `percent`-th percentile of at least one value, interpolated linearly."""
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(percent / 100))


def first_number(text: str) -> str | None:
    """The first whole number in an answer, thousands commas removed; None when there is none.

    >>> first_number(" 48,213. I am sure")
    '48213'
    """
    match = re.search(r"\d+(?:,\d{3})*", text)
    return match.group().replace(",", "") if match else None
