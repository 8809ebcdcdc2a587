"""KVQuant: non-uniform levels and sparse outliers (Hooper et al., NeurIPS 2024, arXiv 2401.18079).

Keys are quantized before RoPE and per channel: each channel is mapped to [-1, 1] by ends from a
calibration (section 3.1, 3.2). Values are quantized per token, with ends of their own in fp16. The
2^b levels are one set a layer and side, from a weighted k-means of the mapped numbers (nuq, section
3.3). One number in a hundred is an outlier, stored in fp16 with its index, and does not count for
the ends (dense and sparse, section 3.4).

The paper weights the k-means by the Fisher information, which takes gradients; a calibration has
none, so keys weigh by the energy of the queries they meet and values by what o_proj makes of an
error. The paper stores as many of a token's keys as lie outside their channels' ends, a list that
grows as it must. Here 32 tokens share a list of fixed length, since many outliers come in few
tokens: those that lie farthest outside are in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.codecs.asymmetric import ENDS_BYTES, as_bytes, from_bytes
from commvq_core.codecs.base import FitData, SideSpec, require_tensor
from commvq_core.codecs.rival import RivalCodec
from commvq_core.fit.scalar import lloyd_max, nearest_level

GROUP = 32  # tokens of keys that share a list of outliers
_TAIL = 0.005  # of the numbers at either end: one in a hundred altogether
_SAMPLE = 200_000  # numbers that the k-means sees
_SMALLEST = 2.0**-24  # the least positive fp16


class _KVQuantCodec(RivalCodec):
    """What both sides share: `levels` float32 [2^width], ascending, and one row a token."""

    needs_calibration = True
    widths = (1, 2, 3, 4)

    def __init__(self, spec: SideSpec, width: int, levels: Tensor) -> None:
        super().__init__(spec, width)
        self._levels = levels
        self._scalars = spec.kv_heads * spec.head_dim
        self._packed = ops.packed_width(self._scalars, width)

    @property
    def code_rows(self) -> int:
        """One: the ends and the outliers are those of all heads together."""
        return 1

    def _pack(self, mapped: Tensor) -> Tensor:
        return ops.pack_codes(nearest_level(mapped, self._levels), self.width)

    def _unpack(self, packed: Tensor) -> Tensor:
        index = ops.unpack_codes(packed.contiguous(), self.width, self._scalars)
        return self._levels[index.long()]

    def _by_head(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.spec.kv_heads, -1)).transpose(1, 2)

    @classmethod
    def _checked(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[int, Tensor]:
        width = config.get("width")
        if not isinstance(width, int) or width not in cls.widths:
            raise ValueError(f"width is {width!r}, not one of {list(cls.widths)}")
        return width, require_tensor(tensors, "levels", (2**width,), torch.float32)


class KVQuantKeyCodec(_KVQuantCodec):
    """`ends` float32 [2, kv_heads * head_dim]: middle and half the range of each channel.

    A token's row holds its codes and a 32nd of its group's list: indices, then numbers in fp16.
    """

    name = "kvquant-key"
    before_rope = True
    group_tokens: ClassVar[int] = GROUP

    def __init__(self, spec: SideSpec, width: int, levels: Tensor, ends: Tensor) -> None:
        super().__init__(spec, width, levels)
        self._ends = ends
        self._index = _Indices(GROUP * self._scalars)
        # As many as fill the bytes that are a multiple of a group's tokens.
        entry, wanted = self._index.bytes + 2, 2 * _TAIL * GROUP * self._scalars
        self._share = -(-round(wanted * entry) // GROUP)
        self._outliers = self._share * GROUP // entry
        self.code_bytes = self._packed + self._share

    def settings(self) -> dict[str, Any]:
        return {"outliers": self._outliers, "of": GROUP * self._scalars, "weights": "query energy"}

    def tensors(self) -> dict[str, Tensor]:
        return {"levels": self._levels, "ends": self._ends}

    def encode(self, vectors: Tensor) -> Tensor:
        rows = vectors.float().transpose(1, 2).flatten(2)
        middle, half = self._ends
        groups, excess = (
            x.unflatten(1, (-1, GROUP)).flatten(2) for x in (rows, (rows - middle).abs() - half)
        )
        outlying = excess.topk(self._outliers, dim=-1).indices
        numbers = as_bytes(groups.gather(-1, outlying).half())
        shared = torch.cat((self._index.to_bytes(outlying), numbers), dim=-1)
        shared = torch.nn.functional.pad(shared, (0, GROUP * self._share - shared.shape[-1]))
        shared = shared.unflatten(-1, (GROUP, -1)).flatten(1, 2)
        return torch.cat((self._pack((rows - middle) / half), shared), dim=-1)[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        packed, shared = codes[:, 0].tensor_split((self._packed,), dim=-1)
        middle, half = self._ends
        rows = self._unpack(packed) * half + middle
        shared = shared.unflatten(1, (-1, GROUP)).flatten(2)
        ends = self._outliers * self._index.bytes
        index = self._index.from_bytes(shared[..., :ends])
        numbers = from_bytes(shared[..., ends : ends + 2 * self._outliers]).float()
        groups = rows.unflatten(1, (-1, GROUP)).flatten(2).scatter(-1, index, numbers)
        return self._by_head(groups.unflatten(-1, (GROUP, -1)).flatten(1, 2))

    def to(self, device: Any) -> KVQuantKeyCodec:
        moved = self._levels.to(device), self._ends.to(device)
        return KVQuantKeyCodec(self.spec, self.width, *moved)

    @classmethod
    def from_tensors(
        cls, spec: SideSpec, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> KVQuantKeyCodec:
        width, levels = cls._checked(config, tensors)
        shape = (2, spec.kv_heads * spec.head_dim)
        return cls(spec, width, levels, require_tensor(tensors, "ends", shape, torch.float32))

    @classmethod
    def make(cls, spec: SideSpec, width: int, data: FitData | None) -> KVQuantKeyCodec:
        """Learn ends and levels; of the metric, the diagonal counts."""
        assert data is not None
        rows = data.vectors.float().flatten(1)
        ends = channel_ends(rows)
        middle, half = ends
        inside = (rows - middle).abs() <= half
        return cls(spec, width, _levels(data, (rows - middle) / half, half, inside, width), ends)


class KVQuantValueCodec(_KVQuantCodec):
    """A token's row: codes, indices of outliers, these in fp16, middle and half the range."""

    name = "kvquant-value"

    def __init__(self, spec: SideSpec, width: int, levels: Tensor) -> None:
        super().__init__(spec, width, levels)
        self._tail = tail_count(self._scalars)
        self._index = _Indices(self._scalars)
        self._sparse = 2 * self._tail * self._index.bytes
        self.code_bytes = self._packed + self._sparse + 2 * 2 * self._tail + ENDS_BYTES

    def settings(self) -> dict[str, Any]:
        return {"outliers": 2 * self._tail, "of": self._scalars, "weights": "o_proj"}

    def tensors(self) -> dict[str, Tensor]:
        return {"levels": self._levels}

    def encode(self, vectors: Tensor) -> Tensor:
        rows = vectors.float().transpose(1, 2).flatten(2)
        outlying = token_outliers(rows, self._tail)
        middle, half = token_ends(rows, outlying)
        numbers = torch.cat((rows.gather(-1, outlying), middle, half), dim=-1).half()
        parts = (self._pack((rows - middle) / half), self._index.to_bytes(outlying))
        return torch.cat((*parts, as_bytes(numbers)), dim=-1)[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        packed, index, numbers = codes[:, 0].tensor_split(
            (self._packed, self._packed + self._sparse), dim=-1
        )
        outliers, middle, half = from_bytes(numbers).float().split((2 * self._tail, 1, 1), dim=-1)
        rows = self._unpack(packed) * half + middle
        return self._by_head(rows.scatter(-1, self._index.from_bytes(index), outliers))

    def to(self, device: Any) -> KVQuantValueCodec:
        return KVQuantValueCodec(self.spec, self.width, self._levels.to(device))

    @classmethod
    def from_tensors(
        cls, spec: SideSpec, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> KVQuantValueCodec:
        return cls(spec, *cls._checked(config, tensors))

    @classmethod
    def make(cls, spec: SideSpec, width: int, data: FitData | None) -> KVQuantValueCodec:
        """Learn the levels; of the metric, the diagonal counts."""
        assert data is not None
        rows = data.vectors.float().flatten(1)
        outlying = token_outliers(rows, tail_count(rows.shape[1]))
        middle, half = token_ends(rows, outlying)
        inside = torch.ones_like(rows, dtype=torch.bool).scatter(-1, outlying, False)
        return cls(spec, width, _levels(data, (rows - middle) / half, half, inside, width))


class _Indices:
    """Indices below `count` as bytes: the narrowest of one, two and four that holds them."""

    def __init__(self, count: int) -> None:
        kinds = (torch.uint8, torch.int16, torch.int32)
        self._kind = next(k for k in kinds if count <= 2 ** (8 * k.itemsize))
        self._offset = torch.iinfo(self._kind).min
        self.bytes = self._kind.itemsize

    def to_bytes(self, index: Tensor) -> Tensor:
        return (index + self._offset).to(self._kind).view(torch.uint8)

    def from_bytes(self, data: Tensor) -> Tensor:
        data = data.clone(memory_format=torch.contiguous_format)
        return data.view(self._kind).long() - self._offset


def _levels(data: FitData, mapped: Tensor, half: Tensor, inside: Tensor, width: int) -> Tensor:
    """The levels that lose least of the numbers `inside`, each weighted by what its error costs."""
    weights = data.metric.diagonal(dim1=-2, dim2=-1).flatten() * half.square()
    sample, weights = mapped[inside], weights.expand_as(mapped)[inside]
    step = -(-len(sample) // _SAMPLE)
    return lloyd_max(sample[::step], weights[::step], 2**width).float()


def channel_ends(rows: Tensor) -> Tensor:
    """Middle and half the range of every channel without its outliers, float32 [2, channels]."""
    ordered = rows.sort(dim=0).values
    cut = round(_TAIL * len(rows))
    low, high = ordered[cut], ordered[len(rows) - 1 - cut]
    return torch.stack(((high + low) / 2, ((high - low) / 2).clamp_min(_SMALLEST)))


def tail_count(scalars: int) -> int:
    """How many of a token's numbers are outliers at either end."""
    return max(1, round(_TAIL * scalars))


def token_outliers(rows: Tensor, tail: int) -> Tensor:
    """Indices int64 [..., 2 tail] of each row's largest and smallest numbers."""
    order = rows.argsort(dim=-1)
    return torch.cat((order[..., :tail], order[..., -tail:]), dim=-1)


def token_ends(rows: Tensor, outlying: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half the range [..., 1] of each row without its outliers, rounded to fp16."""
    high = rows.scatter(-1, outlying, -torch.inf).amax(dim=-1, keepdim=True)
    low = rows.scatter(-1, outlying, torch.inf).amin(dim=-1, keepdim=True)
    half = ((high - low) / 2).clamp_min(_SMALLEST)
    return ((high + low) / 2).half().float(), half.half().float()
