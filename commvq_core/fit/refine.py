"""Joint least squares: the best codewords of all stages at once, for codes that are given.

With one-hot codes B [n, stages*count], minimise |B C - Y|^2 + ridge |C - C_old|^2. The second term
keeps codewords that no row uses where they were (B'B is singular: the stages share their mean) and
guarantees that the error never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 16


def code_statistics(codes: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B'B [stages*count, stages*count], B'Y [stages*count, d]), float64, streamed over blocks.

    `codes` [n, stages] integer, `rows` [n, d] float32.
    """
    stages, dim = codes.shape[1], rows.shape[1]
    size = stages * count
    gram = torch.zeros(stages, count, stages, count, dtype=torch.float64)
    moments = torch.zeros(size, dim, dtype=torch.float64)
    for block, part in zip(codes.split(_BLOCK), rows.split(_BLOCK), strict=True):
        index, part64 = block.long(), part.double()
        for stage in range(stages):
            moments.index_add_(0, index[:, stage] + stage * count, part64)
            for other in range(stage, stages):
                pairs = torch.bincount(
                    index[:, stage] * count + index[:, other], minlength=count**2
                )
                # Filled in place, both halves: at 2 bits a copy is as large as all the rest.
                gram[stage, :, other] += pairs.view(count, count)
                if other != stage:
                    gram[other, :, stage] += pairs.view(count, count).T
    return gram.view(size, size), moments


def solve_codebooks(codebooks: Tensor, codes: Tensor, rows: Tensor, ridge: float = 1e-2) -> Tensor:
    """Codebooks [stages, count, d] -> the least-squares optimum near them, float32.

    `ridge` is in units of rows: a codeword that many rows use is free, one that none uses stays.
    """
    stages, count, dim = codebooks.shape
    gram, moments = code_statistics(codes, rows, count)
    old = codebooks.double().view(stages * count, dim)
    gram.diagonal().add_(ridge)
    torch.linalg.cholesky(gram, out=gram)
    solved = torch.cholesky_solve(moments.add_(old, alpha=ridge), gram)
    return solved.view(stages, count, dim).float()
