"""What the operators' wrappers check of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core.ops.schema import ATTEND_BLOCK


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
