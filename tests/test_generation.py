"""Generating text: with any cache, with and without a chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from commvq_core.cache.half import HalfPrecisionCache
from commvq_core.errors import InputError
from commvq_core.generation import generate_text, half_precision_bytes, next_turn
from commvq_core.models import LoadedModel, load_model

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> LoadedModel:
    return load_model(str(tiny_model_dir), device="cpu")


def test_the_text_is_that_of_greedy_decoding_and_streams(loaded: LoadedModel) -> None:
    pieces: list[str] = []
    cache = HalfPrecisionCache(loaded.model)
    shown = generate_text(loaded, cache, "the words", max_new_tokens=8, on_text=pieces.append)
    ids = loaded.tokenizer("the words", return_tensors="pt")["input_ids"]
    expected = loaded.model.generate(ids, max_new_tokens=8, do_sample=False)
    new = expected[0, ids.shape[1] :]
    assert shown["text"] == loaded.tokenizer.decode(new, skip_special_tokens=True)
    assert "".join(pieces) == shown["text"]
    assert shown["prompt_tokens"] == ids.shape[1]
    assert shown["new_tokens"] == len(new)


def test_fp16_bytes_are_what_an_fp16_cache_holds(loaded: LoadedModel) -> None:
    cache = HalfPrecisionCache(loaded.model)
    shown = generate_text(loaded, cache, "the words", max_new_tokens=3)
    assert shown["cache_bytes"] == shown["fp16_cache_bytes"] == cache.nbytes
    assert half_precision_bytes(loaded.spec, 10) == 10 * 2 * 2 * 2 * 32 * 2


def test_the_chat_template_is_used_unless_told_otherwise(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.tokenizer, "chat_template", TEMPLATE)
    counts = {}
    for use in (True, False):
        cache = HalfPrecisionCache(loaded.model)
        shown = generate_text(loaded, cache, "word", max_new_tokens=1, use_template=use)
        assert shown["chat_template"] is use
        counts[use] = shown["prompt_tokens"]
    assert counts[True] == len(loaded.tokenizer("<word>")["input_ids"])
    assert counts[False] == len(loaded.tokenizer("word")["input_ids"])


def test_prompts_that_do_not_fit_are_refused(loaded: LoadedModel) -> None:
    cache = HalfPrecisionCache(loaded.model)
    with pytest.raises(InputError, match="empty"):
        generate_text(loaded, cache, "  ", max_new_tokens=1)
    with pytest.raises(InputError, match="at most 4,096"):
        generate_text(loaded, cache, "word", max_new_tokens=5000)
    assert cache.get_seq_length() == 0
    assert torch.is_grad_enabled()


def test_the_next_turn_closes_the_answer_before_it(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    assert next_turn(loaded.tokenizer, "more", ended=True) == "user:more<eos>assistant:"
    assert next_turn(loaded.tokenizer, "more", ended=False) == "<eos>user:more<eos>assistant:"
    # A template that shows the last message alone can't be taken apart.
    monkeypatch.setattr(loaded.tokenizer, "chat_template", "<{{ messages[-1]['content'] }}>")
    assert next_turn(loaded.tokenizer, "more", ended=True) == "<more>"
