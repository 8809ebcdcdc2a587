"""Fitting the codebooks of one head."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.codecs.additive import AdditiveCodec, AdditiveConfig
from commvq_core.codecs.base import FitData, SideSpec
from commvq_core.fit import additive as fit
from commvq_core.fit.additive import fit_additive
from commvq_core.fit.metric import key_metric, value_metric

SETTINGS: dict[str, Any] = {
    "sub_dim": 4,
    "stages": 2,
    "codewords": 8,
    "kmeans_iterations": 4,
    "rounds": 3,
    "beam": 4,
    "seed": 0,
}


def rows(count: int = 600, dim: int = 8) -> Tensor:
    """Correlated rows with a mean."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(dim, dim, generator=generator)
    return torch.randn(count, dim, generator=generator) @ mix + 3


def error(codebooks: Tensor, data: Tensor, beam: int = 4) -> float:
    """Relative squared error of encoding and decoding `data`."""
    codes = ops.additive_encode(data[None], codebooks[None], beam)[0].long()
    subs, stages = codebooks.shape[:2]
    parts = [
        sum(codebooks[s, m, codes[:, s * stages + m]] for m in range(stages)) for s in range(subs)
    ]
    return float((data - torch.cat(parts, 1)).square().sum() / (data - data.mean(0)).square().sum())


def test_a_fit_depends_on_rows_and_seed_alone() -> None:
    data = rows()
    before = data.clone()
    first = fit_additive(data, **SETTINGS)
    torch.rand(3)  # the global generator is not asked
    assert first.shape == (2, 2, 8, 4)
    assert torch.equal(fit_additive(data, **SETTINGS), first)
    assert torch.equal(data, before)
    assert not torch.equal(fit_additive(data, **{**SETTINGS, "seed": 1}), first)


def test_refits_and_a_beam_lower_the_error_of_the_start() -> None:
    data = rows()
    start = error(fit_additive(data, **{**SETTINGS, "rounds": 0}), data)
    fitted = error(fit_additive(data, **SETTINGS), data)
    assert fitted < 0.97 * start


def test_more_stages_lower_the_error() -> None:
    data = rows()
    errors = [error(fit_additive(data, **{**SETTINGS, "stages": n}), data) for n in (1, 2, 3, 4)]
    assert all(b < 0.8 * a for a, b in itertools.pairwise(errors))


def test_the_start_samples_long_data_and_the_refits_see_every_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    solve = fit.solve_codebooks

    def record(codebooks: Tensor, codes: Tensor, part: Tensor, ridge: float) -> Tensor:
        seen.append(len(part))
        return solve(codebooks, codes, part, ridge)

    monkeypatch.setattr(fit, "_START_ROWS", 100)
    monkeypatch.setattr(fit, "solve_codebooks", record)
    sampled = fit_additive(rows(), **SETTINGS)
    assert seen == [600] * 6
    assert error(sampled, rows()) < 1.3 * error(fit_additive(rows(), **SETTINGS), rows())


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_fit_spends_its_bits_where_the_metric_says(side: str) -> None:
    """Under a metric, the fitted codec beats the one fitted to plain squared error."""
    spec = SideSpec(side, 1, 8, 8 if side == "key" else 0)
    config = vars(AdditiveConfig(sub_dim=8, stages=2, code_bits=4, rounds=3))
    data = rows(1000)[:, None]
    if side == "key":
        metric = key_metric(torch.tensor([[100.0, 1.0, 0.1, 0.01]]))
        plain = key_metric(torch.ones(1, 4))
    else:
        direction = torch.linspace(-2, 3, 8)[:, None]
        metric = value_metric((100 * direction @ direction.T + torch.eye(8))[None])
        plain = value_metric(torch.eye(8)[None])

    def cost(taught: Tensor) -> float:
        fitted = AdditiveCodec.fit(spec, config, FitData(data, taught, seed=0))
        codec = AdditiveCodec.join(spec, config, [fitted])
        vectors = data.transpose(0, 1)
        left = (vectors - codec.decode(codec.encode(vectors[None]))[0]).double()
        return float(torch.einsum("hnd,hde,hne->", left, metric.double(), left))

    assert cost(metric) < 0.7 * cost(plain)
