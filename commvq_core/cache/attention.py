"""Attention over a compressed layer, a block of tokens at a time.

The context falls into three parts: old tokens as codes, sinks and the newest tokens exact. Each
part is scored by itself and the parts are merged by their running maximum and sum (log-sum-exp), so
no dequantized key or value outlives its block. For the query of token t, `boundary[t]` is the first
token that it sees exactly: codes and sinks count before it, the window from it on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core.cache.fast import add_undecoded
from commvq_core.cache.layer import ENCODE_BATCH, CommVQLayer
from commvq_core.cache.step import attend_step
from commvq_core.cache.tile import Tile
from commvq_core.rope import rotate_pairs, to_pairs

_DECODED = 2048  # tokens decoded at once, which repays making float codebooks for it
_BLOCK = 512  # of them, scored at once
_TILE = 128  # queries scored at once; with _BLOCK, keeps a head's scores in a core's own cache


def make_tiles(
    query: Tensor,
    kv_heads: int,
    mask: Tensor | None,
    first: int,
    *,
    scaling: float,
    softcap: float | None,
) -> list[Tile]:
    """Cut `query` [batch, heads, q, head_dim], whose first token is `first`, into tiles."""
    count = query.shape[2]
    if count <= _TILE:
        return [Tile(query, kv_heads, first, mask, scaling, softcap)]
    tiles = []
    for start in range(0, count, _TILE):
        part = slice(start, start + _TILE)
        own = None if mask is None else mask[:, :, part]
        tiles.append(Tile(query[:, :, part], kv_heads, first + start, own, scaling, softcap))
    return tiles


def attend(
    layer: CommVQLayer,
    query: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention output [batch, q, heads, head_dim] of a layer that has just been updated.

    `query` [batch, heads, q, head_dim] rotated; `mask` as transformers makes it for SDPA
    (bool [batch, 1, q, tokens], True where a query may look), additive floats, or None for plain
    causal attention. Encodes what has left the window, before or after as `layer.strict` says.
    """
    assert layer.keys is not None
    total = layer.get_seq_length()
    length = query.shape[2]
    _note_padding(layer, mask)
    if layer.strict:
        layer.encode_until(total - layer.window)
    output = None
    if sink_logits is None:
        output = attend_step(layer, query, mask, scaling, softcap or 0.0)
    if output is None:
        output = _attend_in_parts(layer, query, mask, scaling, softcap, sink_logits)
    settle(layer, mask, length)
    return output


def _attend_in_parts(
    layer: CommVQLayer,
    query: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    assert layer.keys is not None
    first = layer.get_seq_length() - query.shape[2]
    tiles = make_tiles(query, layer.keys.shape[1], mask, first, scaling=scaling, softcap=softcap)
    boundaries = [layer.first_exact(tile.first, tile.length) for tile in tiles]
    for tile, boundary in zip(tiles, boundaries, strict=True):
        _add_exact(layer, tile, boundary)
    if not add_undecoded(layer, tiles, boundaries):
        _add_codes(layer, tiles, boundaries)
    if sink_logits is not None:
        for tile in tiles:
            tile.add_logits(sink_logits)
    output = torch.cat([tile.output() for tile in tiles], dim=1)
    return output.to(query.dtype).contiguous()


def settle(layer: CommVQLayer, mask: Tensor | None, length: int) -> None:
    """End a forward pass: what has left the window gets codes and loses its exact copy.

    Tokens that come one by one wait for a batch of them, which costs little more to encode than
    one (but for `strict`). Steps are counted, not tokens, so that padding changes nothing.
    """
    _note_padding(layer, mask)
    layer.steps += 1
    if layer.strict or length > 1 or layer.steps >= ENCODE_BATCH:
        layer.encode_until(layer.get_seq_length() - layer.window)
        layer.steps = 0
    layer.drop_encoded()


def needs_codes(layer: CommVQLayer) -> bool:
    """Whether new queries see any token through its code."""
    if layer.code_length:
        return True
    return layer.strict and layer.get_seq_length() > layer.window


def _note_padding(layer: CommVQLayer, mask: Tensor | None) -> None:
    """Learn from the masks where each row begins: what comes before is padding.

    A row may begin in a later piece of a prompt; until then it begins behind all that has come.
    """
    if layer.all_begun:
        return
    total, known = layer.get_seq_length(), layer.first_valid
    if mask is None and known is None:
        layer.begin_rows(None, total)
        return
    assert layer.keys is not None
    batch, device = layer.keys.shape[0], layer.keys.device
    if mask is None:
        began = torch.zeros(batch, dtype=torch.long, device=device)
    else:
        last = mask[:, 0, -1, :total]
        allowed = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        first = torch.where(allowed.any(dim=-1), allowed.int().argmax(dim=-1), total)
        began = first.expand(batch).clone()
    if known is not None:
        # A row that had begun stays where it was, whatever later masks leave out.
        began = torch.where(known < layer.known_length, known, began)
    layer.begin_rows(began, total)


def _add_exact(layer: CommVQLayer, tile: Tile, boundary: tuple[int, ...]) -> None:
    assert layer.keys is not None
    assert layer.values is not None
    start, own, stop = max(layer.exact_start, boundary[0]), tile.first, tile.end
    # All queries see what is older than the first of them, but for those boundaries within it.
    older = tile.length > 1 and start < own and boundary[-1] <= start
    for begin, end in ((start, own), (own, stop)) if older else ((start, stop),):
        part = slice(begin - layer.exact_start, end - layer.exact_start)
        seen = None
        # A single token sees every column from its own boundary on.
        if tile.length > 1 and end > own:
            device = layer.keys.device
            columns = torch.arange(begin, end, device=device)
            seen = (columns >= torch.tensor(boundary, device=device)[:, None])[None, None]
        keys, values = layer.keys[:, :, part].float(), layer.values[:, :, part].float()
        tile.add(tile.query, keys, values, range(begin, end), seen)
    if layer.sink_keys is None or layer.sink_values is None:
        return
    if layer.last_first + layer.sinks <= boundary[0]:
        seen = None
        slots = layer.sink_slots() if layer.last_first else range(layer.sinks)
    else:
        slots = layer.sink_slots()
        limit = torch.tensor(boundary, device=slots.device)[:, None]
        seen = slots[:, None, None, :] < limit
    tile.add(tile.query, layer.sink_keys.float(), layer.sink_values.float(), slots, seen)


def _add_codes(layer: CommVQLayer, tiles: list[Tile], boundaries: list[tuple[int, ...]]) -> None:
    rotary = layer.rotary
    ends = [boundary[-1] for boundary in boundaries]
    begins = [boundary[0] for boundary in boundaries]
    queries = [
        to_pairs(tile.query, rotary_dim=rotary.rotary_dim, layout=rotary.layout) for tile in tiles
    ]
    sinks = layer.sink_slots() if layer.sinks else None
    last_sink = layer.last_first + layer.sinks - 1
    for start in range(0, ends[-1], _DECODED):
        stop = min(start + _DECODED, ends[-1])
        keys, values = layer.decode_keys(start, stop), layer.decode_values(start, stop)
        if rotary.rotary_dim:
            cos, sin = layer.positions.tables(rotary, start, stop, layer.model_dtype)
            keys = rotate_pairs(keys, cos, sin)
        for first in range(start, stop, _BLOCK):
            for index, tile in enumerate(tiles):
                count = min(first + _BLOCK, stop, ends[index]) - first
                if count <= 0:
                    continue
                slots, seen = range(first, first + count), None
                if begins[index] < slots.stop or first <= last_sink:
                    seen = _seen_codes(slots, boundaries[index], sinks, keys.device)
                own = slice(first - start, first - start + count)
                tile.add(queries[index], keys[:, :, own], values[:, :, own], slots, seen)


def _seen_codes(
    slots: range, boundary: tuple[int, ...], sinks: Tensor | None, device: torch.device
) -> Tensor:
    """Which of `slots` each query sees as a code, bool [1 or batch, 1, q, n]: no sink is one."""
    columns = torch.arange(slots.start, slots.stop, device=device)
    limit = torch.tensor(boundary, device=device)
    seen = (columns < limit[:, None])[None, None]
    if sinks is None:
        return seen
    not_sink = (columns[None, :, None] != sinks[:, None, :]).all(dim=-1)
    return seen & not_sink[:, None, None]
