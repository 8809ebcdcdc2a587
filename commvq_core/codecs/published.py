"""The paper's key codec: rounds of 64 x 64 complex centres behind one norm a token (section 4.1).

A token's keys of all KV heads are divided by their common L2 norm, which is stored in fp16. Each
head then has `rounds` residual rounds; a round's centre is theta_a + i theta_b and costs two codes
of 6 bits. Complex multiplication by exp(i m w) commutes with all of it, which is what lets RoPE
move to the query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.codecs.attention import CodedAttention
from commvq_core.codecs.base import Codec, FitData, FittedCodec, SideSpec, require_tensor
from commvq_core.codecs.neural import NeuralValueCodec
from commvq_core.codecs.norms import NORM_BYTES, join_norm, split_norm, token_norm
from commvq_core.codecs.published_attention import PublishedAttention, WholeRounds
from commvq_core.errors import InputError
from commvq_core.fit.em import Annealing, centre_norms, decode_round, fit_rounds
from commvq_core.ops.published import ROUND_CODE_BITS, ROUND_CODEWORDS

_ROUND_BITS = 2 * ROUND_CODE_BITS


@dataclass(frozen=True)
class PublishedConfig:
    """Rounds a head, and how many annealing steps each was fitted with at most."""

    rounds: int
    steps: int = 100

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, not a whole number from 1")


class PublishedKeyCodec(FittedCodec):
    """See the module's docstring. `theta` float32 [kv_heads, rounds, 64, head_dim], canonical."""

    name = "published-key"
    unit: ClassVar[Literal["head", "layer"]] = "layer"

    def __init__(self, spec: SideSpec, config: PublishedConfig, theta: Tensor) -> None:
        self.spec = spec
        self._config = config
        self.theta = theta.float()
        self._whole = WholeRounds.of(self.theta)
        self._tables = centre_norms(self.theta)
        self.code_bytes = _code_bytes(spec, config)

    @property
    def code_rows(self) -> int:
        """One: the norm belongs to all heads."""
        return 1

    def encode(self, vectors: Tensor) -> Tensor:
        batch, heads, tokens, dim = vectors.shape
        norm, unit = token_norm(vectors.float())
        rows = unit.transpose(0, 1).reshape(heads, batch * tokens, dim)
        codes = ops.published_encode(rows, self.theta, self._tables)
        by_token = codes.transpose(0, 1).reshape(batch, tokens, -1)
        return join_norm(norm, ops.pack_codes(by_token, ROUND_CODE_BITS))[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        heads, rounds = self.spec.kv_heads, self._config.rounds
        norm, packed = split_norm(codes[:, 0])
        index = ops.unpack_codes(packed.contiguous(), ROUND_CODE_BITS, heads * rounds * 2).int()
        index = index.unflatten(-1, (heads, rounds, 2))
        pair = index[..., 0] * ROUND_CODEWORDS + index[..., 1]
        decoded = [
            sum(
                (decode_round(self.theta[head, r], pair[..., head, r]) for r in range(1, rounds)),
                start=decode_round(self.theta[head, 0], pair[..., head, 0]),
            )
            for head in range(heads)
        ]
        return torch.stack(decoded, dim=1) * norm[:, None, :, None]

    def attention(self, values: Codec, rows: int) -> CodedAttention | None:
        # The work grows with the rows, that of decoding does not.
        if not isinstance(values, NeuralValueCodec) or rows > ops.MAX_QUERIES:
            return None
        return PublishedAttention(self._whole, values)

    @property
    def resident_bytes(self) -> int:
        held = (self.theta, self._tables, self._whole.words, self._whole.unit)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def symbols(self, codes: Tensor) -> tuple[Tensor, int]:
        count = self.spec.kv_heads * self._config.rounds * 2
        packed = split_norm(codes)[1].contiguous()
        return ops.unpack_codes(packed, ROUND_CODE_BITS, count), ROUND_CODEWORDS

    def tensors(self) -> dict[str, Tensor]:
        return {"theta": self.theta}

    def config(self) -> dict[str, Any]:
        return asdict(self._config)

    def to(self, device: Any) -> PublishedKeyCodec:
        moved = self.theta.to(device)
        # A cache asks each time it is opened: what was derived from theta is not made again.
        return self if moved is self.theta else PublishedKeyCodec(self.spec, self._config, moved)

    @classmethod
    def from_tensors(
        cls, spec: SideSpec, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> PublishedKeyCodec:
        geometry = _geometry(config)
        shape = (spec.kv_heads, geometry.rounds, ROUND_CODEWORDS, spec.head_dim)
        return cls(spec, geometry, require_tensor(tensors, "theta", shape, torch.float32))

    @classmethod
    def plan(cls, spec: SideSpec, bits: float) -> dict[str, Any]:
        if spec.side != "key" or spec.head_dim % 2:
            raise InputError(
                f"heads of {spec.head_dim} dims ({spec.side}s) are no complex pairs",
                "use --preset default",
            )
        # The norm is on top, as the paper counts; `bits_per_element` has it.
        return asdict(PublishedConfig(rounds=max(1, round(bits * spec.head_dim / _ROUND_BITS))))

    @classmethod
    def bits(cls, spec: SideSpec, config: Mapping[str, Any]) -> float:
        return 8.0 * _code_bytes(spec, _geometry(config)) / (spec.kv_heads * spec.head_dim)

    @classmethod
    def least_tokens(cls, config: Mapping[str, Any]) -> int:
        # As many as free centres that the first E-step draws from.
        return ROUND_CODEWORDS**2 // 4

    @classmethod
    def fit(cls, spec: SideSpec, config: Mapping[str, Any], data: FitData) -> dict[str, Tensor]:
        geometry = _geometry(config)
        _, unit = token_norm(data.vectors.transpose(0, 1)[None])
        annealing = Annealing(steps=geometry.steps)
        theta = []
        for head, rows in enumerate(unit[0]):
            # One for each head, so that the first rounds of a longer fit are those of a shorter.
            generator = torch.Generator().manual_seed(data.seed + head)
            theta.append(
                fit_rounds(
                    rows.contiguous(), geometry.rounds, ROUND_CODEWORDS, annealing, generator
                )
            )
        return {"theta": torch.stack(theta)}

    @classmethod
    def join(
        cls, spec: SideSpec, config: Mapping[str, Any], units: Sequence[Mapping[str, Tensor]]
    ) -> PublishedKeyCodec:
        (unit,) = units
        return cls.from_tensors(spec, config, unit)


def _geometry(config: Mapping[str, Any]) -> PublishedConfig:
    try:
        return PublishedConfig(**config)
    except TypeError as error:
        raise ValueError(f"config does not describe a published key codec ({error})") from error


def _code_bytes(spec: SideSpec, config: PublishedConfig) -> int:
    """Packed bytes of a token: the norm and 12 bits a round and head."""
    return NORM_BYTES + -(-spec.kv_heads * config.rounds * _ROUND_BITS // 8)
