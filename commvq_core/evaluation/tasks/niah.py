"""Needle in a haystack: one sentence with a number, hidden in a long text, and asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from commvq_core.errors import InputError
from commvq_core.evaluation.metrics import first_number, mean
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.prompts import Prompt, generate_after_context, wrap_prompt
from commvq_core.evaluation.tasks.base import Record, Task
from commvq_core.evaluation.text import haystack_ids, sha256_of_ids, text_split
from commvq_core.generation import check_context

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
_NEW_TOKENS = 12  # five digits even where a tokenizer spells them one by one, and some slack
_LENGTH = 2048
_DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
_NEAR = 64  # tokens that a depth may move to reach a line end
_MOST_TEXT = 4  # haystacks are drawn from a text of this many times the longest context


@dataclass(frozen=True)
class NeedleExample:
    """One cell of the grid, once. `prompt` has exactly `length` tokens."""

    length: int
    depth: float
    number: str
    prompt: Prompt


class Needle(Task):
    """Accuracy of finding one number over a grid of context lengths and depths.

    The context (text and needle) is run first and the question after it, so that the question sees
    the context as the cache stores it, codes and all, as in a second turn of a conversation.
    """

    name = "niah"
    unit = "needles"

    def __init__(self, options: EvalOptions) -> None:
        if options.lengths is not None and options.max_length is not None:
            raise InputError(
                "--lengths and --max-length both say how long contexts are", "give one of the two"
            )
        longest = options.max_length or _LENGTH
        self._options = options
        self._lengths = options.lengths or (max(1, longest // 2), longest)
        self._depths = options.depths or _DEPTHS
        self._repeats = options.limit or 1
        self._templated = False
        self._sources: list[dict[str, Any]] = []
        self._examples: list[NeedleExample] = []

    def prepare(self, loaded: LoadedModel) -> Sequence[NeedleExample]:
        """The grid, length by length. Raises InputError for contexts too short for the prompt."""
        longest = max(self._lengths)
        check_context(loaded, longest + _NEW_TOKENS, "give a smaller --max-length or --lengths")
        hay, self._sources = haystack_ids(loaded, self._options, tokens=_MOST_TEXT * longest)
        newlines = _line_ends(loaded, hay)
        frame = wrap_prompt(loaded, _INTRODUCTION, _QUESTION, _ANSWER)
        self._templated = frame.templated
        self._examples = [
            self._example(loaded, frame, hay, newlines, length, depth, repeat)
            for length in self._lengths
            for depth in self._depths
            for repeat in range(self._repeats)
        ]
        return self._examples

    def _example(
        self,
        loaded: LoadedModel,
        frame: Prompt,
        hay: list[int],
        newlines: set[int],
        length: int,
        depth: float,
        repeat: int,
    ) -> NeedleExample:
        """Exactly `length` tokens: the frame, a slice of the text, the needle at a line end."""
        source = random.Random(f"{self._options.seed}/{length}/{depth}/{repeat}")
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
        cut = next((at for at in near if (start + at - 1) % len(hay) in newlines), cut)
        context = [*frame.context, *text[:cut], *needle["input_ids"], *text[cut:]]
        prompt = Prompt(context, frame.question, frame.templated)
        return NeedleExample(length, depth, number, prompt)

    def settings(self) -> dict[str, Any]:
        """See Task."""
        return {
            "lengths": list(self._lengths),
            "depths": list(self._depths),
            "limit": self._repeats,
            "seed": self._options.seed,
            "split": text_split(self._options),
            "sources": self._sources,
            "needle": _NEEDLE.strip(),
            "question": _QUESTION.strip(),
            "answer_prefix": _ANSWER,
            "chat_template": self._templated,
            "question_after_context": True,
            "max_new_tokens": _NEW_TOKENS,
            "examples_sha256": sha256_of_ids(
                example.prompt.context + example.prompt.question for example in self._examples
            ),
        }

    def run(self, loaded: LoadedModel, cache: Any, example: NeedleExample) -> Record:
        """Ask for the needle; greedy decoding."""
        with torch.inference_mode():
            answer = generate_after_context(loaded, cache, example.prompt, _NEW_TOKENS)
        return {
            "length": example.length,
            "depth": example.depth,
            "expected": example.number,
            "answer": answer.strip(),
            "correct": first_number(answer) == example.number,
            "context": example.length,
        }

    def metrics(self, records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
        """`accuracy`, `grid` [length][depth], and `kept`: of what fp16 found, the share found."""
        kept = [
            float(record["correct"])
            for record, reference in zip(records, baseline, strict=True)
            if reference["correct"]
        ]
        grid = {
            str(length): {
                f"{depth:g}": mean(
                    float(record["correct"])
                    for record in records
                    if (record["length"], record["depth"]) == (length, depth)
                )
                for depth in self._depths
            }
            for length in self._lengths
        }
        return {
            "accuracy": mean(float(record["correct"]) for record in records),
            "kept": mean(kept) if kept else None,
            "grid": grid,
        }


def _line_ends(loaded: LoadedModel, ids: Sequence[int]) -> set[int]:
    """Where in `ids` a token ends a line, so that the needle stands between two lines."""
    breaks = {token for token in set(ids) if loaded.tokenizer.decode([token]).endswith("\n")}
    return {index for index, token in enumerate(ids) if token in breaks}
