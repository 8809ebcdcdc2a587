"""KIVI: keys per channel, values per token (Liu et al., ICML 2024, arXiv 2402.02750).

Keys are quantized after RoPE, each channel over groups of 32 tokens; values each token over groups
of 32 channels. Both are asymmetric: a group's step and lower end are stored in fp16. The newest
tokens stay exact: at least the cache's window, for a group waits until all of it has left it.
"""

from __future__ import annotations

from typing import Any, ClassVar

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

GROUP = 32  # tokens of keys, channels of values: the paper's G


class KiviKeyCodec(RivalCodec):
    """A token's row holds its codes and a 32nd of the steps and ends that its group shares."""

    name = "kivi-key"
    widths = (1, 2, 4)
    group_tokens: ClassVar[int] = GROUP

    def __init__(self, spec: SideSpec, width: int) -> None:
        super().__init__(spec, width)
        self._packed = ops.packed_width(spec.head_dim, width)
        self._share = -(-spec.head_dim * ENDS_BYTES // GROUP)
        self.code_bytes = self._packed + self._share

    def settings(self) -> dict[str, Any]:
        return {"group": GROUP, "per": "channel"}

    def encode(self, vectors: Tensor) -> Tensor:
        batch, heads, tokens, dim = vectors.shape
        channels = vectors.float().unflatten(2, (-1, GROUP)).transpose(-1, -2)
        codes, ends = quantize(channels, self.width)
        packed = ops.pack_codes(
            codes.transpose(-1, -2).reshape(batch, heads, tokens, dim), self.width
        )
        shared = as_bytes(ends).flatten(-2)
        shared = torch.nn.functional.pad(shared, (0, GROUP * self._share - shared.shape[-1]))
        return torch.cat((packed, shared.reshape(batch, heads, tokens, self._share)), dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        batch, heads, tokens, _ = codes.shape
        packed, shared = codes.split((self._packed, self._share), dim=-1)
        dim = self.spec.head_dim
        levels = ops.unpack_codes(packed.contiguous(), self.width, dim)
        shared = shared.reshape(batch, heads, -1, GROUP * self._share)[..., : dim * ENDS_BYTES]
        ends = from_bytes(shared).unflatten(-1, (dim, 2))
        channels = levels.unflatten(2, (-1, GROUP)).transpose(-1, -2)
        return dequantize(channels, ends).transpose(-1, -2).reshape(batch, heads, tokens, dim)


class KiviValueCodec(RivalCodec):
    """A head's row holds its codes, then step and lower end of every group of channels."""

    name = "kivi-value"
    widths = (1, 2, 4)

    def __init__(self, spec: SideSpec, width: int) -> None:
        super().__init__(spec, width)
        self._group = largest_divisor(spec.head_dim, GROUP)
        self._packed = ops.packed_width(spec.head_dim, width)
        self.code_bytes = self._packed + spec.head_dim // self._group * ENDS_BYTES

    def settings(self) -> dict[str, Any]:
        return {"group": self._group, "per": "token"}

    def encode(self, vectors: Tensor) -> Tensor:
        codes, ends = quantize(vectors.float().unflatten(-1, (-1, self._group)), self.width)
        packed = ops.pack_codes(codes.flatten(-2), self.width)
        return torch.cat((packed, as_bytes(ends).flatten(-2)), dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        packed, ends = codes.tensor_split((self._packed,), dim=-1)
        levels = ops.unpack_codes(packed.contiguous(), self.width, self.spec.head_dim)
        groups = levels.unflatten(-1, (-1, self._group))
        return dequantize(groups, from_bytes(ends).unflatten(-1, (-1, 2))).flatten(-2)
