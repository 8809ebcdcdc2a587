"""Generate text with any cache, and what that needs: chat templates and greedy decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from commvq_core.errors import InputError

if TYPE_CHECKING:
    from commvq_core.models import AttentionSpec, LoadedModel


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how a conversation is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_text(tokenizer: Any, message: str) -> str:
    """One user message in the tokenizer's chat template, ready for the assistant's turn."""
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
    )


def next_turn(tokenizer: Any, message: str, ended: bool) -> str:
    """What a conversation goes on with: the end of the answer before, then one user message.

    `ended`: the answer's closing token is there already. Where the chat template can't be taken
    apart, the message alone in the template.
    """
    mark = "\N{SECTION SIGN}"
    talk = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
    text = str(
        tokenizer.apply_chat_template(
            [*talk, {"role": "user", "content": message}],
            tokenize=False,
            add_generation_prompt=True,
        )
    )
    parts = text.split(mark, 2)
    if len(parts) < 3:
        return chat_text(tokenizer, message)
    end = tokenizer.eos_token or ""
    return parts[2].removeprefix(end) if ended else parts[2]


def greedy(tokenizer: Any) -> dict[str, Any]:
    """Arguments of generate() for greedy decoding, whatever the checkpoint's own settings say."""
    pad = tokenizer.pad_token_id
    return {
        "do_sample": False,
        "num_beams": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "pad_token_id": tokenizer.eos_token_id if pad is None else pad,
    }


def longest_context(loaded: LoadedModel) -> int | None:
    """How many tokens a model was made for, as its configuration says; None where it does not."""
    config = loaded.model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def check_context(loaded: LoadedModel, tokens: int, mend: str) -> None:
    """Raise InputError when a model was not made for contexts of `tokens`."""
    most = longest_context(loaded)
    if most is not None and tokens > most:
        raise InputError(
            f"{loaded.source} takes at most {most:,} tokens and {tokens:,} are needed", mend
        )


def half_precision_bytes(spec: AttentionSpec, tokens: int) -> int:
    """Bytes of a 16-bit cache of `tokens` tokens, one sequence."""
    return sum(
        2 * 2 * layer.kv_heads * layer.head_dim * min(tokens, layer.sliding_window or tokens)
        for layer in spec.layers
    )


def generate_text(
    loaded: LoadedModel,
    cache: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    use_template: bool = True,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue `prompt` greedily on `cache`; what `commvq generate --json` prints.

    The prompt is one user message where the tokenizer has a chat template, unless `use_template` is
    False. A cache that was loaded with its `token_ids` goes on: the prompt is the next turn, and
    may be empty. `on_text` gets the new text piece by piece. Leaves the whole sequence at
    `cache.token_ids`. Raises InputError for an empty prompt or one that is longer than the model's
    context.
    """
    before = getattr(cache, "token_ids", None)
    if not prompt.strip() and before is None:
        raise InputError("the prompt is empty", "give some text to --prompt or --prompt-file")
    tokenizer = loaded.tokenizer
    templated = use_template and has_chat_template(tokenizer)
    if before is None:
        text = chat_text(tokenizer, prompt) if templated else prompt
        tokens = tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"]
    else:
        ended = int(before[0, -1]) == tokenizer.eos_token_id
        text = next_turn(tokenizer, prompt, ended) if templated and prompt else prompt
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = before[0].tolist() + list(tokens)
    ids = torch.tensor([tokens], device=loaded.model.device)
    check_context(
        loaded, ids.shape[1] + max_new_tokens, "shorten the prompt or lower --max-new-tokens"
    )
    began = time.monotonic()
    with torch.inference_mode():
        output = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            streamer=None if on_text is None else _streamer(tokenizer, on_text),
            **greedy(tokenizer),
        )
    seconds = time.monotonic() - began
    cache.token_ids = output
    new = output[0, ids.shape[1] :]
    return {
        "prompt_tokens": int(ids.shape[1]),
        "new_tokens": len(new),
        "chat_template": templated,
        "text": str(tokenizer.decode(new, skip_special_tokens=True)),
        "seconds": round(seconds, 3),
        "cache_tokens": int(cache.get_seq_length()),
        "cache_bytes": int(cache.nbytes),
        "fp16_cache_bytes": half_precision_bytes(loaded.spec, int(cache.get_seq_length())),
        "bits_per_element": float(cache.bits_per_element),
    }


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
