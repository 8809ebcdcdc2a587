"""A decoding step: one new token's attention over a whole layer, in as few calls as there are.

Where a model's weights have just passed through all caches, every call of PyTorch waits for its own
code: some twenty of them took half as long as attention over 8,192 codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core.cache.layer import CommVQLayer
from commvq_core.codecs.attention import Coded, Exact

_CPU = torch.device("cpu")
_DTYPES = (torch.float32, torch.bfloat16)


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
    if not plain or not query.is_cpu or first_valid is None:
        return None
    if query.dtype not in _DTYPES or keys.dtype not in _DTYPES:
        return None
    stop = layer.exact_start
    (boundary,) = layer.first_exact(layer.get_seq_length() - 1, 1)
    if boundary != stop or stop == 0 or layer.sinks > stop:
        return None
    rows = query.shape[1] // keys.shape[1]
    attention = layer.attention(rows)
    if attention is None or rows > attention.most_rows(_CPU):
        return None
    turning = layer.positions.turns(layer.rotary, stop, first_valid, settled=layer.all_begun)
    if turning is None:
        return None
    if layer.sink_keys is None or layer.sink_values is None:
        sinks = (keys[:, :, :0], values[:, :, :0])
    else:
        sinks = (layer.sink_keys, layer.sink_values)
    return attention.step(
        query,
        scaling,
        layer.rotary,
        Coded(layer.key_codes.data, layer.value_codes.data, *turning, first_valid, stop),
        Exact(keys, values, *sinks),
        softcap,
    )
