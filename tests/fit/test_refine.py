"""The joint refit: held to numpy's least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from commvq_core.fit import refine
from commvq_core.fit.refine import code_statistics, solve_codebooks
from tests import reference

STAGES, COUNT, DIM = 3, 6, 4


def problem(rows: int = 200, seed: int = 0, *, used: int = COUNT) -> tuple[Tensor, Tensor, Tensor]:
    """Random (codebooks, codes, rows); only the first `used` codewords of a stage are used."""
    generator = torch.Generator().manual_seed(seed)
    codebooks = torch.randn(STAGES, COUNT, DIM, generator=generator)
    codes = torch.randint(used, (rows, STAGES), generator=generator).to(torch.uint8)
    return codebooks, codes, 2 * torch.randn(rows, DIM, generator=generator) + 1


def squared_error(codebooks: Tensor, codes: Tensor, rows: Tensor) -> float:
    sums = reference.one_hot(codes.numpy(), COUNT) @ codebooks.double().view(-1, DIM).numpy()
    return float(((rows.double().numpy() - sums) ** 2).sum())


@pytest.mark.parametrize("block", [1 << 16, 64], ids=["one block", "several blocks"])
def test_streamed_statistics_are_those_of_the_one_hot_matrix(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "_BLOCK", block)
    codebooks, codes, rows = problem()
    gram, moments = code_statistics(codes, rows, codebooks)
    one_hot = reference.one_hot(codes.numpy(), COUNT)
    assert np.array_equal(gram.numpy(), one_hot.T @ one_hot)
    left = rows.double().numpy() - one_hot @ codebooks.double().view(-1, DIM).numpy()
    assert np.allclose(moments.numpy(), one_hot.T @ left, rtol=1e-12)


def test_a_refit_is_the_least_squares_optimum_over_all_stages_at_once() -> None:
    codebooks, codes, rows = problem()
    best = reference.joint_refit(codes.numpy(), rows.numpy(), COUNT)
    least = squared_error(torch.from_numpy(best), codes, rows)
    once = squared_error(solve_codebooks(codebooks, codes, rows), codes, rows)
    assert least <= once <= least * (1 + 1e-4)
    again = codebooks
    for _ in range(3):
        again = solve_codebooks(again, codes, rows)
    assert squared_error(again, codes, rows) <= least * (1 + 1e-6)
    # Stage by stage would not do: one stage's mean depends on the others' codewords.
    assert least < 0.9 * squared_error(codebooks, codes, rows)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [1, 10, 300])
def test_a_refit_never_raises_the_error(rows: int, seed: int) -> None:
    codebooks, codes, data = problem(rows, seed)
    before = squared_error(codebooks, codes, data)
    for _ in range(4):
        codebooks = solve_codebooks(codebooks, codes, data)
        after = squared_error(codebooks, codes, data)
        assert after <= before * (1 + 1e-6) + 1e-9
        before = after


def test_codewords_that_no_row_uses_stay_where_they_were() -> None:
    codebooks, codes, rows = problem(used=4)
    refitted = solve_codebooks(codebooks, codes, rows)
    assert torch.equal(refitted[:, 4:], codebooks[:, 4:])
    assert not torch.isclose(refitted[:, :4], codebooks[:, :4]).any()


def test_a_refit_of_exact_sums_finds_them_again() -> None:
    codebooks, codes, _ = problem()
    sums = reference.one_hot(codes.numpy(), COUNT) @ codebooks.double().view(-1, DIM).numpy()
    blurred = codebooks + 0.3
    refitted = solve_codebooks(blurred, codes, torch.from_numpy(sums).float())
    # The ridge leaves a ten-thousandth of the blur: 0.01 against some 33 rows a codeword.
    assert squared_error(refitted, codes, torch.from_numpy(sums)) < 1e-4
    assert squared_error(blurred, codes, torch.from_numpy(sums)) > 100
