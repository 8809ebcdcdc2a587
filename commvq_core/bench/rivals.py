"""What attention over codes is measured against: the same attention over whole keys and values.

Each maker takes keys and values [batch, kv_heads, tokens, head_dim] and gives a function from the
rotated queries [batch, heads, 1, head_dim] to their output, of that shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[Tensor], Tensor]

TORCH: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], Attend]]]
QUANTIZED = "hf-quantized-cache-2bit"
_GROUP = 64  # numbers that share a scale and a shift


def sdpa(keys: Tensor, values: Tensor) -> Attend:
    """torch's own attention, told that query heads share KV heads."""

    def attend(query: Tensor) -> Tensor:
        return scaled_dot_product_attention(query.to(keys.dtype), keys, values, enable_gqa=True)

    return attend


def grouped_sdpa(keys: Tensor, values: Tensor) -> Attend:
    """The same with the query heads of a KV head as the queries of one head."""

    def attend(query: Tensor) -> Tensor:
        rows = _grouped(query.to(keys.dtype), keys)
        return scaled_dot_product_attention(rows, keys, values).view_as(query)

    return attend


def grouped_matmul(keys: Tensor, values: Tensor) -> Attend:
    """Two matrix products a KV head, for all query heads that share it, and a softmax between."""
    scaling = keys.shape[-1] ** -0.5

    def attend(query: Tensor) -> Tensor:
        scores = (_grouped(query.to(keys.dtype), keys) * scaling) @ keys.transpose(-1, -2)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(keys.dtype)
        return (weights @ values).view_as(query)

    return attend


TORCH = {
    "torch-sdpa-bf16": (torch.bfloat16, sdpa),
    "torch-sdpa-fp32": (torch.float32, sdpa),
    "torch-grouped-sdpa-bf16": (torch.bfloat16, grouped_sdpa),
    "torch-grouped-matmul-bf16": (torch.bfloat16, grouped_matmul),
}


def quantized(keys: Tensor, values: Tensor) -> Attend | None:
    """transformers' 2-bit cache with the newest token to come; None where no backend fits.

    A step is what its `update` does, dequantizing everything, and attention over the outcome.
    Quantizing anew, which it does every 128 tokens, is left out, in its favour. Raises whatever a
    backend raises that is installed and does not work.
    """
    _, heads, tokens, dim = keys.shape
    layer = _quantized_layer()
    if layer is None or tokens < 2 or heads * (tokens - 1) * dim % _GROUP:
        return None
    layer.update(keys[:, :, :-1], values[:, :, :-1])
    newest = keys[:, :, -1:].clone(), values[:, :, -1:].clone()
    nothing = keys[:, :, :0]

    def attend(query: Tensor) -> Tensor:
        layer.keys, layer.values = nothing, nothing  # as it was after the prompt
        whole_keys, whole_values = layer.update(*newest)
        return sdpa(whole_keys, whole_values)(query)

    return attend


def quantized_bytes(numbers: int, dtype: torch.dtype) -> int:
    """What 2-bit codes of `numbers` numbers take, with a scale and a shift a group."""
    return numbers // 4 + numbers // _GROUP * 2 * dtype.itemsize


def _quantized_layer() -> Any:
    from transformers import cache_utils

    for name in ("QuantoQuantizedLayer", "HQQQuantizedLayer"):
        try:
            return getattr(cache_utils, name)(nbits=2, q_group_size=_GROUP)
        except ImportError:
            continue
    return None


def _grouped(query: Tensor, keys: Tensor) -> Tensor:
    """[batch, heads, 1, head_dim] -> [batch, kv_heads, heads / kv_heads, head_dim]."""
    batch, kv_heads, _, dim = keys.shape
    return query.reshape(batch, kv_heads, -1, dim)
