"""TurboQuant (the MSE variant): a random rotation, then the best levels for single coordinates.

Zandieh et al. 2025, arXiv 2504.19874, section 3.1: a vector's norm is stored (here in fp16); its
direction is rotated at random, which gives each coordinate a density of (1 - x^2)^((d - 3) / 2),
near normal with variance 1 / d, whatever the data; each coordinate is stored as the nearest of the
2^b levels that are best for that density (Lloyd-Max). Nothing is learnt.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.codecs.asymmetric import as_bytes, from_bytes
from commvq_core.codecs.base import SideSpec
from commvq_core.codecs.norms import NORM_BYTES
from commvq_core.codecs.rival import RivalCodec
from commvq_core.codecs.rotation import random_rotation
from commvq_core.fit.scalar import lloyd_max, nearest_level

_GRID = 2**16  # points of the density that Lloyd's algorithm sees


@functools.cache
def sphere_levels(dim: int, width: int) -> Tensor:
    """The 2^width best levels for a coordinate of a random direction in `dim` dims, float32."""
    reach = min(1.0, 8 * dim**-0.5)  # eight standard deviations
    points = reach * ((torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID * 2 - 1)
    density = (1 - points.square()) ** ((dim - 3) / 2)
    return lloyd_max(points, density, 2**width).float()


class TurboQuantCodec(RivalCodec):
    """See the module's docstring. A head's row: its norm in fp16, then its codes."""

    name = "turboquant"
    widths = (1, 2, 3, 4)

    def __init__(self, spec: SideSpec, width: int, rotation: Tensor | None = None) -> None:
        super().__init__(spec, width)
        self._rotation = random_rotation(spec.head_dim) if rotation is None else rotation
        self._levels = sphere_levels(spec.head_dim, width).to(self._rotation.device)
        self.code_bytes = NORM_BYTES + ops.packed_width(spec.head_dim, width)

    @property
    def resident(self) -> tuple[Tensor, ...]:
        return self._rotation, self._levels

    def settings(self) -> dict[str, Any]:
        return {"variant": "mse"}

    def encode(self, vectors: Tensor) -> Tensor:
        norm = vectors.float().norm(dim=-1, keepdim=True)
        rotated = vectors.float() / norm.clamp_min(1e-30) @ self._rotation
        packed = ops.pack_codes(nearest_level(rotated, self._levels), self.width)
        return torch.cat((as_bytes(norm.half()), packed), dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        norm, packed = codes.tensor_split((NORM_BYTES,), dim=-1)
        index = ops.unpack_codes(packed.contiguous(), self.width, self.spec.head_dim)
        return self._levels[index.long()] @ self._rotation.T * from_bytes(norm).float()

    def to(self, device: Any) -> TurboQuantCodec:
        return TurboQuantCodec(self.spec, self.width, self._rotation.to(device))
