"""What the operators' wrappers check of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core.ops.schema import ATTEND_BLOCK, MAX_CODEWORDS


def check_tensor(name: str, value: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {value.dtype}")


def check_int(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")


def check_bytes(name: str, value: Tensor) -> None:
    check_tensor(name, value, torch.uint8)
    if value.dim() < 1:
        raise ValueError(f"{name} must have at least one axis")


def check_bits(bits: int) -> None:
    check_int("bits", bits)
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {bits}")


def check_additive(
    query: Tensor,
    key_codes: Tensor,
    key_books: Tensor,
    key_gains: Tensor,
    key_means: Tensor,
    key_group: int,
    value_codes: Tensor,
    value_books: Tensor,
    value_scales: Tensor,
    stop: int,
) -> None:
    """That codes and codebooks fit `query` [batch, kv_heads, n, dim] and all before `stop`."""
    check_tensor("value_scales", value_scales, torch.float32)
    check_tensor("key_gains", key_gains, torch.uint8)
    check_tensor("key_means", key_means, torch.int16)
    check_int("stop", stop)
    batch, heads, _, dim = query.shape
    for side, codes, books in (
        ("key", key_codes, key_books),
        ("value", value_codes, value_books),
    ):
        check_tensor(f"{side}_codes", codes, torch.uint8)
        check_tensor(f"{side}_books", books, torch.int8)
        fits = (
            books.dim() == 5
            and books.shape[0] == heads
            and books.shape[1] * books.shape[4] == dim
            and books.shape[3] == MAX_CODEWORDS
            and codes.dim() == 4
            and codes.shape[:2] == (batch, heads)
            and codes.shape[2] >= stop >= 0
            and codes.shape[3] == books.shape[1] * books.shape[2]
        )
        if not fits:
            raise ValueError(
                f"{side}_codes {list(codes.shape)} and {side}_books {list(books.shape)} do not fit "
                f"query {list(query.shape)} and stop {stop}"
            )
    if (
        key_gains.shape != key_books.shape[:3]
        or list(key_means.shape) != [heads, dim]
        or key_books.shape[4] % 2
    ):
        raise ValueError(
            f"key_gains {list(key_gains.shape)} and key_means {list(key_means.shape)} do not fit "
            f"key_books {list(key_books.shape)}"
        )
    if key_group not in (1, 2, 4):
        raise ValueError(f"key_group must be 1, 2 or 4, not {key_group}")
    if value_scales.shape != value_books.shape[:3]:
        raise ValueError(
            f"value_scales {list(value_scales.shape)} do not fit value_books "
            f"{list(value_books.shape)}"
        )


def check_exact(
    query: Tensor, keys: Tensor, values: Tensor, sink_keys: Tensor, sink_values: Tensor
) -> None:
    """That exact tokens are [batch, kv_heads, tokens, dim] as `query` [batch, kv_heads, n, dim]."""
    batch, heads, _, dim = query.shape
    for names, pair in (
        ("keys and values", (keys, values)),
        ("sink_keys and sink_values", (sink_keys, sink_values)),
    ):
        for one in pair:
            if one.dtype not in (torch.float32, torch.bfloat16):
                raise TypeError(f"{names} must be float32 or bfloat16, not {one.dtype}")
        shapes = [list(one.shape) for one in pair]
        tokens = shapes[0][2] if len(shapes[0]) == 4 else -1
        if shapes != [[batch, heads, tokens, dim]] * 2:
            raise ValueError(f"{names} {shapes} do not fit query {list(query.shape)}")


def check_turns(query: Tensor, turns: Tensor, steps: Tensor, first: Tensor, stop: int) -> None:
    """That these say how all tokens before `stop` turn for `query` [batch, heads, n, dim]."""
    for name, value in (("turns", turns), ("steps", steps)):
        check_tensor(name, value, torch.float32)
    check_tensor("first", first, torch.int64)
    batch, _, _, dim = query.shape
    blocks = -(-stop // ATTEND_BLOCK)
    if (
        turns.dim() != 4
        or turns.shape[0] not in (1, batch)
        or turns.shape[1] < blocks
        or turns.shape[2] != 2
        or 2 * turns.shape[3] > dim
        or list(steps.shape) != [ATTEND_BLOCK, 2, turns.shape[3]]
        or list(first.shape) != [batch]
    ):
        raise ValueError(
            f"turns {list(turns.shape)}, steps {list(steps.shape)} and first {list(first.shape)} "
            f"do not fit query {list(query.shape)} and stop {stop}"
        )
