"""Perplexity: the definition, and what a compressed cache is asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from commvq_core.calibration.data import iter_documents
from commvq_core.errors import InputError
from commvq_core.evaluation.codecs import EvalCodec
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.runner import evaluate
from commvq_core.evaluation.tasks.perplexity import Perplexity
from commvq_core.models import LoadedModel


def test_fp16_perplexity_is_that_of_one_plain_forward_a_window(
    loaded: LoadedModel, codecs: list[EvalCodec], short: EvalOptions
) -> None:
    (entry,) = evaluate(loaded, codecs[:1], Perplexity(short))["results"]
    ids = []
    for text in iter_documents(short.datasets, split="heldout"):
        ids.extend(loaded.tokenizer(text)["input_ids"])
    total = 0.0
    for window in torch.tensor(ids[:256]).split(128):
        with torch.inference_mode():
            logits = loaded.model(input_ids=window[None]).logits[0].double()
        chosen = logits.log_softmax(-1)[torch.arange(127), window[1:]]
        total -= float(chosen.sum())
    expected = math.exp(total / (2 * 127))
    # The cache holds fp16, so not to the last digit.
    assert entry["metrics"]["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert entry["metrics"]["tokens"] == 2 * 127
    assert entry["metrics"]["delta_percent"] == 0.0


def test_a_compressed_cache_is_asked_as_in_token_by_token_decoding(
    loaded: LoadedModel, codecs: list[EvalCodec], short: EvalOptions
) -> None:
    task = Perplexity(short)
    window = task.prepare(loaded)[0][:64]
    with codecs[1].open(True) as cache:
        at_once = task.run(loaded, cache, window)["nll"]
    total = 0.0
    with codecs[1].open(True) as cache, torch.inference_mode():
        for token, target in pairwise(window):
            output = loaded.model(input_ids=token.view(1, 1), past_key_values=cache)
            total -= float(output.logits[0, -1].double().log_softmax(-1)[target])
    assert at_once == pytest.approx(total, rel=1e-4)


def test_compression_shows(
    loaded: LoadedModel, codecs: list[EvalCodec], short: EvalOptions
) -> None:
    full, small = evaluate(loaded, codecs, Perplexity(short))["results"]
    assert small["metrics"]["delta_percent"] != 0.0
    assert small["metrics"]["perplexity"] != full["metrics"]["perplexity"]


def test_long_windows_are_fed_in_pieces_to_the_same_result(
    loaded: LoadedModel,
    codecs: list[EvalCodec],
    short: EvalOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = evaluate(loaded, codecs, Perplexity(short))["results"]
    monkeypatch.setattr("commvq_core.evaluation.tasks.perplexity._FORWARD", 48)
    pieces = evaluate(loaded, codecs, Perplexity(short))["results"]
    for one, other in zip(whole, pieces, strict=True):
        value = other["metrics"]["perplexity"]
        assert one["metrics"]["perplexity"] == pytest.approx(value, rel=1e-4)


def test_every_window_has_an_empty_cache_of_its_own(
    loaded: LoadedModel, short: EvalOptions
) -> None:
    opened = []

    @contextmanager
    def fresh(strict: bool) -> Iterator[Any]:
        opened.append(strict)
        cache = DynamicCache()
        cache.nbytes = 0
        yield cache
        assert cache.get_seq_length() == 128

    codec = EvalCodec("fp16", 16.0, 0, {}, fresh)
    evaluate(loaded, [codec], Perplexity(short))
    assert opened == [True, True]


def test_a_short_text_gives_the_windows_that_it_has(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("some words that the tokenizer cuts into pieces " * 6)
    task = Perplexity(EvalOptions(datasets=(str(path),), max_length=100))
    windows = task.prepare(loaded)
    assert 1 <= len(windows) < 4
    assert task.settings()["limit"] == len(windows)
    with pytest.raises(InputError, match="smaller --limit"):
        Perplexity(EvalOptions(datasets=(str(path),), max_length=100, limit=50)).prepare(loaded)
