"""How fast vectors are encoded: the operator as callers get it against the PyTorch reference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.ops import reference


@dataclass(frozen=True)
class EncodeCase:
    """One call: `groups` heads of `subs` sub-vectors of `sub_dim` dims, `tokens` of them."""

    name: str
    groups: int
    tokens: int
    subs: int
    stages: int = 4
    codewords: int = 256
    sub_dim: int = 32
    beam: int = 8


CASES = (
    EncodeCase("fit, one sub-vector", groups=1, tokens=65536, subs=1),
    EncodeCase("one token, SmolLM2-135M layer", groups=3, tokens=1, subs=2),
    EncodeCase("one token, Llama-3.1-8B layer", groups=8, tokens=1, subs=4),
    EncodeCase("128 tokens, Llama-3.1-8B layer", groups=8, tokens=128, subs=4),
)


def bench_encode(
    cases: tuple[EncodeCase, ...] = CASES, seconds: float = 1.0, threads: int | None = None
) -> dict[str, Any]:
    """Time every case for about `seconds` with each implementation; `threads` None is torch's.

    Returns {"device", "threads", "native", "rows": [{"impl", "name", ..., "ms_median", "ms_min"}]};
    implementations are "op" (what callers get) and "pytorch".
    """
    if threads is not None:
        torch.set_num_threads(threads)
    rows = []
    for case in cases:
        x, books = _inputs(case)
        laid_out = ops.encoding_layout(books)
        implementations: dict[str, Callable[[], Tensor]] = {
            "op": partial(ops.additive_encode, x, laid_out, case.beam),
            "pytorch": partial(reference.additive_encode, x, books, case.beam),
        }
        for name, call in implementations.items():
            times = _times(call, seconds)
            milliseconds = {"ms_median": 1e3 * statistics.median(times), "ms_min": 1e3 * min(times)}
            rows.append({"impl": name, **asdict(case), **milliseconds})
    return {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "native": ops.native_info().summary,
        "rows": rows,
    }


def _inputs(case: EncodeCase) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.groups, case.tokens, case.subs * case.sub_dim, generator=generator)
    shape = (case.groups, case.subs, case.stages, case.codewords, case.sub_dim)
    books = torch.randn(shape, generator=generator)
    return x, books * 0.75 ** torch.arange(case.stages)[:, None, None]  # as fitted stages shrink


def _times(call: Callable[[], Tensor], seconds: float) -> list[float]:
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 1000):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times
