"""Attention over the exact tokens of a cache: the end of a decoding step."""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core.ops.checks import check_exact, check_tensor


def exact_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
    weighted: Tensor,
    peak: Tensor,
    total: Tensor,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of a few queries over exact tokens, merged with what they have seen elsewhere.

    Every query sees every token: those of a window and the sinks, which lie apart.

    Args:
        query: float32 [batch, kv_heads, queries, head_dim], scaled; the queries of all heads that
            share the KV head.
        keys, values: float32 or bfloat16 [batch, kv_heads, tokens, head_dim], tokens 0 or more,
            keys rotated; may be views, their last axis contiguous.
        sink_keys, sink_values: the same, of other tokens.
        weighted, peak, total: float32 [batch, kv_heads, queries, head_dim] and twice [batch,
            kv_heads, queries], of what was seen elsewhere, as `additive_attend` gives it.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.

    Returns:
        float32, of query's shape: the softmax-weighted mean of all values. Rows that see nothing
        get 0.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes that do not fit each other.
    """
    for name, value in (("query", query), ("weighted", weighted), ("peak", peak), ("total", total)):
        check_tensor(name, value, torch.float32)
    if query.dim() != 4:
        raise ValueError(
            f"query must be [batch, kv_heads, queries, head_dim], not {list(query.shape)}"
        )
    rows = query.shape[:3]
    if weighted.shape != query.shape or peak.shape != rows or total.shape != rows:
        raise ValueError(
            f"weighted {list(weighted.shape)}, peak {list(peak.shape)} and total "
            f"{list(total.shape)} do not fit query {list(query.shape)}"
        )
    check_exact(query, keys, values, sink_keys, sink_values)
    return torch.ops.commvq.exact_attend(
        query, keys, values, sink_keys, sink_values, weighted, peak, total, float(softcap)
    )
