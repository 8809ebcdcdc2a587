"""Attention over the published preset's codes: key codebooks in whole numbers, and the operator.

The operator adds codewords in int16. Each pair has a unit of its own, as large as its codewords add
up at most; a factor equal within a pair commutes with RoPE, so queries take it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.codecs.attention import Coded, Exact
from commvq_core.codecs.neural import NeuralValueCodec
from commvq_core.ops.published import PANEL
from commvq_core.rope import Rotary

_LIMIT = 23000.0  # what keys stay within, so that rotated ones still fit int16


@dataclass(frozen=True)
class WholeRounds:
    """Rounds of codewords in whole numbers: theta is `words` times `unit`, but for rounding.

    `words` int16 [kv_heads, rounds, 64, panels, 2, 32] as ops.published_attend takes them, `unit`
    float32 [kv_heads, head_dim], equal within a pair.
    """

    words: Tensor
    unit: Tensor

    @classmethod
    def of(cls, theta: Tensor) -> WholeRounds:
        """Round `theta` float32 [kv_heads, rounds, 64, head_dim], canonical."""
        heads, rounds, count, dim = theta.shape
        parts = theta.unflatten(-1, (dim // 2, 2))
        # A round adds re(a) - im(b) to a key's real part, im(a) + re(b) to its imaginary part.
        reach = parts.abs().amax(dim=2).sum(dim=(1, 3))  # [kv_heads, pairs]
        unit = reach.clamp_min(1e-30) / (_LIMIT - rounds)  # each codeword rounds by up to a half
        whole = (parts / unit[:, None, None, :, None]).round().to(torch.int16)
        padding = -dim // 2 % PANEL
        padded = torch.nn.functional.pad(whole, (0, 0, 0, padding))
        panels = padded.view(heads, rounds, count, -1, PANEL, 2).transpose(-1, -2)
        return cls(panels.contiguous(), unit.repeat_interleave(2, dim=1))


@dataclass(frozen=True)
class PublishedAttention:
    """A CodedAttention."""

    keys: WholeRounds
    values: NeuralValueCodec

    def most_rows(self, device: torch.device) -> int:
        """The same everywhere."""
        return ops.MAX_QUERIES

    def __call__(
        self, query: Tensor, coded: Coded, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See CodedAttention."""
        # Not by `ops`: its checks, which codecs pass, take 0.1 ms where caches are cold.
        sums, peak, total = torch.ops.commvq.published_attend(
            query * self.keys.unit[:, None],
            coded.key_codes,
            self.keys.words,
            coded.value_codes,
            self.values.groups,
            coded.turns,
            coded.steps,
            coded.first,
            coded.stop,
            softcap,
        )
        return self.values.restored(sums), peak, total

    def step(
        self,
        query: Tensor,
        scaling: float,
        rotary: Rotary,
        coded: Coded,
        exact: Exact,
        softcap: float,
    ) -> Tensor:
        """See CodedAttention."""
        batch, heads, _, dim = query.shape
        rows = (query.float() * scaling).reshape(batch, exact.keys.shape[1], -1, dim)
        behind = coded._replace(first=coded.first + exact.sink_keys.shape[2])
        parts = self(rotary.query_pairs(rows), behind, softcap)
        found = torch.ops.commvq.exact_attend(rows, *exact, *parts, softcap)
        return found.reshape(batch, 1, heads, dim).to(query.dtype)
