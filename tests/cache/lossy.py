"""A codec that loses a lot but needs no fitting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from commvq_core.codecs.base import Codec, SideSpec
from commvq_core.models import describe_model
from commvq_core.sides import side_spec


class RoundingCodec(Codec):
    """Rounds to a few levels between -4 and 4, a byte a scalar."""

    name = "rounding"
    steps = 4

    def __init__(self, spec: SideSpec) -> None:
        self.spec, self.code_bytes = spec, spec.head_dim

    def encode(self, vectors: Tensor) -> Tensor:
        levels = ((vectors.float().clamp(-4, 4) + 4) / 8 * self.steps).round()
        return levels.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float() / self.steps * 8 - 4

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_tensors(
        cls, spec: SideSpec, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> RoundingCodec:
        return cls(spec)

    def to(self, device: Any) -> RoundingCodec:
        return self


def lossy_codecs(model: PreTrainedModel) -> dict[int, tuple[Codec, Codec]]:
    """A RoundingCodec for both sides of every compressible layer."""
    return {
        layer.index: (
            RoundingCodec(side_spec(layer, "key")),
            RoundingCodec(side_spec(layer, "value")),
        )
        for layer in describe_model(model).compressible
    }
