"""Cut a long prompt into pieces, so that its activations and exact keys never exist all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

PREFILL_CHUNK = 2048  # tokens a forward pass
# What a decoder may be asked for that it would then give for one piece only.
_WHOLE = ("output_attentions", "output_hidden_states")


def split_prompt(arguments: Mapping[str, Any], past: int, size: int) -> list[dict[str, Any]] | None:
    """A decoder's arguments, by name, as those of several calls of at most `size` tokens each.

    `past` tokens are in the cache already. None when there is nothing to split, or an argument that
    can't be cut along the tokens (a ready-made 4-D mask, positions of several axes).
    """
    ids = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if ids is None else ids
    if tokens is None or tokens.shape[1] <= size:
        return None
    if any(arguments.get(name) for name in _WHOLE) or arguments.get("return_dict") is False:
        return None
    count = tokens.shape[1]
    pieces = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        piece = dict(arguments)
        for name, value in arguments.items():
            if not isinstance(value, Tensor):
                if name == "attention_mask" and value is not None:
                    return None
                continue
            if name == "attention_mask" and value.dim() == 2 and value.shape[1] == past + count:
                piece[name] = value[:, : past + stop]
            elif name in ("input_ids", "inputs_embeds") or (
                name == "position_ids" and value.dim() == 2
            ):
                piece[name] = value[:, start:stop]
            elif name == "cache_position" and value.dim() == 1:
                piece[name] = value[start:stop]
            else:
                return None
        pieces.append(piece)
    return pieces
