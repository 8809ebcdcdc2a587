"""The fitting benchmark: three methods on the same keys, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from commvq_core.bench.dense import dense_e_step, dense_encode
from commvq_core.bench.train import IMPLEMENTATIONS, TrainBench, bench_train
from commvq_core.errors import InputError
from commvq_core.fit import em
from tests import runs


def test_the_dense_e_step_is_the_product_one() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, theta = (torch.randn(n, 8, generator=generator) for n in (200, 6))
    for squared in (False, True):
        dense, nearest = dense_e_step(rows, theta, 0.3, squared=squared)
        fast, expected = em.e_step(rows, theta, 0.3, squared=squared)
        assert torch.equal(nearest, expected)
        assert torch.equal(dense_encode(rows, theta), expected)
        assert torch.allclose(dense.weights, fast.weights, atol=1e-3)
        assert torch.allclose(dense.moments, fast.moments, atol=1e-2)
        assert dense.error == pytest.approx(fast.error, rel=1e-5)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return bench_train(TrainBench(tokens=2048, steps=2, bits=0.5))


def test_every_method_reports_time_error_and_memory(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result)) == result
    rows = {row["impl"]: row for row in result["rows"]}
    assert tuple(rows) == IMPLEMENTATIONS
    for row in rows.values():
        assert row["seconds"] > 0
        assert 0 < row["mse_relative"] < 1
        assert row["peak_bytes"] > 0
        assert row["bits_per_element"] == pytest.approx(0.5, abs=0.1)


def test_dense_and_fast_choose_the_same_codes_from_the_same_start(result: dict[str, Any]) -> None:
    dense, fast, default = result["rows"]
    assert (dense["same_codes"], default["same_codes"]) == (None, None)
    assert fast["same_codes"] > 0.995
    assert fast["mse_relative"] == pytest.approx(dense["mse_relative"], rel=0.02)
    assert fast["peak_bytes"] < dense["peak_bytes"]


def test_a_calibration_gives_the_keys(tmp_path: Path) -> None:
    calib = runs.calibration(tmp_path / "calib", tokens=2100)
    found = bench_train(TrainBench(calib, head=1, tokens=4096, steps=1))
    assert found["source"].endswith("layer 2")
    assert found["layer"] == 2
    assert found["tokens"] == 2100
    for changes in ({"layer": 1}, {"layer": 0, "head": 2}):
        with pytest.raises(InputError, match="no layer"):
            bench_train(TrainBench(calib, **changes))


def test_too_few_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --tokens of 2,048 or more"):
        bench_train(TrainBench(tokens=100))
