"""Joint least squares: the best codewords of all stages at once, for codes that are given.

With one-hot codes B [n, stages*count], minimise |B C - Y|^2 + ridge |C - C_old|^2. The second term
keeps codewords that no row uses where they were (B'B is singular: the stages share their mean) and
guarantees that the error never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 14


def code_statistics(codes: Tensor, rows: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """(B'B [stages*count, stages*count] float32, B'(Y - B C) [stages*count, d] float64), streamed.

    `codes` [n, stages] integer, `rows` Y [n, d] float32, `codebooks` C [stages, count, d]. Counts
    are exact in float32 up to 16.7 million rows.
    """
    stages, count, dim = codebooks.shape
    size = stages * count
    gram = torch.zeros(stages, count, stages, count)
    moments = torch.zeros(size, dim, dtype=torch.float64)
    for block, part in zip(codes.split(_BLOCK), rows.split(_BLOCK), strict=True):
        index = block.long()
        left = part.double()
        for stage in range(stages):
            left -= codebooks[stage][index[:, stage]]
        for stage in range(stages):
            moments.index_add_(0, index[:, stage] + stage * count, left)
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
    Solves for the change of the codewords, so that float32, which halves the memory of the fit,
    rounds the change and not the codewords.
    """
    gram, moments = code_statistics(codes, rows, codebooks)
    gram.diagonal().add_(ridge)
    torch.linalg.cholesky(gram, out=gram)
    change = torch.cholesky_solve(moments.float(), gram)
    return codebooks + change.view(codebooks.shape)
