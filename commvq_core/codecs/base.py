"""What a codec is: a way to turn one side of one layer's cache into bytes and back.

A codec sees canonical vectors (rope.to_pairs) before RoPE and knows nothing of models, positions
or caches. The cache stores the bytes it returns and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from commvq_core.codecs.attention import CodedAttention


@dataclass(frozen=True)
class SideSpec:
    """Which vectors a codec is for: one side ("key" or "value") of one layer.

    `rotary_dim` says how many leading dims of a canonical vector are pairs that RoPE rotates.
    """

    side: str
    kv_heads: int
    head_dim: int
    rotary_dim: int

    def __post_init__(self) -> None:
        if self.side not in ("key", "value"):
            raise ValueError(f"side is {self.side!r}: use 'key' or 'value'")
        if self.kv_heads < 1 or self.head_dim < 1 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"impossible geometry {self}")


@dataclass(frozen=True)
class FitData:
    """What a codec may learn from, for one unit of fitting.

    `vectors` [n, heads, head_dim] float32, canonical, before RoPE; `metric` [heads, head_dim,
    head_dim] float32, symmetric positive definite: the loss of an error e is e^T metric e.
    """

    vectors: Tensor
    metric: Tensor
    seed: int


class Codec(ABC):
    """Encoder and decoder of one side of one layer.

    Attributes: `name` as registered; `code_rows`, the rows of codes that a token has, one for each
    KV head or one for the layer; `code_bytes`, what a row costs, packed. `before_rope` False: keys
    come as the model rotated them, in its own order of dims, and are stored like that. A codec with
    `group_tokens` above 1 codes so many tokens together: it only ever gets whole groups, counted
    from the first token of the context.
    """

    name: ClassVar[str]
    before_rope: ClassVar[bool] = True
    group_tokens: ClassVar[int] = 1
    spec: SideSpec
    code_bytes: int

    @property
    def code_rows(self) -> int:
        """Rows of codes a token; codecs that code all heads together have one."""
        return self.spec.kv_heads

    @property
    def bits_per_element(self) -> float:
        """Bits stored for each scalar of the original vectors, all in."""
        scalars = self.spec.kv_heads * self.spec.head_dim
        return 8.0 * self.code_bytes * self.code_rows / scalars

    @property
    def resident_bytes(self) -> int:
        """Bytes that stay loaded however long the context is (codebooks, transforms)."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Codec:
        # Codecs never change, so copies of a cache share them.
        return self

    @abstractmethod
    def encode(self, vectors: Tensor) -> Tensor:
        """[batch, kv_heads, tokens, head_dim] float -> uint8 [batch, rows, tokens, code_bytes]."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The inverse shape-wise: float32 [batch, kv_heads, tokens, head_dim]."""

    def symbols(self, codes: Tensor) -> tuple[Tensor, int] | None:
        """What was chosen: (uint8 [..., tokens, choices], how many a choice has), or None.

        Lets `train-codebook` count codewords that nothing uses.
        """
        return None

    def attention(self, values: Codec, rows: int) -> CodedAttention | None:
        """What attends over codes of these keys and of `values`; None: they must be decoded.

        `rows` is how many rows of queries share a KV head.
        """
        return None

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything `from_tensors` needs, as contiguous CPU or device tensors."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The JSON part of the codec: what `from_tensors` needs beside the tensors."""

    @classmethod
    @abstractmethod
    def from_tensors(
        cls, spec: SideSpec, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Codec:
        """Rebuild. Raises ValueError naming the field that is missing, misshapen or not finite."""

    @abstractmethod
    def to(self, device: Any) -> Codec:
        """The same codec with its tensors on `device`."""


class FittedCodec(Codec):
    """A codec that learns. One call of `fit` makes the tensors of one unit.

    `unit` is what a unit is: a KV head ("head") or all heads of the layer ("layer").
    """

    unit: ClassVar[Literal["head", "layer"]] = "head"

    @classmethod
    @abstractmethod
    def plan(cls, spec: SideSpec, bits: float) -> dict[str, Any]:
        """The config that spends `bits` an element. Raises InputError when no geometry does."""

    @classmethod
    @abstractmethod
    def bits(cls, spec: SideSpec, config: Mapping[str, Any]) -> float:
        """Bits an element that a config costs, all in."""

    @classmethod
    @abstractmethod
    def least_tokens(cls, config: Mapping[str, Any]) -> int:
        """How many calibration tokens `fit` needs at the very least."""

    @classmethod
    @abstractmethod
    def fit(cls, spec: SideSpec, config: Mapping[str, Any], data: FitData) -> dict[str, Tensor]:
        """Learn the tensors of one unit; deterministic.

        `data.vectors` [n, heads, head_dim] has one head for a unit of a head, else all.
        """

    @classmethod
    @abstractmethod
    def join(
        cls, spec: SideSpec, config: Mapping[str, Any], units: Sequence[Mapping[str, Tensor]]
    ) -> Codec:
        """The layer's codec from the tensors of its units, in order. Raises ValueError."""


def require_tensor(
    tensors: Mapping[str, Tensor], name: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Fetch a tensor; check shape, dtype and finiteness. Raises ValueError naming the field."""
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing")
    tensor = tensors[name]
    if list(tensor.shape) != list(shape):
        raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, not {list(shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"tensor {name} has dtype {tensor.dtype}, not {dtype}")
    if dtype.is_floating_point and not bool(tensor.isfinite().all()):
        raise ValueError(f"tensor {name} holds NaN or infinity")
    return tensor
