"""Fit the codebooks of one KV head: residual k-means, then refits and beam encoding in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.fit.kmeans import residual_start
from commvq_core.fit.refine import solve_codebooks

_START_ROWS = 16384  # enough for the k-means start of 256 codewords; the refits see every row
_RIDGE = 1.0  # as one more row a codeword, where it was: with few rows, refits learn them by heart


def fit_additive(
    rows: Tensor,
    *,
    sub_dim: int,
    stages: int,
    codewords: int,
    kmeans_iterations: int,
    rounds: int,
    beam: int,
    seed: int,
) -> Tensor:
    """`rows` [n, head_dim] float32 -> codebooks [subs, stages, codewords, sub_dim] float32.

    Deterministic in (rows, arguments). Squared error is the loss: transform the rows first.
    """
    generator = torch.Generator().manual_seed(seed)
    fitted = []
    for part in rows.split(sub_dim, dim=1):
        part = part.contiguous()
        few = part
        if part.shape[0] > _START_ROWS:
            few = part[torch.randperm(part.shape[0], generator=generator)[:_START_ROWS]]
        codebooks = residual_start(few, stages, codewords, kmeans_iterations, generator)
        for _ in range(rounds):
            codes = ops.additive_encode(part[None], codebooks[None, None], beam)[0]
            codebooks = solve_codebooks(codebooks, codes, part, _RIDGE)
        fitted.append(codebooks)
    return torch.stack(fitted)
