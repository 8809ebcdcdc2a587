"""Attention over additive codes by the operator, where its conditions hold."""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.cache.layer import CommVQLayer
from commvq_core.cache.tile import Tile
from commvq_core.codecs.additive import AdditiveCodec
from commvq_core.codecs.key_books import KeyBooks
from commvq_core.codecs.value_books import ValueBooks
from commvq_core.rope import to_pairs

_ROWS = 2048  # of a KV head in one call: bounds the copies of queries and results


def add_additive_codes(layer: CommVQLayer, tiles: list[Tile], boundaries: list[Tensor]) -> bool:
    """Attend to the tokens before `boundaries` through their codes; False if it can't be done.

    It can for additive codecs with a byte a code, queries that all see the same codes, no more of
    them in a tile than the operator takes, and rows that see all their tokens, from their first
    real one on, at rising positions.
    """
    keys, values = layer.key_codec, layer.value_codec
    if not (isinstance(keys, AdditiveCodec) and isinstance(values, AdditiveCodec)):
        return False
    key_books, value_books = keys.books, values.books
    if not (isinstance(key_books, KeyBooks) and isinstance(value_books, ValueBooks)):
        return False
    if not (keys.bytes_are_codes and values.bytes_are_codes):
        return False
    stop = int(boundaries[0][0])
    most = ops.most_rows(tiles[0].query.device)
    if any(tile.query.shape[2] > most for tile in tiles):
        return False
    if any(int(boundary[end]) != stop for boundary in boundaries for end in (0, -1)):
        return False
    first_valid = layer.first_valid
    assert first_valid is not None
    if not all(_sees_all(tile, first_valid, stop) for tile in tiles):
        return False
    if stop == 0:
        return True
    turning = layer.positions.turns(layer.rotary, stop, first_valid)
    if turning is None:
        return False
    for some in _grouped(tiles, min(most, _ROWS)):
        query = torch.cat([_query(layer, tile, key_books) for tile in some], dim=2)
        weighted, peak, total = ops.additive_attend(
            query,
            layer.key_codes.slice(0, stop),
            key_books.words,
            key_books.gains,
            key_books.means,
            key_books.group,
            layer.value_codes.slice(0, stop),
            value_books.words,
            value_books.scales,
            *turning,
            first_valid + layer.sinks,
            stop,
            some[0].softcap or 0.0,
        )
        weighted = weighted @ value_books.inverse
        rows = [tile.query.shape[2] for tile in some]
        parts = (tensor.split(rows, dim=2) for tensor in (weighted, peak, total))
        for tile, *part in zip(some, *parts, strict=True):
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


def _query(layer: CommVQLayer, tile: Tile, books: KeyBooks) -> Tensor:
    """A tile's queries as the operator takes them."""
    rotary = layer.rotary
    query = to_pairs(tile.query, rotary_dim=rotary.rotary_dim, layout=rotary.layout)
    # The factors of decoding are equal within a pair, so they pass through the rotation.
    query = query * books.inverse[:, None]
    if rotary.scale != 1.0:
        query[..., : rotary.rotary_dim] *= rotary.scale
    return query


def _sees_all(tile: Tile, first_valid: Tensor, stop: int) -> bool:
    """Whether the mask lets every query see every token from `first_valid` to `stop`."""
    if tile.mask is None:
        return not bool(first_valid.any())
    if tile.mask.dtype != torch.bool or tile.mask.shape[1] != 1:
        return False
    seen = tile.mask[:, 0, :, :stop].sum(dim=-1)
    return bool((seen == (stop - first_valid).clamp_min(0)[:, None]).all())
