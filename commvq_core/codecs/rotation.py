"""Fixed orthogonal rotations that spread a vector's energy evenly over its dims."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_SEED = 0  # the rotation is part of the format: the same for every layer, head and run


@functools.cache
def hadamard(dim: int) -> Tensor:
    """The random-sign Walsh-Hadamard rotation of QuaRot, float32 [dim, dim], orthogonal.

    Sylvester's matrix where `dim` is a power of two; else blocks of the largest one that divides
    it, along the diagonal.
    """
    size = dim & -dim
    block = torch.ones(1, 1)
    while block.shape[0] < size:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    signs = torch.randint(2, (dim, 1), generator=_generator()).float() * 2 - 1
    return signs * torch.block_diag(*[block / size**0.5] * (dim // size))


@functools.cache
def random_rotation(dim: int) -> Tensor:
    """An orthogonal matrix drawn uniformly (Haar), float32 [dim, dim]."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=_generator(), dtype=torch.float64))
    # QR's signs are a convention of the solver; without them the draw is uniform.
    return (q * r.diagonal().sign()).float()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)
