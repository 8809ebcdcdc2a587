"""Prompts in two parts: a long context, and a question that comes after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from commvq_core.generation import chat_text, greedy, has_chat_template

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_MARK = "<<<commvq-context>>>"  # stands for the context while a chat template is applied


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt: `context` first, `question` after it.

    `templated` tells whether they follow the tokenizer's chat template.
    """

    context: list[int]
    question: list[int]
    templated: bool


def wrap_prompt(loaded: LoadedModel, introduction: str, question: str, answer: str) -> Prompt:
    """The frame around a context that is inserted later, at the end of `Prompt.context`.

    Uses the chat template of the tokenizer if it has one: one user turn with introduction, context
    and question, and an assistant turn that begins with `answer`.
    """
    tokenizer: Any = loaded.tokenizer
    templated = has_chat_template(tokenizer)
    if templated:
        text = chat_text(tokenizer, introduction + _MARK + question) + answer
        before, _, after = text.partition(_MARK)
        first = tokenizer(before, add_special_tokens=False)["input_ids"]
    else:
        after = f"{question}\n{answer}"
        # What the tokenizer puts before any text of its own accord (bos) belongs here.
        first = _with_start(tokenizer, introduction)
    last = tokenizer(after, add_special_tokens=False)["input_ids"]
    return Prompt(list(first), list(last), templated)


def _with_start(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id
    begins = tokenizer(text)["input_ids"][:1] == [start]
    return [start, *ids] if begins else list(ids)


def generate_after_context(
    loaded: LoadedModel, cache: Any, prompt: Prompt, max_new_tokens: int
) -> str:
    """Run the context into the empty cache, then the question, and decode greedily.

    Returns the new text, special tokens left out.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.tensor([prompt.context + prompt.question], device=model.device)
    # The decoder alone: nobody needs a logit of the context.
    model.get_decoder()(
        input_ids=ids[:, : len(prompt.context)], past_key_values=cache, use_cache=True
    )
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        **greedy(tokenizer),
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
