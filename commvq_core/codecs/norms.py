"""The norm that the paper's codecs store with every token, in fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core.ops.published import NORM_BYTES, split_norm

__all__ = ["NORM_BYTES", "join_norm", "split_norm", "token_norm"]

_LEAST, _MOST = 2.0**-14, 65504.0  # what fp16 tells apart from zero, and its largest number


def token_norm(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(norm [batch, tokens], vectors / norm) of float32 [batch, heads, tokens, head_dim].

    The norm is over all heads, rounded to fp16 before it divides, so that decoding undoes it.
    """
    norm = vectors.square().sum(dim=(1, 3)).sqrt().clamp(_LEAST, _MOST).half().float()
    return norm, vectors / norm[:, None, :, None]


def join_norm(norm: Tensor, packed: Tensor) -> Tensor:
    """Put the norm [batch, tokens] before the codes, uint8 [batch, tokens, bytes]."""
    head = norm.half().unsqueeze(-1).view(torch.uint8)
    return torch.cat((head, packed), dim=-1)
