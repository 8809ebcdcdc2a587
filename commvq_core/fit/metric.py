"""What an error costs, as a matrix, and the transform that makes that cost plain squared error.

Keys: the cost of a key error e is the logit error E|q . R e|^2. RoPE spins the phase of pair j but
keeps its energy, so the metric is diagonal: E|q_j|^2 on both dims of pair j. Values: what o_proj
does to the error, e^T (sum_h W_h^T W_h) e over the query heads h that share the KV head.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-3  # of the mean weight: a pair no query looked at may still be looked at


def key_metric(query_energy: Tensor) -> Tensor:
    """[heads, head_dim/2] mean |q_pair|^2 -> [heads, head_dim, head_dim], diagonal.

    Pairs are in canonical order. A pair that no query looked at still weighs a little.
    """
    energy = query_energy.float()
    energy = energy + _FLOOR * energy.mean(dim=-1, keepdim=True) + 1e-20
    return torch.diag_embed(energy.repeat_interleave(2, dim=-1))


def value_metric(gram: Tensor) -> Tensor:
    """[heads, head_dim, head_dim] sum of W_h^T W_h -> the same, safely positive definite."""
    gram = gram.float()
    dim = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None] + 1e-20
    return gram + _FLOOR * mean * torch.eye(dim)


def key_transform(metric: Tensor) -> Tensor:
    """Diagonal metric [head_dim, head_dim] -> factors [head_dim], equal within a pair.

    The fourth root of the weights, scaled to a mean square of 1. The square root would turn the
    metric into squared error, but a few pairs then take all the bits; halving the exponent costs
    the expected logit error and gains the model's own (docs/method.md has figures).
    """
    factors = metric.diagonal().pow(0.25)
    return factors / factors.square().mean().sqrt()


def value_transform(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Metric [d, d] -> (forward, inverse), y = x @ forward, x = y @ inverse, both [d, d] float32.

    The symmetric square root, unlike a PCA, keeps dims where they were, so that sub-vectors stay
    alike in energy and share the bits fairly.
    """
    metric64 = metric.double()
    metric64 = metric64 / metric64.diagonal().mean()
    values, vectors = torch.linalg.eigh(metric64)
    root = values.clamp_min(1e-6).sqrt()
    forward = (vectors * root) @ vectors.T
    inverse = (vectors / root) @ vectors.T
    return forward.float(), inverse.float()
