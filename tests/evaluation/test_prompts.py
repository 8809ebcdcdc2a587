"""Prompts: one text in two parts, cut in the middle, and answered until there is enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from commvq_core.errors import InputError
from commvq_core.evaluation.prompts import (
    text_prompt,
    use_template,
    wrap_prompt,
)
from commvq_core.models import LoadedModel, load_model

TEXT = "Read this.\n" + " ".join(f"word{number}" for number in range(200)) + "\n"
QUESTION = "\nWhat was it?\nAnswer:"
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} [end]"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chatty(loaded: LoadedModel, tiny_model_dir: object) -> LoadedModel:
    """The model with a tokenizer of its own that has a chat template."""
    twin = replace(load_model(str(tiny_model_dir), device="cpu"))
    twin.tokenizer.chat_template = TEMPLATE
    return twin


def test_a_prompt_that_fits_is_the_whole_text(loaded: LoadedModel) -> None:
    prompt = text_prompt(loaded, TEXT, QUESTION, templated=False, room=None)
    whole = loaded.tokenizer(TEXT + QUESTION)["input_ids"]
    assert prompt.context + prompt.question == whole
    assert not prompt.truncated
    assert prompt.full_length == len(whole)
    assert text_prompt(loaded, TEXT, QUESTION, templated=False, room=len(whole)) == prompt


def test_the_question_begins_where_the_texts_meet(loaded: LoadedModel) -> None:
    prompt = text_prompt(loaded, TEXT, QUESTION, templated=False, room=None)
    ends = loaded.tokenizer.decode(prompt.question)
    # A token across the border belongs to the question, and none does here but perhaps a newline.
    assert ends.lstrip("\n") == QUESTION.lstrip("\n")


def test_the_end_of_a_long_context_decides_where_the_question_begins(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from commvq_core.evaluation import prompts

    whole = text_prompt(loaded, TEXT, QUESTION, templated=False, room=None)
    for near in (1, 5, 20, 100):
        monkeypatch.setattr(prompts, "_NEAR", near)
        for context in (TEXT, TEXT.strip(), TEXT + "\n\n "):
            prompt = text_prompt(loaded, context, QUESTION, templated=False, room=None)
            assert (
                prompt.context + prompt.question
                == loaded.tokenizer(context + QUESTION)["input_ids"]
            )
            assert abs(len(prompt.question) - len(whole.question)) <= 2


def test_a_tokenizer_that_looks_far_back_is_asked_about_the_whole_context() -> None:
    class Tokenizer:
        """Letters are tokens, and their numbers depend on how many there are in all."""

        bos_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(text)] if len(text) % 2 else [ord(one) for one in text]}

    double: Any = type("Loaded", (), {"tokenizer": Tokenizer()})()
    prompt = text_prompt(double, "ab" * 2001, "cd", templated=False, room=None)
    assert prompt.question == [ord("c"), ord("d")]
    prompt = text_prompt(double, "ab" * 2001, "c", templated=False, room=None)
    assert (prompt.context, prompt.question) == ([], [4003])


@pytest.mark.parametrize("room", [100, 101, 250])
def test_the_middle_is_cut_and_both_halves_stay(loaded: LoadedModel, room: int) -> None:
    whole = text_prompt(loaded, TEXT, QUESTION, templated=False, room=None)
    ids = whole.context + whole.question
    prompt = text_prompt(loaded, TEXT, QUESTION, templated=False, room=room)
    got = prompt.context + prompt.question
    assert len(got) == room
    assert prompt.truncated
    assert prompt.full_length == len(ids)
    head = room // 2
    assert got == ids[:head] + ids[len(ids) - (room - head) :]
    assert prompt.question == whole.question


def test_a_long_question_is_never_cut(loaded: LoadedModel) -> None:
    whole = text_prompt(loaded, TEXT, QUESTION * 4, templated=False, room=None)
    room = len(whole.question) + 5
    prompt = text_prompt(loaded, TEXT, QUESTION * 4, templated=False, room=room)
    assert prompt.question == whole.question
    assert prompt.context == whole.context[:5]
    with pytest.raises(InputError, match="no room for a question of"):
        text_prompt(loaded, TEXT, QUESTION * 4, templated=False, room=room - 5)


def test_a_chat_template_frames_the_text_and_survives_the_cut(chatty: LoadedModel) -> None:
    prompt = text_prompt(chatty, TEXT, QUESTION, templated=True, room=90)
    text = chatty.tokenizer.decode(prompt.context + prompt.question)
    assert text.startswith("[user] Read this.")
    assert text.endswith("Answer: [end][assistant]")
    assert chatty.tokenizer.decode(prompt.question).endswith("Answer: [end][assistant]")
    assert prompt.templated


def test_a_chat_template_is_used_as_asked(loaded: LoadedModel, chatty: LoadedModel) -> None:
    assert use_template(chatty, None)
    assert not use_template(chatty, None, default=False)
    assert use_template(chatty, True, default=False)
    assert not use_template(chatty, False)
    assert not use_template(loaded, None)
    with pytest.raises(InputError, match="no chat template: give --no-chat"):
        use_template(loaded, True)
    assert wrap_prompt(chatty, "Read.", "Who?", "It was").templated
    assert not wrap_prompt(chatty, "Read.", "Who?", "It was", chat=False).templated
