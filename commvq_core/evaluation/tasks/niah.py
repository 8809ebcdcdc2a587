"""Needle in a haystack: one sentence with a number, hidden in a long text, and asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from commvq_core.errors import InputError
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.prompts import Prompt, wrap_prompt
from commvq_core.evaluation.tasks.grid import GridExample, GridTask
from commvq_core.evaluation.text import haystack_ids, text_split

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

# Plain words, said the same way three times: a 135M model then finds it wherever it is.
_INTRODUCTION = (
    "A special magic number is hidden within the following text. Memorize it. "
    "I will quiz you about it afterwards.\n\n"
)
_NEEDLE = "\nThe special magic number is {number}.\n"
_QUESTION = "\n\nWhat is the special magic number mentioned in the text above?"
_ANSWER = "The special magic number is"
_DIGITS = 5
_NEAR = 64  # tokens that a depth may move to reach a line end
_MOST_TEXT = 4  # haystacks are drawn from a text of this many times the longest context


class Needle(GridTask):
    """Accuracy of finding one number in a long text. Prompts have exactly the length asked for."""

    name = "niah"
    unit = "needles"

    def __init__(self, options: EvalOptions) -> None:
        super().__init__(options)
        self._frame = Prompt([], [], False)
        self._hay: list[int] = []
        self._newlines: set[int] = set()
        self._sources: list[dict[str, Any]] = []

    def begin(self, loaded: LoadedModel, longest: int) -> None:
        """See GridTask."""
        self._hay, self._sources = haystack_ids(loaded, self._options, tokens=_MOST_TEXT * longest)
        self._newlines = _line_ends(loaded, self._hay)
        self._frame = wrap_prompt(
            loaded, _INTRODUCTION, _QUESTION, _ANSWER, chat=self._options.chat
        )

    def example(
        self, loaded: LoadedModel, length: int, depth: float, source: random.Random
    ) -> GridExample:
        """Exactly `length` tokens: the frame, a slice of the text, the needle at a line end."""
        frame, hay = self._frame, self._hay
        number = str(source.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))
        needle = loaded.tokenizer(_NEEDLE.format(number=number), add_special_tokens=False)
        room = length - len(frame.context) - len(frame.question) - len(needle["input_ids"])
        if room < 1:
            raise InputError(
                f"a context of {length:,} tokens has no room for the needle and the question",
                f"give lengths of at least {length - room + 1:,} tokens",
            )
        start = source.randrange(len(hay))
        # A text shorter than the context goes round.
        text = [hay[(start + offset) % len(hay)] for offset in range(room)]
        cut = round(room * depth / 100)
        # A line end close by, or in the middle of a line where there is none.
        near = range(cut, max(0, cut - _NEAR), -1) if cut < room else ()
        cut = next((at for at in near if (start + at - 1) % len(hay) in self._newlines), cut)
        context = [*frame.context, *text[:cut], *needle["input_ids"], *text[cut:]]
        prompt = Prompt(context, frame.question, frame.templated)
        return GridExample(length, depth, number, prompt)

    def texts(self) -> dict[str, Any]:
        """See GridTask."""
        return {
            "split": text_split(self._options),
            "sources": self._sources,
            "needle": _NEEDLE.strip(),
            "question": _QUESTION.strip(),
            "answer_prefix": _ANSWER,
            "chat_template": self._frame.templated,
        }


def _line_ends(loaded: LoadedModel, ids: Sequence[int]) -> set[int]:
    """Where in `ids` a token ends a line, so that the needle stands between two lines."""
    breaks = {token for token in set(ids) if loaded.tokenizer.decode([token]).endswith("\n")}
    return {index for index, token in enumerate(ids) if token in breaks}
