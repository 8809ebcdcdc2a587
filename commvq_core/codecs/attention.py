"""What attends over the codes of a pair of codecs, without decoding a whole context."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class CodedAttention(Protocol):
    """An operator with a pair of codecs' codebooks. See `Codec.attention`."""

    def most_rows(self, device: torch.device) -> int:
        """How many rows of queries that share a KV head one call takes on `device`."""

    def __call__(
        self,
        query: Tensor,
        key_codes: Tensor,
        value_codes: Tensor,
        turns: Tensor,
        steps: Tensor,
        first: Tensor,
        stop: int,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(weighted [batch, kv_heads, rows, head_dim], peak and total [batch, kv_heads, rows]).

        The sum over tokens of exp(score - peak) * value, the largest score, and the sum of
        exp(score - peak); all float32. `query` [batch, kv_heads, rows, head_dim] float32, scaled
        and rotated, canonical; codes as the codecs' `encode` gives them, views allowed; the rest as
        in `ops.additive_attend`.
        """
