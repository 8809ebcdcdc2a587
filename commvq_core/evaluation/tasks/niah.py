"""Needle in a haystack: sentences hidden in a long text, and asked for.

By default the sentence holds a number (after Kamradt 2023, "Needle In A Haystack", with a needle
that no model knows beforehand); with --needle the user's own sentences, scored by ROUGE.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from commvq_core.errors import InputError
from commvq_core.evaluation.haystack import Haystack
from commvq_core.evaluation.metrics import mean
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.prompts import Prompt, wrap_prompt
from commvq_core.evaluation.scoring.rouge import rouge_1, rouge_l
from commvq_core.evaluation.scoring.words import normalized
from commvq_core.evaluation.tasks.base import Record
from commvq_core.evaluation.tasks.grid import GridExample, GridTask
from commvq_core.evaluation.text import haystack_ids, text_split

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_DIGITS = 5
_MOST_TEXT = 4  # haystacks are drawn from a text of this many times the longest context
_NUMBER_TOKENS = 12  # five digits even where a tokenizer spells them one by one, and some slack
_SLACK = 10  # tokens that an answer may have more than the sentences that were hidden


@dataclass(frozen=True)
class Wording:
    """The words around a text. `needle` holds {number}, and where there are several, {which}."""

    introduction: str
    needle: str
    question: str
    answer: str


# Plain words, said the same way three times: a 135M model then finds it wherever it is.
_ONE = Wording(
    "A special magic number is hidden within the following text. Memorize it. "
    "I will quiz you about it afterwards.\n\n",
    "\nThe special magic number is {number}.\n",
    "\n\nWhat is the special magic number mentioned in the text above?",
    "The special magic number is",
)
_SEVERAL = Wording(
    "Some special magic numbers are hidden within the following text. Memorize them. "
    "I will quiz you about them afterwards.\n\n",
    "\nSpecial magic number {which} is {number}.\n",
    "\n\nWhat are the special magic numbers mentioned in the text above?",
    "The special magic numbers are",
)
_SENTENCES = (
    "Some sentences hidden within the following text have nothing to do with it. Memorize them. "
    "I will quiz you about them afterwards.\n\n"
)


class Needle(GridTask):
    """Accuracy of finding what is hidden in a text. Prompts have exactly the length asked for.

    One needle is at the depth; of several, the first is, and the others follow evenly spaced from
    there to the end. The score of an example is the share that was found.
    """

    name = "niah"
    unit = "needles"
    uses = GridTask.uses | {"datasets", "needles", "needle", "question"}

    def __init__(self, options: EvalOptions) -> None:
        super().__init__(options)
        if options.needle is not None and options.needles is not None:
            raise InputError(
                "--needle and --needles both say what is hidden", "repeat --needle, or give one"
            )
        if (options.needle is None) != (options.question is None):
            raise InputError(
                "--needle and --question belong together",
                "give the sentence to hide, and the question that it answers",
            )
        self._sentences = tuple(text.strip() for text in options.needle or ())
        self._count = len(self._sentences) or options.needles or 1
        self._wording = self.wording()
        self._frame = Prompt([], [], False)
        self._hay: Haystack | None = None
        self._sources: list[dict[str, Any]] = []
        self._sentence_tokens = 0

    def wording(self) -> Wording:
        """The words of this task."""
        if self._sentences:
            return Wording(_SENTENCES, "\n{number}\n", f"\n\n{self._options.question}", "")
        return _ONE if self._count == 1 else _SEVERAL

    def read_text(self, loaded: LoadedModel, longest: int) -> Haystack:
        """The text to hide sentences in."""
        ids, self._sources = haystack_ids(loaded, self._options, tokens=_MOST_TEXT * longest)
        return Haystack(loaded, ids)

    def begin(self, loaded: LoadedModel, longest: int) -> None:
        """See GridTask."""
        self._hay = self.read_text(loaded, longest)
        words = self._wording
        self._frame = wrap_prompt(
            loaded, words.introduction, words.question, words.answer, chat=self._options.chat
        )
        self._sentence_tokens = sum(
            len(needle) for needle in self._needles(loaded, self._sentences)
        )

    @property
    def new_tokens(self) -> int:
        """See GridTask."""
        if self._sentences:
            return self._sentence_tokens + _SLACK
        return _NUMBER_TOKENS * self._count

    def start(self, hay: Haystack, source: random.Random) -> int:
        """Which token of the text an example begins with."""
        return source.randrange(len(hay))

    def example(
        self, loaded: LoadedModel, length: int, depth: float, source: random.Random
    ) -> GridExample:
        """Exactly `length` tokens: the frame, a slice of the text, the needles at line ends."""
        frame, hay = self._frame, self._hay
        assert hay is not None
        hidden = self._sentences or _numbers(source, self._count)
        needles = self._needles(loaded, hidden)
        text = length - len(frame.context) - len(frame.question) - sum(map(len, needles))
        if text < 1:
            raise InputError(
                f"a context of {length:,} tokens has no room for the needle and the question",
                f"give lengths of at least {length - text + 1:,} tokens",
            )
        depths = [depth + which * (100 - depth) / len(needles) for which in range(len(needles))]
        start = self.start(hay, source)
        context = [*frame.context, *hay.hide(needles, depths, start=start, text=text)]
        prompt = Prompt(context, frame.question, frame.templated)
        return GridExample(length, depth, (" " if self._sentences else ", ").join(hidden), prompt)

    def _needles(self, loaded: LoadedModel, hidden: Sequence[str]) -> list[list[int]]:
        texts = [
            self._wording.needle.format(number=number, which=which)
            for which, number in enumerate(hidden, start=1)
        ]
        tokenizer = loaded.tokenizer
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    def grade(self, example: GridExample, answer: str) -> Record:
        """See GridTask; of sentences also ROUGE-1 and ROUGE-L."""
        if self._sentences:
            said = normalized(answer)
            return {
                "correct": mean(float(normalized(one) in said) for one in self._sentences),
                "rouge_1": rouge_1(answer, example.number),
                "rouge_l": rouge_l(answer, example.number),
            }
        if self._count == 1:
            return super().grade(example, answer)
        numbers = set(re.findall(r"\d+", answer))
        return {"correct": mean(float(one in numbers) for one in example.number.split(", "))}

    def metrics(self, records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
        """See GridTask; of sentences also `rouge_1`, `rouge_l` and a grid of each."""
        found = super().metrics(records, baseline)
        for name in ("rouge_1", "rouge_l") if self._sentences else ():
            found[name] = mean(record[name] for record in records)
            found[f"grid_{name}"] = self.grid_of(records, name)
        return found

    def texts(self) -> dict[str, Any]:
        """See GridTask."""
        several = {"needles": self._count} if self._count > 1 else {}
        needle = "\n".join(self._sentences) or self._wording.needle.strip()
        return {
            "split": text_split(self._options),
            "sources": self._sources,
            **several,
            "needle": needle,
            "question": self._wording.question.strip(),
            "answer_prefix": self._wording.answer,
            "chat_template": self._frame.templated,
        }


def _numbers(source: random.Random, count: int) -> list[str]:
    """Different random numbers."""
    numbers: dict[str, None] = {}
    while len(numbers) < count:
        numbers[str(source.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))] = None
    return list(numbers)
