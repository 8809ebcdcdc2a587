"""The paper's value codec: a small network picks 0/1 codes, a codebook sums them (section 4.2).

The values of all KV heads of a token are divided by a scale a channel and by their L2 norm, which
is stored in fp16. LayerNorm, Linear, GELU, Linear give 4 logits a group; the largest picks one of
the patterns (1, 0), (0, 1), (1, 1), (0, 0), two bits. Decoding multiplies the bits by a codebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.codecs.base import FitData, FittedCodec, SideSpec, require_tensor
from commvq_core.codecs.norms import NORM_BYTES, join_norm, split_norm, token_norm
from commvq_core.errors import InputError
from commvq_core.fit.neural import NeuralTraining, fit_network, logits, scaled
from commvq_core.ops.published import PATTERN_BITS, PATTERNS

_WIDEST = 4096


@dataclass(frozen=True)
class NeuralConfig:
    """`groups` of two bits, `hidden` units, and the steps it was trained with."""

    groups: int
    hidden: int
    steps: int = 2000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, not a whole number from 1")


class NeuralValueCodec(FittedCodec):
    """See the module's docstring; `weights` are the tensors that `_shapes` names, float32.

    PATTERNS says which two 0/1 codes each logit of a group stands for.
    """

    name = "neural-value"
    unit: ClassVar[Literal["head", "layer"]] = "layer"

    def __init__(self, spec: SideSpec, config: NeuralConfig, weights: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self._config = config
        self._weights = {name: tensor.float() for name, tensor in weights.items()}
        # The codebook a KV head, [kv_heads, 2 * groups, head_dim].
        codebook = self._weights.pop("embedding").unflatten(-1, (spec.kv_heads, -1))
        self._books = codebook.transpose(0, 1).contiguous()
        self.groups = config.groups
        self.code_bytes = _code_bytes(config)

    @property
    def code_rows(self) -> int:
        """One: a code belongs to all heads."""
        return 1

    def encode(self, vectors: Tensor) -> Tensor:
        batch, _, tokens, _ = vectors.shape
        flat = scaled(vectors.float().transpose(1, 2).flatten(2), self._weights["scale"])
        norm, unit = token_norm(flat[:, None])
        best = logits(unit[:, 0], self._weights).view(batch, tokens, -1, 4).argmax(dim=-1)
        packed = ops.pack_codes(best.to(torch.uint8), PATTERN_BITS)
        return join_norm(norm, packed)[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        norm, packed = split_norm(codes[:, 0])
        index = ops.unpack_codes(packed.contiguous(), PATTERN_BITS, self._config.groups)
        patterns = torch.tensor(PATTERNS, device=codes.device)
        bits = patterns[index.int()].flatten(-2) * norm[..., None]
        return torch.stack([bits @ book for book in self._books], dim=1) * self._factors

    def restored(self, sums: Tensor) -> Tensor:
        """Weighted sums of 0/1 codes [batch, kv_heads, n, 2 * groups] -> of each head's values."""
        return sums @ self._books * self._factors

    @property
    def _factors(self) -> Tensor:
        """The scale of every channel, [kv_heads, 1, head_dim]."""
        return (self._weights["scale"] + 1e-6).view(self.spec.kv_heads, 1, -1)

    def symbols(self, codes: Tensor) -> tuple[Tensor, int]:
        packed = split_norm(codes)[1].contiguous()
        return ops.unpack_codes(packed, PATTERN_BITS, self._config.groups), len(PATTERNS)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.half() for name, tensor in self._all().items()}

    def _all(self) -> dict[str, Tensor]:
        """The weights as they came, float32."""
        return {**self._weights, "embedding": self._books.transpose(0, 1).flatten(1)}

    @property
    def resident_bytes(self) -> int:
        held = (*self._weights.values(), self._books)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def config(self) -> dict[str, Any]:
        return asdict(self._config)

    def to(self, device: Any) -> NeuralValueCodec:
        if self._books.to(device) is self._books:
            return self  # a cache asks each time it is opened
        moved = {name: tensor.to(device) for name, tensor in self._all().items()}
        return NeuralValueCodec(self.spec, self._config, moved)

    @classmethod
    def from_tensors(
        cls, spec: SideSpec, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> NeuralValueCodec:
        geometry = _geometry(config)
        weights = {
            name: require_tensor(tensors, name, shape, torch.float16)
            for name, shape in _shapes(spec, geometry).items()
        }
        return cls(spec, geometry, weights)

    @classmethod
    def plan(cls, spec: SideSpec, bits: float) -> dict[str, Any]:
        if spec.side != "value":
            raise InputError("the paper's value codec is not for keys", "use --preset default")
        groups = max(1, round(bits * spec.kv_heads * spec.head_dim / 2))
        return asdict(NeuralConfig(groups=groups, hidden=min(_WIDEST, 4 * groups)))

    @classmethod
    def bits(cls, spec: SideSpec, config: Mapping[str, Any]) -> float:
        return 8.0 * _code_bytes(_geometry(config)) / (spec.kv_heads * spec.head_dim)

    @classmethod
    def least_tokens(cls, config: Mapping[str, Any]) -> int:
        return 1024  # two batches

    @classmethod
    def fit(cls, spec: SideSpec, config: Mapping[str, Any], data: FitData) -> dict[str, Tensor]:
        geometry = _geometry(config)
        weights = fit_network(
            data.vectors.flatten(1),
            groups=geometry.groups,
            hidden=geometry.hidden,
            patterns=torch.tensor(PATTERNS),
            training=NeuralTraining(steps=geometry.steps),
            seed=data.seed,
        )
        return {name: tensor.half() for name, tensor in weights.items()}

    @classmethod
    def join(
        cls, spec: SideSpec, config: Mapping[str, Any], units: Sequence[Mapping[str, Tensor]]
    ) -> NeuralValueCodec:
        (unit,) = units
        return cls.from_tensors(spec, config, unit)


def _geometry(config: Mapping[str, Any]) -> NeuralConfig:
    try:
        return NeuralConfig(**config)
    except TypeError as error:
        raise ValueError(f"config does not describe a neural value codec ({error})") from error


def _shapes(spec: SideSpec, config: NeuralConfig) -> dict[str, tuple[int, ...]]:
    width, out = spec.kv_heads * spec.head_dim, 4 * config.groups
    return {
        "scale": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "enc1.weight": (config.hidden, width),
        "enc1.bias": (config.hidden,),
        "out.weight": (out, config.hidden),
        "out.bias": (out,),
        "embedding": (2 * config.groups, width),
    }


def _code_bytes(config: NeuralConfig) -> int:
    """Packed bytes of a token: the norm and two bits a group."""
    return NORM_BYTES + -(-config.groups * PATTERN_BITS // 8)
