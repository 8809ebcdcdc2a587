"""The two sides of a layer's cache, and what a codec must know of each."""

from __future__ import annotations

from commvq_core.codecs.base import SideSpec
from commvq_core.models import LayerSpec

SIDES = ("key", "value")


def side_spec(layer: LayerSpec, side: str) -> SideSpec:
    """What a codec must know of one side of a layer. Values are not rotated."""
    rotary_dim = layer.rotary_dim if side == "key" else 0
    return SideSpec(side, layer.kv_heads, layer.head_dim, rotary_dim)
