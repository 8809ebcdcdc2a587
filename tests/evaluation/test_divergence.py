"""Divergence from fp16: zero for fp16 itself, the definition for a compressed cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from commvq_core.cache.half import HalfPrecisionCache
from commvq_core.evaluation.codecs import EvalCodec
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.report import summary_rows
from commvq_core.evaluation.runner import evaluate
from commvq_core.evaluation.tasks.divergence import Divergence
from commvq_core.evaluation.tasks.perplexity import Perplexity
from commvq_core.models import LoadedModel


def test_fp16_does_not_diverge_from_itself_and_codes_do(
    loaded: LoadedModel, codecs: list[EvalCodec], short: EvalOptions
) -> None:
    result = evaluate(loaded, codecs, Divergence(short))
    full, small = (entry["metrics"] for entry in result["results"])
    assert (full["kl_mean"], full["kl_p99"], full["top1_agreement"]) == (0.0, 0.0, 1.0)
    assert full["tokens"] == 256
    scored = evaluate(loaded, codecs, Perplexity(short))
    for found, expected in zip(result["results"], scored["results"], strict=True):
        for name in ("perplexity", "delta_percent"):
            want = expected["metrics"][name]
            assert found["metrics"][name] == pytest.approx(want, rel=1e-4, abs=1e-3)
    assert 0 < small["kl_mean"] < small["kl_p99"]
    assert 0 < small["top1_agreement"] < 1
    assert result["settings"]["strict_cache"] is True
    names, cells = summary_rows(result)
    assert cells[1][names.index("KL, nats")] == small["kl_mean"]


def test_it_is_the_divergence_of_token_by_token_decoding(
    loaded: LoadedModel, codecs: list[EvalCodec], short: EvalOptions
) -> None:
    task = Divergence(short)
    window = task.prepare(loaded)[0][:96]
    with codecs[1].open(True) as cache:
        record = task.run(loaded, cache, window)
    expected, agreed = [], 0
    with codecs[1].open(True) as cache, torch.inference_mode():
        plain = HalfPrecisionCache(loaded.model)
        for token in window:
            wanted, got = (
                loaded.model(input_ids=token.view(1, 1), past_key_values=store)
                .logits[0, -1]
                .double()
                .log_softmax(-1)
                .numpy()
                for store in (plain, cache)
            )
            expected.append(np.sum(np.exp(wanted) * (wanted - got)))
            agreed += int(wanted.argmax() == got.argmax())
    np.testing.assert_allclose(record["kl"], expected, rtol=1e-2, atol=1e-6)
    assert abs(record["agreed"] - agreed) <= 1


def test_pieces_give_what_the_whole_gives(
    loaded: LoadedModel,
    codecs: list[EvalCodec],
    short: EvalOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = Divergence(short)
    window = task.prepare(loaded)[0]
    records = []
    for size in (512, 48):
        monkeypatch.setattr("commvq_core.evaluation.tasks.divergence._FORWARD", size)
        with codecs[1].open(True) as cache:
            records.append(task.run(loaded, cache, window))
    np.testing.assert_allclose(records[0]["kl"], records[1]["kl"], rtol=1e-2, atol=1e-6)


def test_the_model_is_as_it_was_beside_the_cache(
    loaded: LoadedModel, codecs: list[EvalCodec], short: EvalOptions
) -> None:
    window = Divergence(short).prepare(loaded)[0]

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return loaded.model(input_ids=window[None], past_key_values=DynamicCache()).logits

    before = logits()
    with codecs[1].open(True) as cache:
        Divergence(short).run(loaded, cache, window)
        assert torch.equal(logits(), before)
    assert torch.equal(logits(), before)


def test_a_file_is_read_whole_and_the_settings_say_so(
    loaded: LoadedModel, short: EvalOptions
) -> None:
    task = Divergence(short)
    task.prepare(loaded)
    assert task.settings()["split"] == "whole"
    task = Divergence(EvalOptions(max_length=64, limit=1))
    task.prepare(loaded)
    assert task.settings()["split"] == "heldout"
