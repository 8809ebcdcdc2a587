"""What a generator of RULER's tasks works with, and what it hands over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from commvq_core.evaluation.haystack import Haystack

if TYPE_CHECKING:
    from commvq_core.evaluation.tasks.ruler.questions import QuestionSet
    from commvq_core.models import LoadedModel


@dataclass(frozen=True)
class Draft:
    """An example before its context is filled.

    `introduction`, the context, `question` and the beginning of the `answer` make the prompt.
    `fill(room)` gives the context's token ids, at most `room` of them; it needs `least`.
    `any_will_do`: one of `expected` is enough (questions); else all of them are asked for.
    """

    introduction: str
    question: str
    answer: str
    expected: tuple[str, ...]
    fill: Callable[[int], list[int]]
    least: int
    any_will_do: bool = False


@dataclass(frozen=True)
class Kit:
    """The tokenizer, the texts to hide things in, and the questions that a folder brought."""

    loaded: LoadedModel
    essay: Haystack | None
    noise: Haystack
    questions: dict[str, QuestionSet] = field(default_factory=dict)
    _known: dict[str, list[int]] = field(default_factory=dict)

    def ids(self, text: str) -> list[int]:
        """The tokens of a piece of text, nothing added. The same words come again and again."""
        if text not in self._known:
            tokenizer = self.loaded.tokenizer
            encoded = tokenizer(text, add_special_tokens=False, verbose=False)
            self._known[text] = list(encoded["input_ids"])
        return self._known[text]
