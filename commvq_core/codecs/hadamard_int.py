"""int-N: integers per token after a Hadamard rotation, as QuaRot stores its cache.

Ashkboos et al., NeurIPS 2024, arXiv 2404.00456, section 4.2 and 5: keys (after RoPE) and values of
each head are rotated by a Hadamard matrix and quantized asymmetrically per token, in groups of 128
channels, the ends clipped by 0.95 (at 8 bits clipping would only lose, so there it is left out).
The rotation is fixed and undone when decoding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.codecs.asymmetric import (
    ENDS_BYTES,
    as_bytes,
    dequantize,
    from_bytes,
    largest_divisor,
    quantize,
)
from commvq_core.codecs.base import SideSpec
from commvq_core.codecs.rival import RivalCodec
from commvq_core.codecs.rotation import hadamard

_GROUP = 128
_CLIP, _CLIPPED = 0.95, 4  # up to so many bits


class HadamardIntCodec(RivalCodec):
    """See the module's docstring. A head's row: its codes, then step and lower end a group."""

    name = "int"
    widths = (2, 3, 4, 8)

    def __init__(self, spec: SideSpec, width: int, rotation: Tensor | None = None) -> None:
        super().__init__(spec, width)
        self._rotation = hadamard(spec.head_dim) if rotation is None else rotation
        self._group = largest_divisor(spec.head_dim, _GROUP)
        self._clip = _CLIP if width <= _CLIPPED else 1.0
        self._packed = ops.packed_width(spec.head_dim, width)
        self.code_bytes = self._packed + spec.head_dim // self._group * ENDS_BYTES

    @property
    def resident(self) -> tuple[Tensor, ...]:
        return (self._rotation,)

    def settings(self) -> dict[str, Any]:
        return {"group": self._group, "clip": self._clip}

    def encode(self, vectors: Tensor) -> Tensor:
        rotated = (vectors.float() @ self._rotation).unflatten(-1, (-1, self._group))
        codes, ends = quantize(rotated, self.width, self._clip)
        packed = ops.pack_codes(codes.flatten(-2), self.width)
        return torch.cat((packed, as_bytes(ends).flatten(-2)), dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        packed, ends = codes.tensor_split((self._packed,), dim=-1)
        levels = ops.unpack_codes(packed.contiguous(), self.width, self.spec.head_dim)
        groups = levels.unflatten(-1, (-1, self._group))
        rotated = dequantize(groups, from_bytes(ends).unflatten(-1, (-1, 2))).flatten(-2)
        return rotated @ self._rotation.T

    def to(self, device: Any) -> HadamardIntCodec:
        return HadamardIntCodec(self.spec, self.width, self._rotation.to(device))
