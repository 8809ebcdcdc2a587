"""Codes are read by a native operator where it can, and give the same where it can't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from commvq_core.cache import attention
from commvq_core.cache.cache import CommVQCache
from tests.cache.families import build
from tests.cache.lossy_codecs import preset_codecs
from tests.cache.ways import prompt

WINDOW = {"window": 8, "sinks": 2}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The last token of every call of the presets' operators."""
    seen: list[int] = []

    def watch(operator: Callable[..., object], place: int) -> Callable[..., object]:
        def watched(*arguments: Any) -> object:
            seen.append(arguments[place])
            return operator(*arguments)

        return watched

    for name, place in (("additive_attend", -2), ("additive_step", -6), ("published_attend", -2)):
        own = watch(getattr(torch.ops.commvq, name), place)
        monkeypatch.setattr(torch.ops.commvq, name, own)
    return seen


@pytest.mark.parametrize("preset", ["default", "published"])
@pytest.mark.parametrize("family", ["llama", "llama-yarn", "glm4", "gemma2", "smollm3", "gpt-oss"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_operator_gives_what_decoded_blocks_give(
    family: str, padded: bool, preset: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """New tokens one by one, a few, and more than a tile of them.

    Also scaled rotation, soft-capping, layers without rotation and learnt sinks.
    """
    model = build(family)
    codecs = preset_codecs(model, preset)
    ids = prompt(2, 60)
    mask = torch.ones(2, 206, dtype=torch.long)
    mask[0, : 17 if padded else 0] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = []
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(attention, "add_undecoded", lambda *_: False)
            monkeypatch.setattr(attention, "attend_step", lambda *_: None)
        with CommVQCache(model, codecs, **WINDOW) as cache, torch.no_grad():
            for start, stop in ((0, 60), (60, 61), (61, 62), (62, 66), (66, 206)):
                new = ids[:, :60] if start == 0 else prompt(2, stop - start, start)
                output = model(
                    input_ids=new,
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                )
            logits.append(output.logits)
        # So many rows as the last 140 tokens have are for decoded blocks, with published codes.
        assert len(calls) == (4 if preset == "default" else 3) * len(codecs)
    # The operators round queries to 13 bits of their norm and rotate in 16.
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[1].abs().max()


def test_what_the_operator_cannot_do_is_done_otherwise(calls: list[int]) -> None:
    model = build("llama")
    codecs = preset_codecs(model, "default")
    ids = prompt(1, 60)
    with torch.no_grad():
        with CommVQCache(model, codecs, **WINDOW) as cache:
            model(input_ids=ids, past_key_values=cache)
            holes = torch.ones(1, 61, dtype=torch.long)
            holes[0, 30:33] = 0  # tokens in the middle that nobody is to see
            at = torch.tensor([[57]])
            model(
                input_ids=ids[:, :1], attention_mask=holes, position_ids=at, past_key_values=cache
            )
        with CommVQCache(model, codecs, strict=True, **WINDOW) as cache:
            model(input_ids=ids, past_key_values=cache)
            model(input_ids=ids[:, :4], past_key_values=cache)  # each sees other codes
        published = preset_codecs(model, "published")
        mixed = {layer: (codecs[layer][0], published[layer][1]) for layer in codecs}
        with CommVQCache(model, mixed, **WINDOW) as cache:
            model(input_ids=ids, past_key_values=cache)
            model(input_ids=ids[:, :1], past_key_values=cache)
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize(
    ("family", "preset"),
    [
        ("llama", "default"),
        ("llama", "published"),
        ("llama-yarn", "default"),
        ("glm4", "default"),
        ("gemma2", "default"),
        ("gemma2", "published"),
        ("gpt-oss", "default"),
    ],
)
def test_a_decoding_step_is_one_operator_and_gives_what_many_do(
    family: str, preset: str, sinks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also soft-capping; learnt sinks and float16 are not for the operator.

    With the published preset's codes two operators do it.
    """
    model = build(family).to(dtype)
    codecs = preset_codecs(model, preset)
    windows: list[int] = []
    name, place = ("additive_step", -4) if preset == "default" else ("exact_attend", 1)
    operator = getattr(torch.ops.commvq, name)

    def watched(*arguments: Any) -> object:
        windows.append(arguments[place].shape[2])
        return operator(*arguments)

    monkeypatch.setattr(torch.ops.commvq, name, watched)
    logits = []
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(attention, "attend_step", lambda *_: None)
        with CommVQCache(model, codecs, window=8, sinks=sinks) as cache, torch.no_grad():
            model(input_ids=prompt(2, 40), past_key_values=cache)
            steps = [
                model(input_ids=prompt(2, 1, at), past_key_values=cache).logits
                for at in range(40, 80)
            ]
        logits.append(torch.cat(steps, dim=1).float())
        done = family != "gpt-oss" and dtype != torch.float16
        assert len(windows) == (40 * len(codecs) if done else 0)
    # The window, and tokens that wait to be encoded.
    assert not done or set(windows) == set(range(9, 41))
    # A rounding more or less of a query, which is rounded to 13 bits for the codes, is seen.
    allowed = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 0.0}[dtype]
    assert (logits[0] - logits[1]).abs().max() <= allowed * logits[1].abs().max()
