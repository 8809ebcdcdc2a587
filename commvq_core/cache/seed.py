"""Fill a compressed cache with keys and values that an exact one holds."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from commvq_core.cache.attention import settle
from commvq_core.cache.layer import CommVQLayer
from commvq_core.cache.positions import padded_positions

if TYPE_CHECKING:
    from transformers import DynamicCache

    from commvq_core.cache.cache import CommVQCache


def seed(cache: CommVQCache, exact: DynamicCache, mask: Tensor, *, dtype: torch.dtype) -> None:
    """Make the empty `cache` what running `exact`'s tokens in one pass would have made it.

    `mask` int64 [batch, tokens] is 0 where a row is padded, on the left; `dtype` is what the
    model computes in. Layers without codes are copied.
    """
    if bool(mask.all()):
        numbers, shown = torch.arange(mask.shape[1], device=mask.device)[None], None
    else:
        numbers, shown = padded_positions(mask), mask[:, None, None].bool()
    cache.positions.begin_forward(0, numbers)
    for index, source in enumerate(exact.layers):
        layer = cache.layers[index]
        if isinstance(layer, CommVQLayer):
            layer.update(source.keys.to(dtype), source.values.to(dtype))
            layer.awaits_attention = False
            settle(layer, shown, mask.shape[1])
        else:
            cache.layers[index] = copy.deepcopy(source)
    cache.positions.end_forward()
