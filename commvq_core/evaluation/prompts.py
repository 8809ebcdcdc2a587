"""Prompts in two parts: a long context, and a question that comes after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from commvq_core.errors import InputError
from commvq_core.generation import chat_text, has_chat_template

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_NEAR = 2000  # characters of a context that decide where its last tokens begin
_MARK = "<<<commvq-context>>>"  # stands for the context while a chat template is applied


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt: `context` first, `question` after it.

    `templated` tells whether they follow the tokenizer's chat template.
    """

    context: list[int]
    question: list[int]
    templated: bool


@dataclass(frozen=True)
class TextPrompt(Prompt):
    """A prompt made of a text of `full_length` tokens; it has fewer where the middle was cut."""

    full_length: int

    @property
    def truncated(self) -> bool:
        """Whether the middle was left out."""
        return len(self.context) + len(self.question) < self.full_length


def use_template(loaded: LoadedModel, chat: bool | None, default: bool = True) -> bool:
    """Whether prompts follow the chat template: `chat` of the options, else `default`.

    A tokenizer without a template gives plain prompts, but raises InputError where `chat` is True.
    """
    has_one = has_chat_template(loaded.tokenizer)
    if chat and not has_one:
        raise InputError(f"the tokenizer of {loaded.source} has no chat template", "give --no-chat")
    return has_one and (default if chat is None else chat)


def wrap_prompt(
    loaded: LoadedModel, introduction: str, question: str, answer: str, *, chat: bool | None = None
) -> Prompt:
    """The frame around a context that is inserted later, at the end of `Prompt.context`.

    Uses the chat template as `use_template` says: one user turn with introduction, context and
    question, and an assistant turn that begins with `answer`.
    """
    tokenizer: Any = loaded.tokenizer
    templated = use_template(loaded, chat)
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


def text_prompt(
    loaded: LoadedModel,
    context: str,
    question: str,
    *,
    answer: str = "",
    templated: bool,
    room: int | None,
) -> TextPrompt:
    """A prompt of given text: the token ids of `context` + `question`, tokenized as one text.

    `context` is what is cached before `question` comes, instructions included. `templated` puts
    both into one user turn of the chat template; `answer` begins the reply, the assistant's turn
    then. With more than `room` tokens, the middle is left out: as many are kept of the beginning as
    of the end (one more there when `room` is odd), but all from the question on always. Raises
    InputError when that alone fills the room.
    """
    tokenizer: Any = loaded.tokenizer
    if templated:
        before, _, after = chat_text(tokenizer, _MARK).partition(_MARK)
        context, question = before + context, question + after + answer
        ids = _plain(tokenizer, context + question)
    else:
        question += answer
        ids = _with_start(tokenizer, context + question)
    full, tail = len(ids), _question_tokens(tokenizer, ids, context, question)
    if room is not None and full > room:
        if room < tail + 1:
            raise InputError(
                f"{room:,} tokens have no room for a question of {tail:,} and a context",
                "give a larger --max-length",
            )
        end = max(room - room // 2, tail)
        ids = [*ids[: room - end], *ids[full - end :]]
    return TextPrompt(ids[: len(ids) - tail], ids[len(ids) - tail :], templated, full)


def _plain(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: texts longer than the model's context are cut afterwards.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _question_tokens(tokenizer: Any, ids: list[int], context: str, question: str) -> int:
    """How many of `ids`, the tokens of both texts, are the question's.

    A token that spans both is one of them. Only the end of a long context is tokenized for it, and
    all of it where that turns out to make other tokens.
    """
    for before in (context[-_NEAR:], context):
        both = _plain(tokenizer, before + question)
        tail = len(both) - _common(both, _plain(tokenizer, before))
        if ids[len(ids) - tail - 1 :] == both[len(both) - tail - 1 :]:
            break
    return tail


def _common(first: list[int], second: list[int]) -> int:
    """How many ids two sequences share at their beginnings."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def _with_start(tokenizer: Any, text: str) -> list[int]:
    ids = _plain(tokenizer, text)
    start = tokenizer.bos_token_id
    begins = tokenizer("a")["input_ids"][:1] == [start]
    return [start, *ids] if begins and ids[:1] != [start] else ids
