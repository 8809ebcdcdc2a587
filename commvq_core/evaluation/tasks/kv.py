"""Key-value retrieval: many sentences of the same form, and one of their numbers is asked for.

The hardest thing for coarse keys: unlike a needle in a text, the right sentence differs from
hundreds of others by two words alone (the paper's retrieval at 1 bit falls from 55 % to 0).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from commvq_core.errors import InputError
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.prompts import Prompt, wrap_prompt
from commvq_core.evaluation.tasks.grid import GridExample, GridTask

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_INTRODUCTION = (
    "Some facts are listed below. Memorize them. I will quiz you about one of them afterwards.\n\n"
)
_FACT = "The number of the {key} is {number}.\n"
_QUESTION = "\n\nWhat is the number of the {key}?"
_ANSWER = "The number of the {key} is"
_DIGITS = 3
_FIRST = (
    *("amber", "brave", "calm", "daring", "eager", "fancy", "gentle", "happy", "icy", "jolly"),
    *("kind", "lively", "merry", "noble", "odd", "proud", "quick", "royal", "shy", "tidy"),
    *("urban", "vivid", "warm", "young", "zesty", "bold", "crisp", "dusty", "early", "flat"),
)
_SECOND = (
    *("apple", "bridge", "candle", "desk", "eagle", "forest", "garden", "hammer", "island"),
    *("jacket", "kettle", "ladder", "mirror", "needle", "orange", "pencil", "quilt", "river"),
    *("saddle", "table", "umbrella", "valley", "window", "yard", "zebra", "anchor", "basket"),
    *("castle", "drum", "engine"),
)


class KeyValue(GridTask):
    """Accuracy of finding one fact among as many of its form as the length has room for."""

    name = "kv"
    unit = "questions"
    repeats = 3

    def __init__(self, options: EvalOptions) -> None:
        super().__init__(options)
        self._templated = False

    def begin(self, loaded: LoadedModel, longest: int) -> None:
        """See GridTask: the facts are made up, so nothing is read."""

    def example(
        self, loaded: LoadedModel, length: int, depth: float, source: random.Random
    ) -> GridExample:
        """At most `length` tokens, less than a sentence short of it (or all keys there are)."""
        keys = [f"{first} {second}" for first in _FIRST for second in _SECOND]
        source.shuffle(keys)
        numbers = [str(source.randrange(10 ** (_DIGITS - 1), 10**_DIGITS)) for _ in keys]
        # The longest of all frames, so that whichever key is asked for fits.
        words = max(keys, key=len)
        frame = wrap_prompt(
            loaded,
            _INTRODUCTION,
            _QUESTION.format(key=words),
            _ANSWER.format(key=words),
            chat=self._options.chat,
        )
        room = length - len(frame.context) - len(frame.question) - 2
        facts: list[list[int]] = []
        for key, number in zip(keys, numbers, strict=True):
            text = _FACT.format(key=key, number=number)
            ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) > room:
                break
            room -= len(ids)
            facts.append(ids)
        if len(facts) < 2:
            raise InputError(
                f"a context of {length:,} tokens has no room for two facts and the question",
                f"give lengths of at least {length - room + 100:,} tokens",
            )
        asked = min(len(facts) - 1, round((len(facts) - 1) * depth / 100))
        key = keys[asked]
        frame = wrap_prompt(
            loaded,
            _INTRODUCTION,
            _QUESTION.format(key=key),
            _ANSWER.format(key=key),
            chat=self._options.chat,
        )
        self._templated = frame.templated
        context = [*frame.context, *(token for fact in facts for token in fact)]
        prompt = Prompt(context, frame.question, frame.templated)
        return GridExample(length, depth, numbers[asked], prompt)

    def texts(self) -> dict[str, Any]:
        """See GridTask."""
        return {
            "fact": _FACT.strip(),
            "question": _QUESTION.strip(),
            "answer_prefix": _ANSWER,
            "chat_template": self._templated,
        }
