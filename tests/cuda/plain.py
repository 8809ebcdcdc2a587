"""What attention over codes is held against: float64, by how precisely it works."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from commvq_core.ops import reference
from tests.ops.test_additive_attend import by_definition, in_bfloat16
from tests.ops.test_published_attend import by_definition as published_by_definition


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


def assert_float32(
    result: tuple[Tensor, Tensor, Tensor],
    arguments: tuple[Any, ...],
    stop: int,
    softcap: float = 0.0,
) -> None:
    """`result` of published_attend is float64's and the PyTorch operator's but for what float32
    leaves of its scores."""
    want, want_sums = published_by_definition(arguments, stop, softcap)
    seen = np.isfinite(want_sums)
    close = 2e-6 * (1.0 + np.abs(want_sums[seen]).max(initial=0.0))
    sums, peak, total = (x.detach().cpu() for x in result)
    output, log_sums = _normalized(sums, peak, total)
    assert np.array_equal(seen, np.isfinite(log_sums))
    assert not sums.numpy()[~seen].any()
    assert not total.numpy()[~seen].any()
    theirs = _normalized(*reference.published_attend(*arguments, stop, softcap))
    for other, other_sums in ((want, want_sums), theirs):
        error, sum_error = errors(output, log_sums, other, other_sums)
        assert error <= 2 * close
        assert sum_error <= close


def _normalized(sums: Tensor, peak: Tensor, total: Tensor) -> tuple[Any, Any]:
    output = sums.double() / total.double().clamp_min(1e-30)[..., None]
    return output.numpy(), (peak.double() + total.double().log()).numpy()
