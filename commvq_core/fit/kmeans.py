"""k-means of one stage, and the residual start of all stages."""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core import ops


def nearest(rows: Tensor, codewords: Tensor) -> Tensor:
    """Index [n] int64 of the codeword nearest to each row."""
    return ops.additive_encode(rows[None], codewords[None, None, None], 1)[0, :, 0].long()


def kmeans(rows: Tensor, count: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm: `rows` [n, d] float32 -> codewords [count, d].

    Starts from distinct random rows; a codeword that lost all its rows restarts at the row that
    fits worst.
    """
    start = torch.randperm(rows.shape[0], generator=generator)[:count]
    codewords = rows[start].clone()
    for _ in range(iterations):
        index = nearest(rows, codewords)
        sums = torch.zeros_like(codewords).index_add_(0, index, rows)
        counts = torch.bincount(index, minlength=count)
        alive = counts > 0
        codewords[alive] = sums[alive] / counts[alive, None]
        dead = int((~alive).sum())
        if dead:
            distance = (rows - codewords[index]).square().sum(dim=1)
            codewords[~alive] = rows[distance.topk(dead).indices]
    return codewords


def residual_start(
    rows: Tensor, stages: int, count: int, iterations: int, generator: torch.Generator
) -> Tensor:
    """Codebooks [stages, count, d]: each stage is a k-means of what the stages before left over."""
    residual = rows.clone()
    codebooks = []
    for _ in range(stages):
        codewords = kmeans(residual, count, iterations, generator)
        residual -= codewords[nearest(residual, codewords)]
        codebooks.append(codewords)
    return torch.stack(codebooks)
