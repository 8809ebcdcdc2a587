"""Attention in plain low precision: what a kernel that works in half precision is held against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.ops.test_additive_attend import by_definition, decoded


def plain_attention(
    arguments: tuple[Tensor, ...], stop: int, softcap: float, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Decoded in float32, then queries, keys, values and weights rounded to `dtype`.

    Output [batch, heads, queries, dim] and log-sum-exp, of rows that see something.
    """
    query, kc, kb, ks, vc, vb, vs, turns, steps, first = arguments
    rotary, tokens = turns.shape[2], torch.arange(stop)
    keys = torch.from_numpy(decoded(kc, kb, ks)).float()[:, :, :stop]
    values = torch.from_numpy(decoded(vc, vb, vs)).float()[:, :, :stop]
    start = torch.view_as_complex(turns.unflatten(-1, (-1, 2)).contiguous())
    step = torch.complex(steps[:, :rotary:2].contiguous(), steps[:, rotary + 1 :: 2].contiguous())
    turn = start[:, tokens // 64] * step[tokens % 64]
    pairs = torch.view_as_complex(keys[..., :rotary].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turn[:, None]).flatten(-2)
    keys = torch.cat((turned, keys[..., rotary:]), dim=-1)
    keys, values, rows = (x.to(dtype).float() for x in (keys, values, query))
    scores = rows @ keys.transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill((tokens < first[:, None])[:, None, None], -torch.inf)
    weights = torch.nan_to_num(scores.softmax(dim=-1)).to(dtype).float()
    return (weights @ values).numpy(), scores.logsumexp(dim=-1).numpy()


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
    arguments: tuple[Tensor, ...],
    stop: int,
    softcap: float = 0.0,
) -> None:
    """`result` of additive_attend is nearer to float64 than attention over bf16 keys is.

    That is the precision a model in bf16 has without compression. The floor of a unit of float16
    covers cases where bf16 happens to hit.
    """
    weighted, peak, total = (x.detach().cpu() for x in result)
    want, want_sums = by_definition(arguments, stop, softcap)
    output = weighted / total.clamp_min(1e-30)[..., None]
    got = errors(output, peak + total.log(), want, want_sums)
    plain = errors(
        *plain_attention(arguments, stop, softcap, torch.bfloat16), want=want, want_sums=want_sums
    )
    unit = float(torch.finfo(torch.float16).eps)
    assert got[0] <= max(plain[0], 2 * unit), (got, plain)
    assert got[1] <= max(plain[1], 2 * unit), (got, plain)
    blind = ~np.isfinite(want_sums)
    assert not weighted.numpy()[blind].any()
    assert not total.numpy()[blind].any()
    assert (peak.numpy()[blind] == -np.inf).all()
