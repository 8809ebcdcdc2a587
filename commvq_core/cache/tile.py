"""A few queries and the softmax-weighted sum of what they have seen so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LOWEST = torch.finfo(torch.float32).min  # stands for a peak of -inf, which nothing is less than
_FUSED = 32  # tokens from which on torch's fused attention is worth its call


class _Sum(NamedTuple):
    """A softmax-weighted sum of values [..., rows, head_dim], with [..., rows, 1] of two others.

    `weighted` / `total` is the attention output and `peak + log(total)` its log-sum-exp; a row that
    has seen nothing has a peak of -inf and zeros.
    """

    weighted: Tensor
    peak: Tensor
    total: Tensor


class Tile:
    """A few queries and their softmax-weighted sum, which grows part by part. All float32.

    Query heads that share a KV head are stacked: `query` [batch, kv_heads, groups * q, head_dim],
    rotated and scaled. `first` is the token of the first query; the others follow it.

    What is known without asking the device stays on the host, so that a decoding step never waits.
    """

    def __init__(
        self,
        query: Tensor,
        kv_heads: int,
        first: int,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> None:
        batch, heads, self.length, dim = query.shape
        self.groups = heads // kv_heads
        rows = query.float() * scaling
        self.query = rows.reshape(batch, kv_heads, self.groups * self.length, dim)
        self.first, self.mask, self.softcap = first, mask, softcap
        self._sum: _Sum | None = None

    @property
    def end(self) -> int:
        """The token behind the last query's."""
        return self.first + self.length

    def add(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        columns: range | Tensor,
        seen: Tensor | None,
    ) -> None:
        """Attend to a part of the context.

        `query` is `self.query`, perhaps reordered as `keys` [batch, kv_heads, n, head_dim] are;
        `values` alike. `columns`, a range or [batch, n], are the tokens' slots. `seen` bool,
        broadcastable to [batch, 1, q, n], says which tokens belong to this part for which query;
        None: all do, and none lies ahead of a query.
        """
        if self._fused(keys, seen):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, keys, values, scale=1.0
            )
            # Normalised: as if it had one token, whose score is the log-sum-exp.
            self.merge(found[0], found[1], torch.ones_like(found[1]))
            return
        scores = query @ keys.transpose(-1, -2)
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.mask is not None or seen is not None:
            batch, kv_heads, _, count = scores.shape
            grouped = scores.view(batch, kv_heads, self.groups, self.length, count)
            grouped += self._bias(columns, seen, kv_heads)
        peak, before = scores.amax(dim=-1, keepdim=True), self._sum
        if before is not None:
            peak = torch.maximum(before.peak, peak)
        floor = peak.clamp_min(_LOWEST)
        weights = scores.sub_(floor).exp_()
        total, weighted = weights.sum(dim=-1, keepdim=True), weights @ values
        if before is not None:
            old = torch.exp(before.peak - floor)
            total.addcmul_(before.total, old)
            weighted.addcmul_(before.weighted, old)
        self._sum = _Sum(weighted, peak, total)

    def merge(self, weighted: Tensor, peak: Tensor, total: Tensor) -> None:
        """Merge a part that was attended to elsewhere: [..., head_dim] and twice [...]."""
        part, before = _Sum(weighted, peak[..., None], total[..., None]), self._sum
        if before is None:
            self._sum = part
            return
        both = torch.maximum(before.peak, part.peak)
        floor = both.clamp_min(_LOWEST)
        old, new = torch.exp(before.peak - floor), torch.exp(part.peak - floor)
        self._sum = _Sum(
            (before.weighted * old).addcmul_(weighted, new),
            both,
            (before.total * old).addcmul_(part.total, new),
        )

    def add_logits(self, logits: Tensor) -> None:
        """Merge a column that has a score but no value: gpt-oss's learnt sinks, [heads]."""
        rows = logits.float().view(1, self.query.shape[1], self.groups, 1)
        rows = rows.repeat_interleave(self.length, dim=2)
        found = torch.zeros_like(self.query)
        self.merge(found, rows[..., 0], torch.ones_like(found[..., 0]))

    def output(self) -> Tensor:
        """[batch, q, heads, head_dim]; queries that saw no token at all (padding) get zeros."""
        found = self._sum
        if found is None:
            rows = torch.zeros_like(self.query)
        else:
            rows = found.weighted / found.total.clamp_min(1e-30)
        batch, kv_heads, _, dim = rows.shape
        return rows.view(batch, kv_heads * self.groups, self.length, dim).transpose(1, 2)

    def _fused(self, keys: Tensor, seen: Tensor | None) -> bool:
        """Whether torch's fused attention on CPUs does it, several times as fast as the steps."""
        plain = self.mask is None and seen is None and self.softcap is None
        large = self.length > 1 and keys.shape[2] >= _FUSED
        return plain and large and keys.device.type == "cpu"

    def _bias(self, columns: range | Tensor, seen: Tensor | None, kv_heads: int) -> Tensor:
        """0 where a query may look, -inf where not (or the model's own additive mask).

        [batch or 1, kv_heads or 1, groups or 1, q, n].
        """
        device = self.query.device
        zero = torch.zeros((), device=device)
        if self.mask is None:
            queries = torch.arange(self.first, self.end, device=device)
            if isinstance(columns, range):
                columns = torch.arange(columns.start, columns.stop, device=device)[None]
            ahead = columns[:, None, None, :] > queries[:, None]
            allowed = ~ahead if seen is None else seen & ~ahead
            return torch.where(allowed, zero, -torch.inf)[:, :, None]
        if isinstance(columns, range):
            part = self.mask[..., columns.start : columns.stop]
        else:
            rows = self.mask.expand(columns.shape[0], -1, -1, -1)
            index = columns[:, None, None, :].expand(-1, rows.shape[1], rows.shape[2], -1)
            part = rows.gather(-1, index.clamp(0, rows.shape[-1] - 1))
        if part.dtype == torch.bool:
            part = torch.where(part, zero, -torch.inf)
        bias = part.float() if seen is None else torch.where(seen, part.float(), -torch.inf)
        if bias.shape[1] == 1:
            return bias[:, :, None]
        return bias.unflatten(1, (kv_heads, self.groups))  # a mask of its own for every head
