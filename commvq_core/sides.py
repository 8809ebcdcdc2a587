"""The two sides of a layer's cache, and what a codec must know of each."""

from __future__ import annotations

from typing import Literal

from commvq_core.codecs.base import SideSpec
from commvq_core.models import LayerSpec

Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")


def side_spec(layer: LayerSpec, side: Side) -> SideSpec:
    """What a codec must know of one side of a layer. Values are not rotated."""
    rotary_dim = layer.rotary_dim if side == "key" else 0
    return SideSpec(side, layer.kv_heads, layer.head_dim, rotary_dim)
