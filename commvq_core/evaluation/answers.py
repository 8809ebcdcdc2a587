"""Run prompts of two parts through a cache, and decode the answers greedily."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from commvq_core.cache.half import HalfPrecisionCache
from commvq_core.cache.layer import CommVQLayer
from commvq_core.cache.positions import padded_positions
from commvq_core.cache.prefill import PREFILL_CHUNK
from commvq_core.evaluation.beginnings import Beginnings, run_tokens
from commvq_core.generation import greedy

if TYPE_CHECKING:
    from commvq_core.evaluation.prompts import Prompt
    from commvq_core.models import LoadedModel

_STEP = 16  # tokens
_DROP = 8  # finished rows leave a batch once they are one in so many of it


def second_part(context: int, question: int) -> int:
    """How many tokens of a prompt run once the rest is cached: its question, and up to 15 more.

    The question takes along the end of a context, exact in any case, to a multiple of 16 tokens:
    only prompts with equal second parts can run side by side, and few questions are equally long.
    """
    whole = question + -question % _STEP
    return whole if whole < context + question else question


def generate_after_context(
    loaded: LoadedModel,
    cache: Any,
    prompt: Prompt,
    max_new_tokens: int,
    *,
    until: Callable[[str], bool] | None = None,
    beginnings: Beginnings | None = None,
) -> str:
    """`generate_batch` of one prompt."""
    (text,) = generate_batch(
        loaded, cache, [prompt], max_new_tokens, until=until, beginnings=beginnings
    )
    return text


def generate_batch(
    loaded: LoadedModel,
    cache: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    until: Callable[[str], bool] | None = None,
    beginnings: Beginnings | None = None,
) -> list[str]:
    """Run the contexts into the empty cache, then the questions, and decode greedily.

    Every prompt must have the same `second_part`, so that every row's cache holds what comes before
    it and nothing else when it runs; shorter contexts are padded on the left. Returns the new
    texts, special tokens left out. A text ends early once `until(text)` holds of it: what comes
    after must not matter to the score. `beginnings` shares what every cache would compute alike.
    """
    model = loaded.model
    ids, mask = _left_padded(prompts, greedy(loaded.tokenizer)["pad_token_id"], model.device)
    (second,) = {second_part(len(prompt.context), len(prompt.question)) for prompt in prompts}
    split = ids.shape[1] - second
    done = 0 if beginnings is None else beginnings.fill(cache, model, ids, mask, split)
    # A plain cache would need a mask of a whole long context; others cut it up themselves.
    step = PREFILL_CHUNK if isinstance(cache, HalfPrecisionCache) else max(split, 1)
    for start in range(done, split, step):
        run_tokens(model, cache, ids, mask, start, min(start + step, split))
    rows = _decode(loaded, cache, ids, mask, split, max_new_tokens, until)
    return _texts(loaded, rows)


def _decode(
    loaded: LoadedModel,
    cache: Any,
    ids: Tensor,
    mask: Tensor,
    split: int,
    most: int,
    until: Callable[[str], bool] | None,
) -> list[list[int]]:
    """The new tokens of each row, at most `most`, once the first `split` of `ids` are cached.

    Rows that have ended leave the batch, so that a short answer does not wait for a long one.
    """
    model = loaded.model
    ends = _end_tokens(model)
    options = {"logits_to_keep": 1} if _takes_logits_to_keep(model) else {}
    padded = not bool(mask.all())
    numbers = padded_positions(mask)[:, split:]
    answers: list[list[int]] = [[] for _ in range(ids.shape[0])]
    running = list(range(ids.shape[0]))  # which answer each row of the cache belongs to
    ended: set[int] = set()
    new = ids[:, split:]
    while True:
        where = {"attention_mask": mask, "position_ids": numbers} if padded else {}
        output = model(input_ids=new, past_key_values=cache, use_cache=True, **where, **options)
        chosen = output.logits[:, -1].float().argmax(-1)
        alive = [
            (row, token)
            for row, token in zip(running, chosen.tolist(), strict=True)
            if row not in ended
        ]
        for row, token in alive:
            answers[row].append(token)
            if token in ends or len(answers[row]) == most:
                ended.add(row)
        if until is not None:
            asked = [row for row, _ in alive if row not in ended]
            texts = _texts(loaded, [answers[row] for row in asked])
            ended |= {row for row, text in zip(asked, texts, strict=True) if until(text)}
        if len(ended) == len(answers):
            return answers
        kept = [place for place, row in enumerate(running) if row not in ended]
        if (len(running) - len(kept)) * _DROP >= len(running) and _can_drop(cache):
            places = torch.tensor(kept, device=ids.device)
            cache.batch_select_indices(places)
            chosen, mask, numbers = chosen[places], mask[places], numbers[places]
            running = [running[place] for place in kept]
        new = chosen[:, None]
        mask = torch.cat((mask, mask.new_ones(len(running), 1)), dim=1)
        numbers = numbers[:, -1:] + 1


def _can_drop(cache: Any) -> bool:
    """Whether rows can leave a cache: not where the layers hold more than keys and values."""
    return all(
        isinstance(layer, (CommVQLayer, DynamicLayer)) and not isinstance(layer, QuantizedLayer)
        for layer in cache.layers
    )


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _takes_logits_to_keep(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _texts(loaded: LoadedModel, rows: list[list[int]]) -> list[str]:
    texts = loaded.tokenizer.batch_decode(rows, skip_special_tokens=True) if rows else []
    return [str(text) for text in texts]


def _left_padded(
    prompts: Sequence[Prompt], pad: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [batch, tokens]."""
    rows = [[*prompt.context, *prompt.question] for prompt in prompts]
    length = max(map(len, rows))
    missing = [length - len(row) for row in rows]
    # A tokenizer without any token to pad with never pads: its rows are then single ones.
    ids = [[pad or 0] * gap + row for gap, row in zip(missing, rows, strict=True)]
    mask = [[0] * gap + [1] * (length - gap) for gap in missing]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
