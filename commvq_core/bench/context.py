"""Contexts of random codes, as one layer's cache holds them, for timing attention over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from commvq_core.bench.shapes import AttentionShape, random_codec
from commvq_core.cache.fast import add_undecoded
from commvq_core.cache.layer import CommVQLayer
from commvq_core.cache.positions import Positions
from commvq_core.cache.step import attend_step
from commvq_core.cache.tile import Tile
from commvq_core.codecs.additive import AdditiveCodec
from commvq_core.rope import Rotary, from_pairs, rotate_pairs

_AT_ONCE = 4096  # tokens decoded at once


@dataclass(frozen=True)
class CodedContext:
    """`tokens` tokens of one layer as codes; `attend` is what a decoding step does with them."""

    shape: AttentionShape
    layer: CommVQLayer
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        stores = (self.layer.key_codes, self.layer.value_codes)
        codes = [store.slice(0, self.tokens) for store in stores]
        return sum(part.numel() * part.element_size() for part in codes)

    @property
    def codebook_bytes(self) -> int:
        """Bytes of both sides' codebooks."""
        codecs = (self.layer.key_codec, self.layer.value_codec)
        return sum(t.numel() * t.element_size() for c in codecs for t in c.tensors().values())

    def attend(self, query: Tensor) -> Tensor:
        """Attention output [batch, heads, 1, head_dim] float32 of `query`, of that shape, rotated.

        It sees every token through its code: the window of exact tokens, whose work does not grow
        with the context, is left out.
        """
        scaling = self.shape.head_dim**-0.5
        found = attend_step(self.layer, query, None, scaling, 0.0)
        if found is not None:
            return found.transpose(1, 2)
        tile = Tile(query, self.shape.kv_heads, self.tokens, None, scaling, None)
        if not add_undecoded(self.layer, [tile], [(self.tokens,)]):
            raise RuntimeError("attention over these codes is not done by the operator")
        return tile.output().transpose(1, 2)

    def dense(self, dtypes: tuple[torch.dtype, ...]) -> list[tuple[Tensor, Tensor]]:
        """Rotated keys and values [batch, kv_heads, tokens, head_dim], once in every dtype."""
        batch, device = self.layer.key_codes.slice(0, 1).shape[0], self.layer.device
        size = (batch, self.shape.kv_heads, self.tokens, self.shape.head_dim)
        made = [
            (torch.empty(size, dtype=t, device=device), torch.empty(size, dtype=t, device=device))
            for t in dtypes
        ]
        rotary = self.layer.rotary
        for start in range(0, self.tokens, _AT_ONCE):
            part = slice(start, min(self.tokens, start + _AT_ONCE))
            keys = self.layer.decode_keys(part.start, part.stop)
            cos, sin = rotary.cos_sin(torch.arange(part.start, part.stop, device=device))
            keys = from_pairs(
                rotate_pairs(keys, cos, sin), rotary_dim=rotary.rotary_dim, layout=rotary.layout
            )
            values = self.layer.decode_values(part.start, part.stop)
            for own_keys, own_values in made:
                own_keys[:, :, part] = keys
                own_values[:, :, part] = values
        return made


def coded_contexts(
    shape: AttentionShape,
    bits: float,
    *,
    tokens: int,
    batch: int,
    count: int,
    device: torch.device,
    seed: int,
) -> list[CodedContext]:
    """`count` contexts that share their codebooks, random as their codes are.

    The geometry is what the default preset plans for these bits. Raises InputError for bits that
    it can't reach with this shape.
    """
    generator = torch.Generator().manual_seed(seed)
    codecs = [
        random_codec(shape.side(side), bits, generator).to(device) for side in ("key", "value")
    ]
    positions = Positions()
    positions.begin_forward(0, torch.arange(tokens + 1, device=device)[None])
    rotary = shape.rotary(device)
    return [
        CodedContext(shape, _layer(codecs, rotary, positions, tokens, batch, generator), tokens)
        for _ in range(count)
    ]


def _layer(
    codecs: list[AdditiveCodec],
    rotary: Rotary,
    positions: Positions,
    tokens: int,
    batch: int,
    generator: torch.Generator,
) -> CommVQLayer:
    key_codec, value_codec = codecs
    layer = CommVQLayer(key_codec, value_codec, rotary, positions, window=1, sinks=0, strict=False)
    spec, device = key_codec.spec, rotary.inv_freq.device
    empty = torch.zeros(batch, spec.kv_heads, 0, spec.head_dim, device=device)
    state = {
        "keys": empty,
        "values": empty,
        "steps": torch.zeros(1, dtype=torch.int64),
        "first_valid": torch.zeros(batch, dtype=torch.int64, device=device),
    }
    for name, codec in zip(("key_codes", "value_codes"), codecs, strict=True):
        size = (batch, codec.code_rows, tokens, codec.code_bytes)
        codes = torch.randint(256, size, dtype=torch.uint8, generator=generator)
        state[name] = codes.to(device)
    layer.restore(state, torch.float32)
    return layer
