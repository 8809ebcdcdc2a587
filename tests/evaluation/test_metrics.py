"""Numbers that tasks report, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from commvq_core.evaluation.metrics import (
    delta_percent,
    first_number,
    percentile,
    perplexity,
    token_kl,
    token_nll,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_nll_is_the_log_softmax_of_the_target(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1100, 7, generator=generator).to(dtype) * 5
    targets = torch.randint(7, (1100,), generator=generator)
    exact = logits.double().numpy()
    normalizer = np.log(np.exp(exact).sum(axis=1))
    expected = normalizer - exact[np.arange(1100), targets.numpy()]
    np.testing.assert_allclose(token_nll(logits, targets).numpy(), expected, atol=1e-4)


def test_token_kl_is_the_mean_log_ratio() -> None:
    generator = torch.Generator().manual_seed(1)
    p, q = torch.randn(2, 700, 9, generator=generator).double() * 3
    wanted = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    np.testing.assert_allclose(token_kl(p.float(), q.float()), wanted, rtol=1e-4, atol=1e-6)
    assert float(token_kl(p.float(), p.float()).abs().max()) == 0.0


def test_percentile_is_numpys() -> None:
    values = [5.0, 1.0, 9.0, 2.0]
    assert percentile(values, 99) == pytest.approx(np.percentile(values, 99))


def test_a_uniform_guess_has_the_perplexity_of_the_vocabulary() -> None:
    nll = token_nll(torch.zeros(5, 300), torch.arange(5))
    assert perplexity(float(nll.sum()), 5) == pytest.approx(300)


def test_delta_is_in_percent_of_the_baseline() -> None:
    assert delta_percent(12.5, 10.0) == pytest.approx(25.0)
    assert math.isclose(delta_percent(9.0, 10.0), -10.0)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (" 48213.", "48213"),
        ("48,213 of course", "48213"),
        ("4, 8 and 15", "4"),
        ("It is 12345\nor 54321", "12345"),
        ("none", None),
        ("", None),
    ],
)
def test_the_first_number_of_an_answer_counts(answer: str, number: str | None) -> None:
    assert first_number(answer) == number
