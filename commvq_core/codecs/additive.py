"""Additive vector quantization: a vector is a sum of codewords, one from each stage's codebook.

A canonical head vector is first made comparable under the metric and split into sub-vectors of
`sub_dim` dims; sub-vector s is then sum_m codebooks[s, m, code_m] (paper section 3.1 for additive
quantization). Decoding is linear in the codewords, so it commutes with RoPE wherever the way back
from the metric does: for keys it scales whole pairs (key_books.py), for values it is any matrix
(value_books.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.codecs.attention import Coded, CodedAttention, Exact
from commvq_core.codecs.base import Codec, FitData, FittedCodec, SideSpec
from commvq_core.codecs.key_books import KeyBooks
from commvq_core.codecs.value_books import ValueBooks
from commvq_core.errors import InputError
from commvq_core.fit.additive import fit_additive
from commvq_core.fit.metric import key_transform, value_transform
from commvq_core.rope import Rotary

# Widths of sub-vectors, in the order tried: wider ones lose less but need more memory for their
# codebooks and more additions a decoded key (docs/method.md has both measured).
_SUB_DIMS = (64, 48, 40, 32, 16, 8)
_SAMPLE = 1024  # vectors that tell how large the error is


@dataclass(frozen=True)
class AdditiveConfig:
    """Geometry and knobs. Bits an element = `stages` * `code_bits` / `sub_dim`.

    `fit_beam` and `rounds` steer the fit; `beam` is the encoder's width at run time.
    """

    sub_dim: int
    stages: int
    code_bits: int = 8
    beam: int = 8
    fit_beam: int = 8
    rounds: int = 1
    kmeans_iterations: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int:
                raise ValueError(f"{name} is {value!r}, not a whole number")
        # An odd width would tear a pair apart.
        if self.sub_dim < 2 or self.sub_dim % 2:
            raise ValueError(f"sub_dim is {self.sub_dim}, not an even number of dims")
        if self.stages < 1 or not 1 <= self.code_bits <= 8:
            raise ValueError(f"impossible geometry {self}")
        if min(self.beam, self.fit_beam) < 1 or min(self.rounds, self.kmeans_iterations) < 0:
            raise ValueError(f"impossible knobs {self}")

    @property
    def codewords(self) -> int:
        """Codewords in one stage's codebook."""
        return 2**self.code_bits


@dataclass(frozen=True)
class AdditiveAttention:
    """A CodedAttention."""

    keys: KeyBooks
    values: ValueBooks

    def most_rows(self, device: torch.device) -> int:
        """As many as the operator takes there."""
        return ops.most_rows(device)

    def __call__(
        self, query: Tensor, coded: Coded, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See CodedAttention."""
        # Not by `ops`: its checks, which codecs pass, take 0.1 ms where caches are cold.
        weighted, peak, total = torch.ops.commvq.additive_attend(
            # The factors of decoding are equal within a pair, so they pass through the rotation.
            query * self.keys.inverse[:, None],
            coded.key_codes,
            self.keys.words,
            self.keys.gains,
            self.keys.means,
            self.keys.group,
            coded.value_codes,
            self.values.words,
            self.values.scales,
            coded.turns,
            coded.steps,
            coded.first,
            coded.stop,
            softcap,
        )
        return weighted @ self.values.inverse, peak, total

    def step(
        self,
        query: Tensor,
        scaling: float,
        rotary: Rotary,
        coded: Coded,
        exact: Exact,
        softcap: float,
    ) -> Tensor:
        """See CodedAttention."""
        return torch.ops.commvq.additive_step(
            query,
            scaling,
            rotary.layout == "interleaved",
            rotary.scale,
            self.keys.inverse,
            coded.key_codes,
            self.keys.words,
            self.keys.gains,
            self.keys.means,
            self.keys.group,
            coded.value_codes,
            self.values.words,
            self.values.scales,
            self.values.inverse,
            coded.turns,
            coded.steps,
            coded.first,
            coded.stop,
            softcap,
            *exact,
        )


class AdditiveCodec(FittedCodec):
    """The default codec of keys and values. See the module's docstring.

    `books` are KeyBooks or ValueBooks, as `spec` says.
    """

    name = "additive"

    def __init__(
        self, spec: SideSpec, config: AdditiveConfig, books: KeyBooks | ValueBooks
    ) -> None:
        self.spec = spec
        self._config = config
        self.subs = spec.head_dim // config.sub_dim
        self.books = books
        self.code_bytes = _code_bytes(spec, config)

    def attention(self, values: Codec, rows: int) -> CodedAttention | None:
        if not isinstance(values, AdditiveCodec):
            return None
        keys, books = self.books, values.books
        if not (isinstance(keys, KeyBooks) and isinstance(books, ValueBooks)):
            return None
        # The operator unpacks nothing.
        bytes_are_codes = self._config.code_bits == values._config.code_bits == 8
        return AdditiveAttention(keys, books) if bytes_are_codes else None

    @property
    def resident_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.books.held)

    def encode(self, vectors: Tensor) -> Tensor:
        batch, heads, tokens, dim = vectors.shape
        rows = vectors.float().transpose(0, 1).reshape(heads, batch * tokens, dim)
        codes = ops.additive_encode(
            self.books.transformed(rows).contiguous(), self.books.codebooks, self._config.beam
        )
        packed = ops.pack_codes(codes, self._config.code_bits)
        return packed.view(heads, batch, tokens, self.code_bytes).transpose(0, 1).contiguous()

    def transformed(self, rows: Tensor) -> Tensor:
        """[kv_heads, n, head_dim] -> the same in the space of the codewords."""
        return self.books.transformed(rows.float())

    def decode(self, codes: Tensor) -> Tensor:
        batch, heads, tokens, _ = codes.shape
        count = self.subs * self._config.stages
        index = ops.unpack_codes(codes, self._config.code_bits, count).int()
        table = self.books.codebooks.view(heads, count, -1, self._config.sub_dim)
        offsets = torch.arange(heads * count, dtype=torch.int32, device=codes.device)
        index = index + (offsets * self._config.codewords).view(1, heads, 1, count)
        rows = index.view(batch, heads, tokens, self.subs, self._config.stages)
        summed = torch.nn.functional.embedding_bag(
            rows.flatten(0, -2).contiguous(),
            table.reshape(-1, self._config.sub_dim),
            mode="sum",
        )
        return self.books.restored(summed.view(batch, heads, tokens, self.spec.head_dim))

    def symbols(self, codes: Tensor) -> tuple[Tensor, int]:
        count = self.subs * self._config.stages
        return ops.unpack_codes(codes, self._config.code_bits, count), self._config.codewords

    def tensors(self) -> dict[str, Tensor]:
        return self.books.tensors()

    def config(self) -> dict[str, Any]:
        return asdict(self._config)

    def to(self, device: Any) -> AdditiveCodec:
        if self.books.words.device == torch.device(device):
            return self
        return AdditiveCodec(self.spec, self._config, self.books.to(device))

    @classmethod
    def from_tensors(
        cls, spec: SideSpec, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> AdditiveCodec:
        try:
            geometry = AdditiveConfig(**config)
        except TypeError as error:
            raise ValueError(f"config does not describe an additive codec ({error})") from error
        subs = spec.head_dim // geometry.sub_dim
        if subs * geometry.sub_dim != spec.head_dim:
            raise ValueError(f"sub_dim {geometry.sub_dim} does not divide head_dim {spec.head_dim}")
        shape = (spec.kv_heads, subs, geometry.stages, geometry.codewords, geometry.sub_dim)
        kind = KeyBooks if spec.side == "key" else ValueBooks
        return cls(spec, geometry, kind.from_tensors(spec, shape, tensors))

    @classmethod
    def plan(cls, spec: SideSpec, bits: float) -> dict[str, Any]:
        widths = [width for width in _SUB_DIMS if spec.head_dim % width == 0]
        for sub_dim in widths:
            stages = bits * sub_dim / 8
            if stages >= 1 and stages == int(stages):
                return asdict(AdditiveConfig(sub_dim=sub_dim, stages=int(stages)))
        if not widths:
            raise InputError(
                f"heads of {spec.head_dim} dims can't be split into sub-vectors",
                f"the additive codec needs a multiple of {min(_SUB_DIMS)} dims",
            )
        possible = {8 * stages / width for width in widths for stages in range(1, width // 2 + 1)}
        near = sorted(sorted(possible, key=lambda other: abs(other - bits))[:2])
        raise InputError(
            f"{bits:g} bits can't be reached with heads of {spec.head_dim} dims",
            f"give {' or '.join(f'{other:g}' for other in near)}",
        )

    @classmethod
    def bits(cls, spec: SideSpec, config: Mapping[str, Any]) -> float:
        return 8.0 * _code_bytes(spec, AdditiveConfig(**config)) / spec.head_dim

    @classmethod
    def least_tokens(cls, config: Mapping[str, Any]) -> int:
        # Four vectors a codeword is where k-means stops learning its own sample by heart.
        return 4 * AdditiveConfig(**config).codewords

    @classmethod
    def fit(cls, spec: SideSpec, config: Mapping[str, Any], data: FitData) -> dict[str, Tensor]:
        geometry = AdditiveConfig(**config)
        vectors = data.vectors[:, 0]
        if spec.side == "key":
            forward = key_transform(data.metric[0])
            rows = vectors * forward
        else:
            forward, inverse = value_transform(data.metric[0])
            rows = vectors @ forward
        codebooks = fit_additive(
            rows,
            sub_dim=geometry.sub_dim,
            stages=geometry.stages,
            codewords=geometry.codewords,
            kmeans_iterations=geometry.kmeans_iterations,
            rounds=geometry.rounds,
            beam=geometry.fit_beam,
            seed=data.seed,
        )
        if spec.side == "key":
            error = _error(codebooks, rows)
            return KeyBooks.from_codebooks(codebooks, forward, error).tensors()
        return ValueBooks.from_codebooks(codebooks, inverse).tensors()

    @classmethod
    def join(
        cls, spec: SideSpec, config: Mapping[str, Any], units: Sequence[Mapping[str, Tensor]]
    ) -> AdditiveCodec:
        # Each alone first: torch.cat would mix dtypes, and say nothing of which tensor is wrong.
        single = replace(spec, kv_heads=1)
        heads = [cls.from_tensors(single, config, unit).tensors() for unit in units]
        joined = {name: torch.cat([head[name] for head in heads]) for name in heads[0]}
        return cls.from_tensors(spec, config, joined)


def _error(codebooks: Tensor, rows: Tensor) -> float:
    """Mean squared error of some `rows` [n, head_dim], encoded greedily: roughly, and quickly."""
    some = rows[:: max(1, len(rows) // _SAMPLE)][:_SAMPLE].contiguous()
    subs, stages, size, sub_dim = codebooks.shape
    codes = ops.additive_encode(some[None], codebooks[None], 1)[0].long()
    flat = codebooks.view(subs * stages * size, sub_dim)
    index = codes + torch.arange(subs * stages) * size
    sums = flat[index].unflatten(1, (subs, stages)).sum(dim=2).flatten(1)
    return float((sums - some).square().sum(dim=1).mean())


def _code_bytes(spec: SideSpec, config: AdditiveConfig) -> int:
    """Packed bytes a token and KV head."""
    codes = spec.head_dim // config.sub_dim * config.stages
    return -(-codes * config.code_bits // 8)
