"""Vectors and codebooks to encode, made from a seed."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(
    groups: int = 1,
    tokens: int = 20,
    subs: int = 1,
    stages: int = 3,
    codewords: int = 16,
    sub_dim: int = 8,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """x [groups, tokens, subs * sub_dim] and codebooks [groups, subs, stages, codewords, sub_dim]
    whose stages shrink as fitted ones do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, tokens, subs * sub_dim, generator=generator)
    books = torch.randn(groups, subs, stages, codewords, sub_dim, generator=generator)
    scale = 0.8 * 0.75 ** torch.arange(stages)
    return x, books * scale[:, None, None]


def integers(
    tokens: int = 40, codewords: int = 8, sub_dim: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Small integers: every score is exact in float32 and most of them are tied."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (2, tokens, 2 * sub_dim), generator=generator)
    books = torch.randint(-2, 3, (2, 2, 3, codewords, sub_dim), generator=generator)
    return x.float(), books.float()


def product(tokens: int, count: int, dim: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """(products, norms, table) of Gaussian vectors and two Gaussian codebooks, for an E-step."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, dim, generator=generator)
    books = torch.randn(2, count, dim, generator=generator)
    table = (books[0][:, None] + books[1][None]).square().sum(dim=-1)
    return x @ (-2 * books.flatten(0, 1)).T, x.square().sum(dim=1), table
