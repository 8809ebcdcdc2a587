"""What attends over the codes of a pair of codecs, without decoding a whole context."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from commvq_core.rope import Rotary


class Coded(NamedTuple):
    """Tokens seen through their codes: those before `stop`, of each row from its `first` on.

    Codes are as the codecs' `encode` gives them, views allowed; the rest as in
    `ops.additive_attend`.
    """

    key_codes: Tensor
    value_codes: Tensor
    turns: Tensor
    steps: Tensor
    first: Tensor
    stop: int


class Exact(NamedTuple):
    """Tokens seen exactly, in a window and as sinks: each [batch, kv_heads, tokens, head_dim].

    float32 or bfloat16, keys rotated, in the model's order.
    """

    keys: Tensor
    values: Tensor
    sink_keys: Tensor
    sink_values: Tensor


class CodedAttention(Protocol):
    """An operator with a pair of codecs' codebooks. See `Codec.attention`."""

    def most_rows(self, device: torch.device) -> int:
        """How many rows of queries that share a KV head one call takes on `device`."""

    def __call__(
        self, query: Tensor, coded: Coded, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(weighted [batch, kv_heads, rows, head_dim], peak and total [batch, kv_heads, rows]).

        The sum over tokens of exp(score - peak) * value, the largest score, and the sum of
        exp(score - peak); all float32. `query` [batch, kv_heads, rows, head_dim] float32, scaled
        and rotated, as `query_pairs` gives it.
        """

    def step(
        self,
        query: Tensor,
        scaling: float,
        rotary: Rotary,
        coded: Coded,
        exact: Exact,
        softcap: float,
    ) -> Tensor:
        """Attention of one new token over a whole cache, on a CPU: [batch, 1, heads, head_dim].

        `query` float32 or bfloat16 [batch, heads, 1, head_dim], rotated, in the model's order; the
        result has its dtype. `coded.first` is a row's first token, where its sinks begin.
        """
