"""k-means of one stage, and the residual start of all stages."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 8192  # rows whose distances to all codewords are held at once


def nearest(rows: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Index [n] int64 of the nearest codeword and the squared distance [n], in constant memory."""
    norms = codewords.square().sum(dim=1)
    index, distance = [], []
    for block in rows.split(_BLOCK):
        scores = torch.addmm(norms, block, codewords.T, alpha=-2.0)
        best, where = scores.min(dim=1)
        index.append(where)
        distance.append((best + block.square().sum(dim=1)).clamp_min(0))
    return torch.cat(index), torch.cat(distance)


def kmeans(rows: Tensor, count: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm: `rows` [n, d] float32 -> codewords [count, d].

    Starts from distinct random rows; a codeword that lost all its rows restarts at the row that
    fits worst.
    """
    start = torch.randperm(rows.shape[0], generator=generator)[:count]
    codewords = rows[start].clone()
    for _ in range(iterations):
        index, distance = nearest(rows, codewords)
        sums = torch.zeros_like(codewords).index_add_(0, index, rows)
        counts = torch.bincount(index, minlength=count)
        alive = counts > 0
        codewords[alive] = sums[alive] / counts[alive, None]
        dead = int((~alive).sum())
        if dead:
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
        index, _ = nearest(residual, codewords)
        residual -= codewords[index]
        codebooks.append(codewords)
    return torch.stack(codebooks)
