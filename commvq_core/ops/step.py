"""Attention of one new token over a whole cache: a decoding step in one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core.ops.checks import check_additive, check_exact, check_tensor, check_turns


def additive_step(
    query: Tensor,
    scaling: float,
    interleaved: bool,
    turned: float,
    key_factors: Tensor,
    key_codes: Tensor,
    key_books: Tensor,
    key_gains: Tensor,
    key_means: Tensor,
    key_group: int,
    value_codes: Tensor,
    value_books: Tensor,
    value_scales: Tensor,
    value_inverse: Tensor,
    turns: Tensor,
    steps: Tensor,
    first: Tensor,
    stop: int,
    softcap: float,
    keys: Tensor,
    values: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
) -> Tensor:
    """Attention of one new token of each row: `additive_attend` over codes, then `exact_attend`.

    The new token sees a row's first tokens as sinks, those behind them and before `stop` as codes,
    and the rest exactly.

    Args:
        query: float32 or bfloat16 [batch, heads, 1, head_dim], rotated, as the model orders dims.
        scaling: what scores count.
        interleaved: whether the two parts of a pair are neighbours in the model's order; if not,
            the first halves of all pairs that rotate come before the second ones.
        turned: what keys' rotating dims count besides (YaRN's factor).
        key_factors: float32 [kv_heads, head_dim], pairs as neighbours: what a unit of decoded keys
            is worth, equal within a pair.
        value_inverse: float32 [kv_heads, head_dim, head_dim]: decoded values times it are values.
        first: int64 [batch], the first real token of a row: of a sink, if there are any.
        keys, values: float32 or bfloat16 [batch, kv_heads, tokens, head_dim] that are seen exactly,
            keys rotated, tokens 0 or more; may be views, their last axis contiguous.
        sink_keys, sink_values: the same, of the first tokens.

    The rest are as `additive_attend` takes them.

    Returns:
        Of query's dtype, [batch, 1, heads, head_dim].

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes that do not fit each other.
    """
    if query.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"query must be float32 or bfloat16, not {query.dtype}")
    heads = keys.shape[1] if keys.dim() == 4 else 0
    if query.dim() != 4 or query.shape[2] != 1 or heads == 0 or query.shape[1] % heads:
        raise ValueError(
            f"query must be [batch, heads, 1, head_dim], heads a multiple of the {heads} of keys, "
            f"not {list(query.shape)}"
        )
    rows = query[:, :heads]
    check_additive(
        rows,
        key_codes,
        key_books,
        key_gains,
        key_means,
        key_group,
        value_codes,
        value_books,
        value_scales,
        stop,
    )
    check_turns(rows, turns, steps, first, stop)
    check_exact(rows, keys, values, sink_keys, sink_values)
    dim = query.shape[3]
    for name, value, shape in (
        ("key_factors", key_factors, [heads, dim]),
        ("value_inverse", value_inverse, [heads, dim, dim]),
    ):
        check_tensor(name, value, torch.float32)
        if list(value.shape) != shape:
            raise ValueError(f"{name} must be {shape}, not {list(value.shape)}")
    return torch.ops.commvq.additive_step(
        query,
        float(scaling),
        interleaved,
        float(turned),
        key_factors,
        key_codes,
        key_books,
        key_gains,
        key_means,
        key_group,
        value_codes,
        value_books,
        value_scales,
        value_inverse,
        turns,
        steps,
        first,
        stop,
        float(softcap),
        keys,
        values,
        sink_keys,
        sink_values,
    )
