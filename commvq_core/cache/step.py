"""A decoding step: one new token's attention over a whole layer, in as few calls as there are.

Where a model's weights have just passed through all caches, every call of PyTorch waits for its own
code, so that fifty of them take longer than attention over thousands of codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core.cache.layer import CommVQLayer
from commvq_core.codecs.attention import Coded, CodedAttention, Exact


def attend_step(
    layer: CommVQLayer, query: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor | None:
    """Output [batch, 1, heads, head_dim] for `query` [batch, heads, 1, head_dim]; None: can't be.

    It can for one token on a CPU that sees all others, its sinks and window in float32 or bfloat16,
    and for codecs that have an operator.
    """
    keys, values, first_valid = layer.keys, layer.values, layer.first_valid
    assert keys is not None
    assert values is not None
    plain = query.shape[2] == 1 and mask is None and layer.last_first == 0
    if not plain or query.device.type != "cpu" or first_valid is None:
        return None
    dtypes = (torch.float32, torch.bfloat16)
    if query.dtype not in dtypes or keys.dtype not in dtypes:
        return None
    stop = layer.exact_start
    (boundary,) = layer.first_exact(layer.get_seq_length() - 1, 1)
    if boundary != stop or stop == 0 or layer.sinks > stop:
        return None
    attention = _attention(layer, query.shape[1] // keys.shape[1])
    if attention is None:
        return None
    turning = layer.positions.turns(layer.rotary, stop, first_valid, settled=layer.all_begun)
    if turning is None:
        return None
    codes = (layer.key_codes.slice(0, stop), layer.value_codes.slice(0, stop))
    if layer.sink_keys is None or layer.sink_values is None:
        sinks = (keys[:, :, :0], values[:, :, :0])
    else:
        sinks = (layer.sink_keys, layer.sink_values)
    return attention.step(
        query,
        scaling,
        layer.rotary,
        Coded(*codes, *turning, first_valid, stop),
        Exact(keys, values, *sinks),
        softcap,
    )


def _attention(layer: CommVQLayer, rows: int) -> CodedAttention | None:
    """The operator of a layer's codecs, if it takes that many rows of queries a KV head."""
    attention = layer.key_codec.attention(layer.value_codec, rows)
    fits = attention is not None and rows <= attention.most_rows(torch.device("cpu"))
    return attention if fits else None
