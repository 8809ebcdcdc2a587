"""Attention over additive codes by the operator, where its conditions hold: decoding, mostly."""

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

_MOST_QUERIES = 16  # tokens; for more of them, matrix products over decoded blocks are faster


def add_additive_codes(layer: CommVQLayer, tile: Tile, boundary: Tensor) -> bool:
    """Attend to the tokens before `boundary` [q] through their codes; False if it can't be done.

    It can for additive codecs with a byte a code, few queries that all see the same codes, and
    rows that see all their tokens, from their first real one on, at rising positions.
    """
    keys, values = layer.key_codec, layer.value_codec
    if not (isinstance(keys, AdditiveCodec) and isinstance(values, AdditiveCodec)):
        return False
    stop = int(boundary[0])
    rows = tile.groups * tile.length
    if tile.length > _MOST_QUERIES or rows > ops.MAX_QUERIES or int(boundary[-1]) != stop:
        return False
    key_books, value_books = keys.books, values.books
    assert layer.first_valid is not None
    if not (isinstance(key_books, KeyBooks) and isinstance(value_books, ValueBooks)):
        return False
    if not (keys.bytes_are_codes and values.bytes_are_codes):
        return False
    if not _sees_all(tile, layer.first_valid, stop):
        return False
    if stop == 0:
        return True
    rotary = layer.rotary
    turning = layer.positions.turns(rotary, stop, layer.first_valid)
    if turning is None:
        return False
    query = to_pairs(tile.query, rotary_dim=rotary.rotary_dim, layout=rotary.layout)
    # The factors of decoding are equal within a pair, so they pass through the rotation.
    query = query * key_books.inverse[:, None]
    if rotary.scale != 1.0:
        query[..., : rotary.rotary_dim] *= rotary.scale
    weighted, peak, total = ops.additive_attend(
        query.contiguous(),
        layer.key_codes.slice(0, stop),
        key_books.words,
        key_books.gains,
        key_books.means,
        key_books.group,
        layer.value_codes.slice(0, stop),
        value_books.words,
        value_books.scales,
        *turning,
        layer.first_valid + layer.sinks,
        stop,
        tile.softcap or 0.0,
    )
    tile.merge(weighted @ value_books.inverse, peak, total)
    return True


def _sees_all(tile: Tile, first_valid: Tensor, stop: int) -> bool:
    """Whether the mask lets every query see every token from `first_valid` to `stop`."""
    if tile.mask is None:
        return not bool(first_valid.any())
    if tile.mask.dtype != torch.bool or tile.mask.shape[1] != 1:
        return False
    seen = tile.mask[:, 0, :, :stop].sum(dim=-1)
    return bool((seen == (stop - first_valid).clamp_min(0)[:, None]).all())
