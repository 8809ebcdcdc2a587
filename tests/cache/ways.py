"""Ways to generate, each a function of a model and of caches for it.

`fresh()` opens a new cache as a context manager. A way returns tensors that must not depend on
which cache it was, as long as the cache loses nothing.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from tests.cache.families import build_like

Fresh = Callable[[], AbstractContextManager[Any]]
Way = Callable[[PreTrainedModel, Fresh], list[Tensor]]

NEW = 8
_GREEDY = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}


def prompt(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Random token ids [rows, tokens] without special ones."""
    return torch.randint(3, 200, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _generate(model: PreTrainedModel, cache: Any, ids: Tensor, **options: Any) -> Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **{**_GREEDY, **options})


def _once(ids: Tensor, **options: Any) -> Way:
    def way(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
        torch.manual_seed(7)
        with fresh() as cache:
            return [_generate(model, cache, ids, **options)]

    return way


def _padded(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A left-padded batch and its mask."""
    ids = prompt(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return torch.where(mask.bool(), ids, 0), mask


def _left_padding(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
    ids, mask = _padded((26, 19, 7, 1))
    with fresh() as cache:
        return [_generate(model, cache, ids, attention_mask=mask)]


def _right_padding(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
    """Logits of the real tokens: padding stands in the middle once more tokens come."""
    ids, more = prompt(2, 24), prompt(2, 5, 1)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    whole = torch.cat((mask, torch.ones_like(more)), dim=1)
    positions = (whole.cumsum(-1) - 1).clamp_min(0)
    with fresh() as cache, torch.no_grad():
        first = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions[:, :24],
            past_key_values=cache,
        ).logits
        second = model(
            input_ids=more,
            attention_mask=whole,
            position_ids=positions[:, 24:],
            past_key_values=cache,
        ).logits
    return [first[mask.bool()], second]


def _own_chunks(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
    ids, mask = _padded((23, 5))
    logits = []
    for sizes in ((9, 14), (1, 1, 1, 20), (22, 1)):
        start = 0
        with fresh() as cache, torch.no_grad():
            for size in sizes:
                stop = start + size
                positions = (mask.cumsum(-1) - 1).clamp_min(0)
                output = model(
                    input_ids=ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                )
                start = stop
            logits.append(output.logits[:, -1])
    return logits


def _turns(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
    answers = []
    with fresh() as cache:
        ids = prompt(1, 11)
        for turn in range(3):
            ids = _generate(model, cache, ids)
            answers.append(ids)
            ids = torch.cat((ids, prompt(1, 6, turn + 1)), dim=1)
    return answers


def _copies(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
    ids = prompt(1, 21)
    with fresh() as cache:
        first = _generate(model, cache, ids)
        twin = copy.deepcopy(cache)
        ways = [torch.cat((first, prompt(1, 4, seed)), dim=1) for seed in (1, 2)]
        answers = [_generate(model, c, way) for c, way in zip((cache, twin), ways, strict=True)]
        if hasattr(twin, "close"):
            twin.close()
    return answers


def _several(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
    ids = [prompt(1, 17, seed) for seed in (1, 2)]
    with fresh() as one, fresh() as two, torch.no_grad():
        caches = (one, two)
        for cache, row in zip(caches, ids, strict=True):
            model(input_ids=row[:, :12], past_key_values=cache)
        return [
            model(input_ids=row[:, 12:], past_key_values=cache).logits
            for cache, row in zip(caches, ids, strict=True)
        ]


def _rows(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
    ids, mask = _padded((22, 9, 16))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    new = prompt(1, 3, 9).expand(4, -1)
    rows = torch.tensor([0, 2, 2, 0])
    with fresh() as cache, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        whole = torch.cat((mask[rows], torch.ones_like(new)), dim=1)
        return [
            model(
                input_ids=new,
                attention_mask=whole,
                position_ids=(whole.cumsum(-1) - 1).clamp_min(0)[:, ids.shape[1] :],
                past_key_values=cache,
            ).logits
        ]


def _cropped(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
    """Back into the window and into the codes, then on token by token."""
    ids, answers = prompt(2, 30), []
    for kept in (29, 24, 12):
        with fresh() as cache, torch.no_grad():
            # As assisted decoding does: sliding windows forget their past otherwise.
            for layer in cache.layers:
                if hasattr(layer, "activate_past_recording"):
                    layer.activate_past_recording()
            for start, stop in ((0, 20), (20, 30)):
                model(input_ids=ids[:, start:stop], past_key_values=cache)
            crop_to(cache, kept)
            for at in range(kept, kept + 3):
                token = ids[:, at % 30 : at % 30 + 1]
                answers.append(model(input_ids=token, past_key_values=cache).logits)
    return answers


def crop_to(cache: Any, length: int) -> None:
    """Crop a cache of any release of transformers."""
    removes = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters
    cache.crop(length - cache.get_seq_length() if removes else length)


class _Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.flatten())

    def end(self) -> None:
        pass


def _streamed(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
    streamer = _Collect()
    with fresh() as cache:
        answer = _generate(model, cache, prompt(1, 18), streamer=streamer)
    assert torch.equal(torch.cat(streamer.tokens), answer[0])
    return [answer]


def _inference_mode(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
    with torch.inference_mode(), fresh() as cache:
        return [_generate(model, cache, prompt(1, 18)).clone()]


def _after_exception(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
    ids = prompt(1, 15)
    with fresh() as cache:
        with pytest.raises(IndexError), torch.no_grad():
            model(input_ids=torch.tensor([[10_000]]), past_key_values=cache)
        return [_generate(model, cache, ids)]


def _assisted(model: PreTrainedModel, fresh: Fresh) -> list[Tensor]:
    """The assistant is nearly the model, so that some of what it proposes is taken."""
    assistant = build_like(model, noise=0.1)
    assistant.generation_config.num_assistant_tokens = 4
    with fresh() as cache:
        # min_new_tokens: releases before 5.17 refuse it here
        return [
            _generate(model, cache, prompt(1, 20), assistant_model=assistant, min_new_tokens=None)
        ]


WAYS: dict[str, Way] = {
    "greedy": _once(prompt(1, 24)),
    "sampling": _once(prompt(2, 20), do_sample=True, temperature=0.8, top_k=40),
    "beams": _once(prompt(1, 20), num_beams=3),
    "return sequences": _once(prompt(1, 20), do_sample=True, num_return_sequences=3),
    "assisted": _assisted,
    "prompt look-up": _once(prompt(1, 7).repeat(1, 3), prompt_lookup_num_tokens=3),
    "left padding": _left_padding,
    "right padding": _right_padding,
    "prefill in chunks": _once(prompt(2, 29), prefill_chunk_size=6),
    "chunks of any size": _own_chunks,
    "one-token prompt": _once(prompt(1, 1)),
    "prompt below the window": _once(prompt(2, 5)),
    "several turns": _turns,
    "deep copy": _copies,
    "several caches": _several,
    "select and reorder rows": _rows,
    "crop": _cropped,
    "streaming": _streamed,
    "inference mode": _inference_mode,
    "after an exception": _after_exception,
}
