"""Attention over codes by the codecs' operator, where its conditions hold."""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core.cache.layer import CommVQLayer
from commvq_core.cache.tile import Tile
from commvq_core.codecs.attention import Coded

_ROWS = 2048  # of a KV head in one call: bounds the copies of queries and results


def add_undecoded(layer: CommVQLayer, tiles: list[Tile], boundaries: list[tuple[int, ...]]) -> bool:
    """Attend to the tokens before `boundaries` without decoding them; False if it can't be done.

    It can for codecs that have an operator, queries that all see the same codes, no more of them in
    a tile than the operator takes, and rows that see all their tokens, from their first real one
    on, at rising positions.
    """
    rows = sum(tile.query.shape[2] for tile in tiles)
    attention = layer.attention(rows)
    if attention is None:
        return False
    stop = boundaries[0][0]
    most = attention.most_rows(tiles[0].query.device)
    if any(tile.query.shape[2] > most for tile in tiles):
        return False
    if any(boundary[end] != stop for boundary in boundaries for end in (0, -1)):
        return False
    first_valid = layer.first_valid
    assert first_valid is not None
    if not all(_sees_all(layer, tile, stop) for tile in tiles):
        return False
    if stop == 0:
        return True
    turning = layer.positions.turns(layer.rotary, stop, first_valid, settled=layer.all_begun)
    if turning is None:
        return False
    codes = (layer.key_codes.slice(0, stop), layer.value_codes.slice(0, stop))
    coded = Coded(*codes, *turning, first_valid + layer.sinks, stop)
    for some in _grouped(tiles, min(most, _ROWS)):
        queries = [layer.rotary.query_pairs(tile.query) for tile in some]
        query = queries[0] if len(queries) == 1 else torch.cat(queries, dim=2)
        parts = attention(query, coded, some[0].softcap or 0.0)
        own = [tile.query.shape[2] for tile in some]
        for tile, *part in zip(some, *(part.split(own, dim=2) for part in parts), strict=True):
            tile.merge(*part)
    return True


def _grouped(tiles: list[Tile], most: int) -> list[list[Tile]]:
    """Neighbouring tiles together, as many as have at most `most` rows (or one alone)."""
    groups: list[list[Tile]] = []
    rows = most
    for tile in tiles:
        own = tile.query.shape[2]
        if rows + own > most:
            groups.append([])
            rows = 0
        groups[-1].append(tile)
        rows += own
    return groups


def _sees_all(layer: CommVQLayer, tile: Tile, stop: int) -> bool:
    """Whether the mask lets every query see every token from `first_valid` to `stop`.

    Only asking a mask waits for the device, once a forward pass for all layers.
    """
    mask = tile.mask
    if mask is None:
        return layer.last_first == 0
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return False
    return layer.positions.once(mask, stop, lambda: bool(shows_codes(layer, mask[:, 0], stop)))


def shows_codes(layer: CommVQLayer, shown: Tensor, stop: int) -> Tensor:
    """Whether `shown`, bool [batch, q, tokens], shows each row from its begin to `stop`."""
    assert layer.first_valid is not None
    real = (stop - layer.first_valid).clamp_min(0)
    return (shown[..., :stop].sum(dim=-1) == real[:, None]).all()
