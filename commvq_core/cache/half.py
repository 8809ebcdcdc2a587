"""The "fp16" codec of evaluations: an ordinary cache that really stores 16 bits.

A model that runs in float32 (any fp16 checkpoint on a CPU) would keep a float32 cache, which is
nobody's baseline. This one rounds what it stores to fp16; bf16 and fp16 models store their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def half_dtype(model: PreTrainedModel) -> torch.dtype:
    """What a 16-bit cache of this model stores: fp16, or a 16-bit model's own dtype."""
    return torch.float16 if model.dtype == torch.float32 else model.dtype


class HalfPrecisionCache(DynamicCache):
    """DynamicCache whose full-attention layers store fp16 (bf16 for a bf16 model)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store rounded states, return all of them in the model's dtype."""
        dtype = key_states.dtype
        stored = torch.float16 if dtype == torch.float32 else dtype
        keys, values = super().update(
            key_states.to(stored), value_states.to(stored), layer_idx, *args, **kwargs
        )
        return keys.to(dtype), values.to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes stored for the context now."""
        tensors = [
            tensor
            for layer in self.layers
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if isinstance(tensor, Tensor)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def bits_per_element(self) -> float:
        """Bits a scalar of K and V costs."""
        return 16.0
