"""Codebooks of values: bytes with a scale a stage, in the space of the values' metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from commvq_core.codecs.base import SideSpec, require_tensor


@dataclass(frozen=True)
class ValueBooks:
    """One layer's. A value is `y @ inverse`, with y the sum of `scales` times codewords.

    `words` int8 [kv_heads, subs, stages, codewords, sub_dim]; `scales` float32 [kv_heads, subs,
    stages]; `forward` and `inverse` float32 [kv_heads, head_dim, head_dim], of each other.
    """

    words: Tensor
    scales: Tensor
    inverse: Tensor
    forward: Tensor

    @property
    def codebooks(self) -> Tensor:
        """The codewords, float32, shaped as `words`; made anew."""
        return self.words * self.scales[..., None, None]

    @property
    def held(self) -> tuple[Tensor, ...]:
        """All that stays in memory."""
        return self.words, self.scales, self.inverse, self.forward

    def transformed(self, rows: Tensor) -> Tensor:
        """Values [..., kv_heads, n, head_dim] in the space of the metric."""
        return rows @ self.forward

    def restored(self, rows: Tensor) -> Tensor:
        """The inverse of `transformed`."""
        return rows @ self.inverse

    def to(self, device: torch.device | str) -> ValueBooks:
        return ValueBooks(*(tensor.to(device) for tensor in self.held))

    def tensors(self) -> dict[str, Tensor]:
        return {"codebooks": self.words, "scales": self.scales, "inverse": self.inverse}

    @classmethod
    def from_tensors(
        cls, spec: SideSpec, shape: tuple[int, ...], tensors: Mapping[str, Tensor]
    ) -> ValueBooks:
        """`shape` is that of the codebooks. Raises ValueError naming the tensor that is wrong."""
        matrix = (spec.kv_heads, spec.head_dim, spec.head_dim)
        words = require_tensor(tensors, "codebooks", shape, torch.int8)
        scales = require_tensor(tensors, "scales", shape[:3], torch.float32)
        inverse = require_tensor(tensors, "inverse", matrix, torch.float32)
        if bool(torch.linalg.inv_ex(inverse).info.any()):
            raise ValueError("tensor inverse holds a singular matrix")
        return cls(words, scales, inverse, torch.linalg.inv(inverse))

    @classmethod
    def from_codebooks(cls, codebooks: Tensor, inverse: Tensor) -> ValueBooks:
        """One head's, rounded from float32 [subs, stages, codewords, sub_dim].

        The largest number of a stage becomes 127. Rounding adds some ten-thousandth of a stage's
        own variance to the error, nothing beside what coding loses.
        """
        scales = codebooks.abs().amax(dim=(-2, -1)).clamp_min(1e-30) / 127
        words = (codebooks / scales[..., None, None]).round().to(torch.int8)
        return cls(words[None], scales[None], inverse[None], torch.linalg.inv(inverse)[None])
