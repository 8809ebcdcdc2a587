"""The CUDA kernels' blocks, compiled for the host and called through ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++20", "-O1", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-fPIC")


def compiled(source: str, folder: Path) -> ctypes.CDLL:
    """tests/cuda/`source` as a shared library. Needs a C++20 compiler, as the tests do."""
    target = folder / f"{source}.so"
    here = ROOT / "tests" / "cuda"
    command = ["c++", *FLAGS, "-shared", f"-I{ROOT / 'csrc'}", f"-I{here}", str(here / source)]
    result = subprocess.run(
        [*command, "-o", str(target)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(target))


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Where a CPU tensor begins."""
    return ctypes.c_void_p(tensor.data_ptr())


def pointers(*tensors: Tensor) -> ctypes.Array[ctypes.c_void_p]:
    """Where contiguous CPU tensors begin."""
    assert all(tensor.is_contiguous() for tensor in tensors)
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def attend(
    library: ctypes.CDLL,
    arguments: tuple[Any, ...],
    stop: int,
    softcap: float = 0.0,
    *,
    splits: int = 2,
    few_warps: bool = True,
    tiles: int | None = None,
    shared_memory: int = 232_448,
    units_together: int = 1 << 30,
    tiles_together: int = 1 << 30,
    backwards: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """ops.additive_attend as its CUDA kernels work it out, on a GPU with `shared_memory` bytes."""
    sizes = (splits, shared_memory, units_together, tiles_together, 0, arguments[5], int(backwards))
    tiles = tiles or (1 if arguments[0].shape[2] <= 8 else 2)
    return _run(library.commvq_attend, arguments, stop, softcap, sizes, int(few_warps), tiles)


def attend_rows(
    library: ctypes.CDLL,
    arguments: tuple[Any, ...],
    stop: int,
    softcap: float = 0.0,
    *,
    splits: int = 2,
    shared_memory: int = 232_448,
    units_together: int = 1 << 30,
    room: int = 1 << 30,
    backwards: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the kernels for many rows of queries, `room` tokens decoded at a time."""
    sizes = (splits, shared_memory, units_together, 0, room, arguments[5], int(backwards))
    return _run(library.commvq_attend_rows, arguments, stop, softcap, sizes)


def _run(
    function: Any,
    arguments: tuple[Any, ...],
    stop: int,
    softcap: float,
    plan: tuple[int, ...],
    *options: int,
) -> tuple[Tensor, Tensor, Tensor]:
    query, codes, books, _, _, _, _, value_books, _, turns, _, first = arguments
    batch, heads, queries, dim = query.shape
    sizes = (
        *(batch, heads, queries, dim, turns.shape[3], codes.shape[2], stop, *turns.shape[:2]),
        *(*books.shape[1:3], *value_books.shape[1:3]),
        *plan,
    )
    weighted = torch.full_like(query, torch.nan).contiguous()
    peak = torch.full((batch, heads, queries), torch.nan)
    total = torch.full_like(peak, torch.nan)
    assert first.dtype == torch.int64
    tensors = [x.contiguous() for x in arguments if isinstance(x, Tensor)]
    failed = function(
        (ctypes.c_int64 * len(sizes))(*sizes),
        pointers(*tensors, weighted, peak, total),
        ctypes.c_float(softcap),
        *options,
    )
    assert failed == 0
    return weighted, peak, total
