"""What tasks share that ask for a number in a context, over a grid of lengths and depths."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from commvq_core.errors import InputError
from commvq_core.evaluation.answers import generate_after_context
from commvq_core.evaluation.metrics import first_number, mean
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.prompts import Prompt
from commvq_core.evaluation.tasks.base import Record, Task
from commvq_core.evaluation.text import sha256_of_ids
from commvq_core.generation import check_context

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_LENGTH = 2048
_DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
_NEW_TOKENS = 12  # five digits even where a tokenizer spells them one by one, and some slack


@dataclass(frozen=True)
class GridExample:
    """One cell of the grid, once. `number` is the answer; `length` the tokens of the prompt.

    Of several numbers, `number` lists them all.
    """

    length: int
    depth: float
    number: str
    prompt: Prompt


class GridTask(Task):
    """Accuracy of finding a number, by context length and by how deep in the context it is.

    The context is run first and the question after it, so that the question sees the context as the
    cache stores it, codes and all, as in a second turn of a conversation.
    """

    uses = frozenset({"lengths", "depths", "chat"})
    has_grid = True
    repeats: ClassVar[int] = 1  # examples a cell without --limit

    def __init__(self, options: EvalOptions) -> None:
        if options.lengths is not None and options.max_length is not None:
            raise InputError(
                "--lengths and --max-length both say how long contexts are", "give one of the two"
            )
        longest = options.max_length or _LENGTH
        self._options = options
        self._lengths = options.lengths or (max(1, longest // 2), longest)
        self._depths = options.depths or _DEPTHS
        self._repeats = options.limit or self.repeats
        self._examples: list[GridExample] = []

    @abstractmethod
    def begin(self, loaded: LoadedModel, longest: int) -> None:
        """Read what all examples need. Raises InputError."""

    @abstractmethod
    def example(
        self, loaded: LoadedModel, length: int, depth: float, source: random.Random
    ) -> GridExample:
        """One example of at most `length` tokens. Raises InputError when that is too short."""

    @property
    def new_tokens(self) -> int:
        """Tokens generated, after `begin`."""
        return _NEW_TOKENS

    def grade(self, example: GridExample, answer: str) -> Record:
        """What an answer is worth: `correct`, true or false, or the share that is."""
        return {"correct": first_number(answer) == example.number}

    @abstractmethod
    def texts(self) -> dict[str, Any]:
        """What of the settings is the task's own: its words and sources."""

    def prepare(self, loaded: LoadedModel) -> Sequence[GridExample]:
        """The grid, length by length. Raises InputError for contexts too short for the prompt."""
        longest = max(self._lengths)
        self.begin(loaded, longest)
        check_context(loaded, longest + self.new_tokens, "give a smaller --max-length or --lengths")
        seed = self._options.seed
        self._examples = [
            self.example(loaded, length, depth, random.Random(f"{seed}/{length}/{depth}/{repeat}"))
            for length in self._lengths
            for depth in self._depths
            for repeat in range(self._repeats)
        ]
        return self._examples

    def settings(self) -> dict[str, Any]:
        """See Task."""
        return {
            "lengths": list(self._lengths),
            "depths": list(self._depths),
            "limit": self._repeats,
            "seed": self._options.seed,
            **self.texts(),
            "question_after_context": True,
            "max_new_tokens": self.new_tokens,
            "examples_sha256": sha256_of_ids(
                example.prompt.context + example.prompt.question for example in self._examples
            ),
        }

    def run(self, loaded: LoadedModel, cache: Any, example: GridExample) -> Record:
        """Ask for the number; greedy decoding."""
        with torch.inference_mode():
            answer = generate_after_context(
                loaded, cache, example.prompt, self.new_tokens, beginnings=self.beginnings
            )
        return {
            "length": example.length,
            "depth": example.depth,
            "expected": example.number,
            "answer": answer.strip(),
            **self.grade(example, answer),
            "context": len(example.prompt.context) + len(example.prompt.question),
        }

    def metrics(self, records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
        """`accuracy`, `grid` [length][depth], and `kept`: of what fp16 found, the share found."""
        pairs = zip(records, baseline, strict=True)
        kept = sum(min(record["correct"], reference["correct"]) for record, reference in pairs)
        found = sum(reference["correct"] for reference in baseline)
        return {
            "accuracy": mean(float(record["correct"]) for record in records),
            "kept": kept / found if found else None,
            "grid": self.grid_of(records, "correct"),
        }

    def grid_of(self, records: Sequence[Record], name: str) -> dict[str, dict[str, float]]:
        """[length][depth] -> the mean of what the records call `name`."""
        return {
            str(length): {
                f"{depth:g}": mean(
                    float(record[name])
                    for record in records
                    if (record["length"], record["depth"]) == (length, depth)
                )
                for depth in self._depths
            }
            for length in self._lengths
        }
