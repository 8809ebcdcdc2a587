"""What attention that works in half precision is held against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.ops.test_additive_attend import by_definition, in_bfloat16


def errors(output: Any, sums: Any, want: Any, want_sums: Any) -> tuple[float, float]:
    """(largest error of the output, relative to its largest number; of the log-sum-exp)."""
    seen = np.isfinite(want_sums)
    if not seen.any():
        return 0.0, 0.0
    output, sums = np.asarray(output)[seen], np.asarray(sums)[seen]
    worst = np.abs(output - want[seen]).max() / np.abs(want[seen]).max()
    return float(worst), float(np.abs(sums - want_sums[seen]).max())


def assert_better_than_bf16(
    result: tuple[Tensor, Tensor, Tensor],
    arguments: tuple[Any, ...],
    stop: int,
    softcap: float = 0.0,
) -> None:
    """`result` of additive_attend is nearer to float64 than attention over bf16 keys is.

    That is the precision a model in bf16 has without compression. The floor of two units of float16
    covers cases where bf16 happens to hit.
    """
    weighted, peak, total = (x.detach().cpu() for x in result)
    want, want_sums = by_definition(arguments, stop, softcap)
    output = weighted / total.clamp_min(1e-30)[..., None]
    got = errors(output, peak + total.log(), want, want_sums)
    plain = errors(*in_bfloat16(arguments, stop, softcap), want=want, want_sums=want_sums)
    unit = float(torch.finfo(torch.float16).eps)
    assert got[0] <= max(plain[0], 2 * unit), (got, plain)
    assert got[1] <= max(plain[1], 2 * unit), (got, plain)
    blind = ~np.isfinite(want_sums)
    assert not weighted.numpy()[blind].any()
    assert not total.numpy()[blind].any()
    assert (peak.numpy()[blind] == -np.inf).all()
