"""Attention over a compressed layer, a block of tokens at a time.

The context falls into three parts: old tokens as codes, sinks and the newest tokens exact. Each
part is scored by itself and the parts are merged by their running maximum and sum (log-sum-exp), so
no dequantized key or value outlives its block. For the query of token t, `boundary[t]` is the first
token that it sees exactly: codes and sinks count before it, the window from it on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from commvq_core.cache.layer import CommVQLayer
from commvq_core.rope import rotate_pairs, to_pairs

_BLOCK = 1024  # tokens decoded at once


class SoftmaxSum:
    """A softmax-weighted sum that grows part by part. All float32; rows are [..., r, 1].

    `weighted` / `total` is the attention output, `peak + log(total)` the log-sum-exp.
    """

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.peak = torch.full((*shape[:-1], 1), -torch.inf, device=device)
        self.total = torch.zeros(*shape[:-1], 1, device=device)
        self.weighted = torch.zeros(*shape, device=device)

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Merge `scores` [..., r, n], -inf where masked, with `values` [..., n, d]."""
        peak = torch.maximum(self.peak, scores.amax(dim=-1, keepdim=True))
        # A row that has seen nothing yet keeps -inf; exp(-inf - 0) is the 0 that it needs.
        safe = torch.where(peak == -torch.inf, torch.zeros_like(peak), peak)
        weights = torch.exp(scores - safe)
        old = torch.exp(self.peak - safe)
        self.total = self.total * old + weights.sum(dim=-1, keepdim=True)
        self.weighted = self.weighted * old + weights @ values
        self.peak = peak

    def add_logit(self, logit: Tensor) -> None:
        """Merge a column that has a score but no value (gpt-oss's learnt sinks)."""
        peak = torch.maximum(self.peak, logit)
        old = torch.exp(self.peak - peak)
        self.total = self.total * old + torch.exp(logit - peak)
        self.weighted = self.weighted * old
        self.peak = peak

    def output(self) -> Tensor:
        """[..., r, d]; rows that saw no token at all are zero."""
        return self.weighted / self.total.clamp_min(1e-30)


class Scorer:
    """Turns blocks of keys into scores for one forward's queries.

    `query` [batch, heads, q, head_dim] rotated, in model order. Query heads of a KV head are
    stacked: rows are [batch, kv_heads, groups * q, ...].
    """

    def __init__(
        self,
        query: Tensor,
        kv_heads: int,
        mask: Tensor | None,
        first: int,
        scaling: float,
        softcap: float | None,
    ) -> None:
        batch, heads, length, dim = query.shape
        self.groups, self.length, self.first = heads // kv_heads, length, first
        self.softcap = softcap
        rows = query.float() * scaling
        self.query = rows.reshape(batch, kv_heads, self.groups * length, dim)
        self.mask = mask
        self.slots = torch.arange(first, first + length, device=query.device)

    def scores(self, query: Tensor, keys: Tensor, columns: Tensor, seen: Tensor) -> Tensor:
        """`keys` [batch, kv_heads, n, d] of the tokens `columns` -> scores, masked with -inf.

        `columns` [n] or [batch, n] are slots; `seen` bool, broadcastable to [batch, 1, q, n],
        says which of them belong to this part at all.
        """
        raw = query @ keys.transpose(-1, -2)
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        batch, kv_heads, _, count = raw.shape
        grouped = raw.view(batch, kv_heads, self.groups, self.length, count)
        bias = self._bias(columns, seen)
        if bias.dim() == 4 and bias.shape[1] > 1:  # a mask of its own for every head
            bias = bias.view(bias.shape[0], kv_heads, self.groups, self.length, count)
        else:
            bias = bias[:, :, None]
        return (grouped + bias).view(raw.shape)

    def sink_rows(self, logits: Tensor) -> Tensor:
        """gpt-oss's sink logit of each head [heads] -> [1, kv_heads, groups * q, 1]."""
        rows = logits.float().view(1, self.query.shape[1], self.groups, 1)
        return rows.repeat_interleave(self.length, dim=2)

    def _bias(self, columns: Tensor, seen: Tensor) -> Tensor:
        """0 where a query may look, -inf where not (or the model's own additive mask)."""
        zero = torch.zeros((), device=columns.device)
        if self.mask is None:
            slots = columns if columns.dim() == 2 else columns[None]
            seen = seen & (slots[:, None, None, :] <= self.slots[:, None])
            return torch.where(seen, zero, -torch.inf)
        if columns.dim() == 1:
            part = self.mask[..., columns]
        else:
            rows = self.mask.expand(columns.shape[0], -1, -1, -1)
            index = columns[:, None, None, :].expand(-1, rows.shape[1], rows.shape[2], -1)
            part = rows.gather(-1, index.clamp(0, rows.shape[-1] - 1))
        if part.dtype == torch.bool:
            return torch.where(part & seen, zero, -torch.inf)
        return torch.where(seen, part.float(), -torch.inf)


def attend(
    layer: CommVQLayer,
    query: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention output [batch, q, heads, head_dim] of a layer that has just been updated.

    `query` [batch, heads, q, head_dim] rotated; `mask` as transformers makes it for SDPA
    (bool [batch, 1, q, tokens], True where a query may look), additive floats, or None for plain
    causal attention. Encodes what has left the window, before or after as `layer.strict` says.
    """
    assert layer.keys is not None
    total = layer.get_seq_length()
    length = query.shape[2]
    first = total - length
    _note_padding(layer, mask)
    leaving = total - layer.window
    if layer.strict or length == 1:
        layer.encode_until(leaving)
        slots = torch.arange(first, total, device=query.device)
        boundary = (slots - layer.window + 1).clamp_min(0)
    else:
        boundary = torch.full((length,), layer.code_length, device=query.device)
    scorer = Scorer(query, layer.keys.shape[1], mask, first, scaling, softcap)
    result = SoftmaxSum(scorer.query.shape, query.device)
    for scores, values in _exact_parts(layer, scorer, boundary):
        result.add(scores, values)
    for scores, values in _code_parts(layer, scorer, boundary):
        result.add(scores, values)
    if sink_logits is not None:
        result.add_logit(scorer.sink_rows(sink_logits))
    settle(layer, mask)
    output = result.output().view(query.shape)
    return output.transpose(1, 2).to(query.dtype).contiguous()


def settle(layer: CommVQLayer, mask: Tensor | None) -> None:
    """End a forward pass: what has left the window gets codes and loses its exact copy."""
    _note_padding(layer, mask)
    layer.encode_until(layer.get_seq_length() - layer.window)
    layer.drop_encoded()


def needs_codes(layer: CommVQLayer, length: int) -> bool:
    """Whether `length` new queries see any token through its code."""
    if layer.code_length:
        return True
    return (layer.strict or length == 1) and layer.get_seq_length() > layer.window


def _note_padding(layer: CommVQLayer, mask: Tensor | None) -> None:
    """Learn from the first mask where each row begins: what comes before is padding."""
    if layer.first_valid is not None:
        return
    assert layer.keys is not None
    batch, device = layer.keys.shape[0], layer.keys.device
    if mask is None:
        layer.first_valid = torch.zeros(batch, dtype=torch.long, device=device)
        return
    last = mask[:, 0, -1]
    allowed = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    layer.first_valid = allowed.int().argmax(dim=-1).expand(batch).clone()


def _exact_parts(
    layer: CommVQLayer, scorer: Scorer, boundary: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    assert layer.keys is not None and layer.values is not None
    kept, total = layer.exact_start, layer.get_seq_length()
    columns = torch.arange(kept, total, device=boundary.device)
    if columns.numel():
        seen = (columns >= boundary[:, None])[None, None]
        scores = scorer.scores(scorer.query, layer.keys.float(), columns, seen)
        yield scores, layer.values.float()
    if layer.sink_keys is not None and layer.sink_values is not None:
        slots = layer.sink_slots()
        seen = slots[:, None, None, :] < boundary[:, None]
        scores = scorer.scores(scorer.query, layer.sink_keys.float(), slots, seen)
        yield scores, layer.sink_values.float()


def _code_parts(
    layer: CommVQLayer, scorer: Scorer, boundary: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    rotary = layer.rotary
    stop = min(layer.code_length, int(boundary[-1]))
    query = to_pairs(scorer.query, rotary_dim=rotary.rotary_dim, layout=rotary.layout)
    sinks = layer.sink_slots() if layer.sinks else None
    for start in range(0, stop, _BLOCK):
        end = min(start + _BLOCK, stop)
        keys = layer.decode_keys(start, end)
        if rotary.rotary_dim:
            cos, sin = layer.positions.tables(rotary, start, end, layer.model_dtype)
            keys = rotate_pairs(keys, cos, sin)
        columns = torch.arange(start, end, device=query.device)
        seen = (columns < boundary[:, None])[None, None]
        if sinks is not None:
            not_sink = (columns[None, :, None] != sinks[:, None, :]).all(dim=-1)
            seen = seen & not_sink[:, None, None]
        yield scorer.scores(query, keys, columns, seen), layer.decode_values(start, end)
