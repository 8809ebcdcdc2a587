"""The only place that knows rotary position embeddings (RoPE).

A rotated layer treats `rotary_dim` of a head's dims as `rotary_dim / 2` complex pairs and
multiplies pair j of a token at position m by `scale * exp(i m w_j)`. Where the two halves of a pair
lie is the pair layout: "half" puts pair j at (j, j + rotary_dim/2), as Llama does, "interleaved" at
(2j, 2j + 1), as GLM does. Dims past `rotary_dim` are not rotated.

The codecs see *canonical* vectors: dims (2j, 2j+1) are pair j and unrotated dims come last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("half", "interleaved")


def pair_table(table: Tensor, rotary_dim: int) -> Tensor:
    """Reduce a model's cos or sin table to one column a pair.

    `table` [..., r] with r = rotary_dim/2 (a column a pair already), or r = rotary_dim, where
    models either repeat the whole table twice (Llama, GLM) or each column twice (Cohere).
    Returns [..., rotary_dim/2]. Raises ValueError for any other table.
    """
    half = rotary_dim // 2
    if table.shape[-1] == half:
        return table
    if table.shape[-1] == rotary_dim:
        if torch.equal(table[..., :half], table[..., half:]):
            return table[..., :half]
        if torch.equal(table[..., 0::2], table[..., 1::2]):
            return table[..., 0::2]
    raise ValueError(
        f"a rotary table of width {table.shape[-1]} does not describe {half} pairs of dims"
    )


def to_pairs(x: Tensor, *, rotary_dim: int, layout: str) -> Tensor:
    """Model order -> canonical order. `x` [..., head_dim], any dtype; same shape out."""
    if layout == "interleaved" or rotary_dim == 0:
        return x
    half = rotary_dim // 2
    pairs = torch.stack((x[..., :half], x[..., half:rotary_dim]), dim=-1).flatten(-2)
    return pairs if rotary_dim == x.shape[-1] else torch.cat((pairs, x[..., rotary_dim:]), dim=-1)


def query_pairs(query: Tensor, *, rotary_dim: int, layout: str, scale: float) -> Tensor:
    """Rotated queries [..., head_dim] in model order, as keys without YaRN's `scale` take them."""
    pairs = to_pairs(query, rotary_dim=rotary_dim, layout=layout)
    if scale == 1.0:
        return pairs
    turned, rest = pairs.tensor_split((rotary_dim,), dim=-1)
    return torch.cat((turned * scale, rest), dim=-1)


def from_pairs(x: Tensor, *, rotary_dim: int, layout: str) -> Tensor:
    """Canonical order -> model order, the inverse of `to_pairs`."""
    if layout == "interleaved" or rotary_dim == 0:
        return x
    return torch.cat((x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2], x[..., rotary_dim:]), dim=-1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate canonical vectors: (re, im) -> (re cos - im sin, re sin + im cos).

    `x` [..., tokens, head_dim], `cos`/`sin` [..., tokens, rotary_dim/2] broadcastable over the
    leading dims. Multiplies by cos + i sin as given, so a scale in the table is applied.
    """
    rotary_dim = 2 * cos.shape[-1]
    # One pass over memory, where real and imaginary parts apart would stride through it.
    pairs = torch.view_as_complex(x[..., :rotary_dim].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    if rotary_dim == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def unrotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo `rotate_pairs`: multiply by the conjugate, divide by cos^2 + sin^2 (YaRN's factor)."""
    energy = cos * cos + sin * sin
    return rotate_pairs(x, cos / energy, -sin / energy)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int, layout: str) -> Tensor:
    """Rotate vectors in the model's own order, in float32.

    `x` [..., tokens, head_dim]; `cos`/`sin` [..., tokens, r] as the model passes them (see
    `pair_table`). Returns float32 of x's shape.
    """
    if rotary_dim == 0:
        return x.float()
    pairs = to_pairs(x.float(), rotary_dim=rotary_dim, layout=layout)
    turned = rotate_pairs(
        pairs, pair_table(cos, rotary_dim).float(), pair_table(sin, rotary_dim).float()
    )
    return from_pairs(turned, rotary_dim=rotary_dim, layout=layout)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int, layout: str) -> Tensor:
    """Undo `rotate`, also its scale: the key before RoPE. Same shapes, float32 out."""
    if rotary_dim == 0:
        return x.float()
    pairs = to_pairs(x.float(), rotary_dim=rotary_dim, layout=layout)
    back = unrotate_pairs(
        pairs, pair_table(cos, rotary_dim).float(), pair_table(sin, rotary_dim).float()
    )
    return from_pairs(back, rotary_dim=rotary_dim, layout=layout)


@dataclass(frozen=True)
class Rotary:
    """How one layer rotates: enough to rotate any position without asking the model again.

    `inv_freq` [rotary_dim/2] float32 (radians a token), `scale` is YaRN's and longrope's factor.
    `rotary_dim` 0 is a layer without RoPE.
    """

    rotary_dim: int
    layout: str
    inv_freq: Tensor
    scale: float = 1.0

    def query_pairs(self, query: Tensor) -> Tensor:
        """Queries [..., head_dim] that this has rotated, as keys without its scale take them."""
        return query_pairs(query, rotary_dim=self.rotary_dim, layout=self.layout, scale=self.scale)

    def same(self, other: Rotary) -> bool:
        """Whether both rotate every vector alike."""
        mine = (self.rotary_dim, self.layout, self.scale)
        theirs = (other.rotary_dim, other.layout, other.scale)
        return mine == theirs and torch.equal(self.inv_freq, other.inv_freq)

    def cos_sin(
        self, positions: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Tables of `positions` [...] int -> two [..., rotary_dim/2] float32.

        Computed as transformers does, in float32 and then rounded to the model's `dtype`, so that
        they equal the model's own tables bit for bit.
        """
        inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None].float() * inv_freq
        cos = (angles.cos() * self.scale).to(dtype).float()
        sin = (angles.sin() * self.scale).to(dtype).float()
        return cos, sin


def unrotated() -> Rotary:
    """The rotation of a layer without RoPE: vectors stay as they are, in the model's order."""
    return Rotary(rotary_dim=0, layout=LAYOUTS[0], inv_freq=torch.empty(0))
