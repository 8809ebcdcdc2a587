"""Answers: decoded greedily, rows side by side, and the beginning that all caches share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from commvq_core.cache.half import HalfPrecisionCache
from commvq_core.evaluation.answers import generate_after_context, generate_batch
from commvq_core.evaluation.beginnings import Beginnings
from commvq_core.evaluation.codecs import EvalCodec, resolve_codecs
from commvq_core.evaluation.prompts import Prompt, text_prompt
from commvq_core.models import LoadedModel

TEXT = "Read this.\n" + " ".join(f"word{number}" for number in range(200)) + "\n"
QUESTION = "\nWhat was it?\nAnswer:"


def test_context_and_question_apart_give_what_they_give_at_once(loaded: LoadedModel) -> None:
    ids = torch.arange(2, 150)
    prompt = Prompt(ids[:120].tolist(), ids[120:].tolist(), False)
    cache = DynamicCache()
    with torch.inference_mode():
        answer = generate_after_context(loaded, cache, prompt, 6)
        expected = loaded.model.generate(ids[None], max_new_tokens=6, do_sample=False)
    assert answer == loaded.tokenizer.decode(expected[0, len(ids) :], skip_special_tokens=True)


def test_the_question_sees_the_context_as_codes(
    loaded: LoadedModel, codecs: list[EvalCodec]
) -> None:
    seen = []
    prompt = Prompt(list(range(2, 122)), list(range(130, 140)), False)
    with codecs[1].open(False) as cache:
        layer = cache.compressed_layers[0]
        hook = loaded.model.get_decoder().register_forward_pre_hook(
            lambda *_: seen.append((layer.get_seq_length(), cache.nbytes))
        )
        try:
            with torch.inference_mode():
                generate_after_context(loaded, cache, prompt, 1)
        finally:
            hook.remove()
    (empty, _), (after_context, stored) = seen[:2]
    assert (empty, after_context) == (0, 130 - 16)  # the question runs with 6 tokens before it
    # 120 tokens, 2 layers, K and V, 2 heads of 32 dims in fp16.
    assert stored < 120 * 2 * 2 * 64 * 2


def test_a_prompt_may_have_no_context(loaded: LoadedModel, codecs: list[EvalCodec]) -> None:
    prompt = text_prompt(loaded, "", QUESTION, templated=False, room=None)
    assert prompt.context == []
    for codec in codecs:
        with codec.open(False) as cache, torch.inference_mode():
            assert generate_after_context(loaded, cache, prompt, 2)


def test_an_answer_ends_once_there_is_enough(loaded: LoadedModel, codecs: list[EvalCodec]) -> None:
    prompt = text_prompt(loaded, TEXT, QUESTION, templated=False, room=None)
    for codec in codecs:
        texts = []
        for until in (None, lambda text: len(text) >= 6):
            with codec.open(False) as cache, torch.inference_mode():
                texts.append(generate_after_context(loaded, cache, prompt, 20, until=until))
        full, short = texts
        assert full.startswith(short)
        assert 6 <= len(short) < len(full)


def prompts(*lengths: int) -> list[Prompt]:
    """Prompts of random tokens, each of another length, with questions of 16."""
    draw = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(2, 200, (n + 16,), generator=draw).tolist() for n in lengths]
    return [Prompt(row[:-16], row[-16:], False) for row in rows]


@pytest.fixture
def several(loaded: LoadedModel, codecs: list[EvalCodec]) -> list[EvalCodec]:
    """fp16, a rival whose decodings are kept, and half-bit codes."""
    rivals = resolve_codecs(loaded, names=["turboquant-2"], window=32, sinks=2)
    return [codecs[0], rivals[1], codecs[1]]


def enough(text: str) -> bool:
    """Holds of longer and shorter texts, as they begin."""
    return bool(text) and len(text) >= 5 + 7 * (ord(text[0]) % 4)


def test_rows_that_end_early_leave_the_others_as_they_are(
    loaded: LoadedModel, several: list[EvalCodec]
) -> None:
    asked = prompts(150, 90, 121, 64, 150)
    sizes: list[int] = []
    hook = loaded.model.get_decoder().register_forward_hook(
        lambda module, arguments, output: sizes.append(output.last_hidden_state.shape[0])
    )
    try:
        for codec in several:
            alone = []
            for prompt in asked:
                with codec.open(False) as cache, torch.inference_mode():
                    alone.append(generate_after_context(loaded, cache, prompt, 40, until=enough))
            sizes.clear()
            with codec.open(False) as cache, torch.inference_mode():
                assert generate_batch(loaded, cache, asked, 40, until=enough) == alone
            assert sizes[:2] == [5, 5]
            assert sizes[-1] < 5
            assert sizes == sorted(sizes, reverse=True)
    finally:
        hook.remove()


def test_answers_are_those_of_generate(loaded: LoadedModel) -> None:
    asked = prompts(40, 40, 40)
    with torch.inference_mode():
        found = generate_batch(loaded, HalfPrecisionCache(loaded.model), asked, 12)
        ids = torch.tensor([prompt.context + prompt.question for prompt in asked])
        want = loaded.model.generate(
            ids,
            past_key_values=HalfPrecisionCache(loaded.model),
            max_new_tokens=12,
            do_sample=False,
        )
    texts = loaded.tokenizer.batch_decode(want[:, ids.shape[1] :], skip_special_tokens=True)
    assert found == texts


def test_an_answer_ends_at_the_models_own_end(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = prompts(40)
    with torch.inference_mode():
        whole = loaded.model.generate(
            torch.tensor([prompt.context + prompt.question]), max_new_tokens=9, do_sample=False
        )[0, 56:].tolist()
        monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [whole[4], 1])
        text = generate_after_context(loaded, HalfPrecisionCache(loaded.model), prompt, 9)
    assert text == loaded.tokenizer.decode(whole[: whole.index(whole[4]) + 1])


@pytest.mark.parametrize("lengths", [(150, 150), (150, 90, 33), (2080, 2047), (2300,)])
def test_every_cache_goes_on_from_the_same_beginning(
    loaded: LoadedModel, several: list[EvalCodec], lengths: tuple[int, ...]
) -> None:
    asked = prompts(*lengths)
    beginnings = Beginnings()
    passes: list[int] = []
    hook = loaded.model.get_decoder().register_forward_hook(
        lambda module, arguments, output: passes.append(output.last_hidden_state.shape[1])
    )
    try:
        for index, codec in enumerate(several):
            states = []
            for shared in (None, beginnings):
                passes.clear()
                with codec.open(False) as cache, torch.inference_mode():
                    answers = generate_batch(loaded, cache, asked, 3, beginnings=shared)
                    layers = cache.layers
                    states.append((answers, layers[-1].keys, layers[-1].values, cache.nbytes))
            ran = 0 if index else 1
            assert len([count for count in passes if count > 16]) == ran + (max(lengths) > 2048)
            (own, *tensors, size), (again, *others, same) = states
            assert (own, size) == (again, same)
            for one, other in zip(tensors, others, strict=True):
                torch.testing.assert_close(one, other)
    finally:
        hook.remove()
    assert beginnings.spared > 0


def test_other_tokens_have_a_beginning_of_their_own(
    loaded: LoadedModel, several: list[EvalCodec]
) -> None:
    beginnings = Beginnings()
    first, second = prompts(100), prompts(101)
    found = {}
    for shared in (beginnings, None):
        for name, asked in (("first", first), ("second", second)):
            with several[2].open(False) as cache, torch.inference_mode():
                answers = generate_batch(loaded, cache, asked, 8, beginnings=shared)
            assert found.setdefault(name, answers) == answers
    assert beginnings.spared == 0


def test_strict_caches_share_nothing(loaded: LoadedModel, several: list[EvalCodec]) -> None:
    beginnings = Beginnings()
    ids = torch.arange(2, 102)[None]
    with several[2].open(True) as cache:
        assert beginnings.fill(cache, loaded.model, ids, torch.ones_like(ids), 100) == 0
        assert cache.get_seq_length() == 0
    plain: Any = DynamicCache()
    assert beginnings.fill(plain, loaded.model, ids, torch.ones_like(ids), 100) == 0
