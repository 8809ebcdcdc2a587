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
    backwards: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """ops.additive_attend as its CUDA kernels work it out, on a GPU with `shared_memory` bytes."""
    query, codes, books, _, _, _, _, value_books, _, turns, _, first = arguments
    batch, heads, queries, dim = query.shape
    sizes = (
        *(batch, heads, queries, dim, turns.shape[3], codes.shape[2], stop, *turns.shape[:2]),
        *(*books.shape[1:3], *value_books.shape[1:3]),
        *(splits, shared_memory, units_together, int(backwards)),
    )
    weighted = torch.full_like(query, torch.nan).contiguous()
    peak = torch.full((batch, heads, queries), torch.nan)
    total = torch.full_like(peak, torch.nan)
    assert first.dtype == torch.int64
    tensors = [x.contiguous() for x in arguments if isinstance(x, Tensor)]
    failed = library.commvq_attend(
        (ctypes.c_int64 * len(sizes))(*sizes),
        pointers(*tensors, weighted, peak, total),
        ctypes.c_float(softcap),
        int(few_warps),
        tiles or (1 if queries <= 8 else 2),
    )
    assert failed == 0
    return weighted, peak, total
