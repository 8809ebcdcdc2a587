"""The lossless codec: stores the bytes of the vectors themselves.

It exists to prove the cache right: with it, every model must give the logits it gives with its own
cache (design.md calls it the oracle).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from commvq_core.codecs.base import Codec, SideSpec


class IdentityCodec(Codec):
    """Float32 vectors as bytes: 32 bits an element, nothing lost."""

    name = "identity"

    def __init__(self, spec: SideSpec) -> None:
        self.spec = spec
        self.code_bytes = 4 * spec.head_dim

    def encode(self, vectors: Tensor) -> Tensor:
        return vectors.float().contiguous().view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.contiguous().view(torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_tensors(
        cls, spec: SideSpec, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> IdentityCodec:
        return cls(spec)

    def to(self, device: Any) -> IdentityCodec:
        return self
