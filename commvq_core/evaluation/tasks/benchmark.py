"""What published benchmarks share: parts with rows, prompts of text, and a score an answer."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from commvq_core.errors import InputError
from commvq_core.evaluation.answers import generate_batch, second_part
from commvq_core.evaluation.data import DataSource, Row, find_file
from commvq_core.evaluation.metrics import mean
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.prompts import (
    Prompt,
    TextPrompt,
    text_prompt,
    use_template,
)
from commvq_core.evaluation.tasks.base import Record, Task
from commvq_core.evaluation.text import sha256_of_ids
from commvq_core.generation import check_context, longest_context

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel


@dataclass(frozen=True)
class Part:
    """How one part of a benchmark is run.

    `max_new_tokens` is the benchmark's own, `chat` whether its prompts follow the chat template
    unless the user says otherwise, `first_line` whether an answer ends with its first line.
    """

    max_new_tokens: int
    chat: bool = True
    first_line: bool = False


@dataclass(frozen=True)
class PromptText:
    """A prompt's text: `context` is cached first; `answer` begins the reply."""

    context: str
    question: str
    answer: str = ""


@dataclass(frozen=True)
class BenchmarkExample:
    """One row as tokens. `ids` are packed: a benchmark's prompts are tens of millions of tokens.

    The first `split` of them are the context. `reference` is what the answer is held to, as JSON.
    """

    part: str
    row: int
    ids: array[int]
    split: int
    full_length: int
    max_new_tokens: int
    templated: bool
    reference: dict[str, Any]

    @property
    def prompt(self) -> Prompt:
        """The two parts of the prompt."""
        ids = self.ids.tolist()
        return Prompt(ids[: self.split], ids[self.split :], self.templated)


class BenchmarkTask(Task):
    """Greedy answers to a benchmark's rows, scored by its own rules, in percent.

    The context is run first and the question after it, so that the question and all of the answer
    see the context as the cache stores it, codes and all. Prompts that are longer than --max-length
    less the answer lose their middle.
    """

    uses = frozenset({"subsets", "data_dir", "chat", "batch_size"})
    parts: ClassVar[Mapping[str, Part]]
    groups: ClassVar[Mapping[str, Sequence[str]]]  # "all" among them

    def __init__(self, options: EvalOptions) -> None:
        self._options = options
        self._names = self.choose(options.subsets or ("all",))
        self._max_length: int | None = None
        self._sources: list[dict[str, Any]] = []
        self._examples: list[BenchmarkExample] = []

    def choose(self, wanted: Sequence[str]) -> list[str]:
        """The parts that were named, one by one or as groups, in the benchmark's order."""
        named: set[str] = set()
        for name in wanted:
            if name not in self.parts and name not in self.groups:
                raise InputError(
                    f"{self.name} has no subset {name}",
                    f"give {', '.join(self.groups)}, or of {', '.join(self.parts)}",
                )
            named.update(self.groups.get(name, [name]))
        return [name for name in self.parts if name in named]

    @abstractmethod
    def places(self, name: str) -> Sequence[str]:
        """Where a part's file may be in a folder, the official place first."""

    def check(self) -> None:
        """See Task: a --data-dir has a file for every part."""
        folder = self._options.data_dir
        for name in self._names:
            if folder is not None:
                find_file(folder, self.places(name))

    @abstractmethod
    def rows(self, loaded: LoadedModel, name: str) -> tuple[list[Row], DataSource]:
        """The rows of one part, checked, --limit of them at most. Raises InputError."""

    @abstractmethod
    def text(self, name: str, row: Row) -> PromptText:
        """A row's prompt."""

    @abstractmethod
    def reference(self, name: str, row: Row) -> dict[str, Any]:
        """What a row's answer is held to, as JSON; it is kept with the answer."""

    @abstractmethod
    def score(self, name: str, prediction: str, reference: Mapping[str, Any]) -> float:
        """Between 0 and 1."""

    def prepare(self, loaded: LoadedModel) -> Sequence[BenchmarkExample]:
        """Every row of every chosen part, in order. Raises InputError for rows that don't do."""
        self._max_length = self._options.max_length or longest_context(loaded)
        if self._max_length is not None:
            check_context(loaded, self._max_length, "give a smaller --max-length")
        self._sources, self._examples = [], []
        for name in self._names:
            rows, source = self.rows(loaded, name)
            self._sources.append(asdict(source))
            templated = use_template(loaded, self._options.chat, self.parts[name].chat)
            with self.progress.task(f"reading {name}", total=len(rows), unit="rows") as bar:
                for number, row in enumerate(rows):
                    self._examples.append(self._example(loaded, name, number, row, templated))
                    bar.advance()
        return self._examples

    def _example(
        self, loaded: LoadedModel, name: str, number: int, row: Row, templated: bool
    ) -> BenchmarkExample:
        text = self.text(name, row)
        try:
            prompt: TextPrompt = text_prompt(
                loaded,
                text.context,
                text.question,
                answer=text.answer,
                templated=templated,
                room=self.room(name),
            )
        except InputError as error:
            raise InputError(f"{name}, row {number + 1}: {error.what}", error.mend) from None
        return BenchmarkExample(
            name,
            number,
            array("i", prompt.context + prompt.question),
            len(prompt.context),
            prompt.full_length,
            self._new_tokens(name),
            templated,
            self.reference(name, row),
        )

    def ends(self, name: str) -> Callable[[str], bool] | None:
        """When an answer has all that its score depends on, and decoding may end; None: never."""
        return _has_first_line if self.parts[name].first_line else None

    def room(self, name: str) -> int | None:
        """How many tokens a prompt may have; None for as many as there are."""
        return None if self._max_length is None else self._max_length - self._new_tokens(name)

    def _new_tokens(self, name: str) -> int:
        """The benchmark's own, but never more than half of a short --max-length."""
        wanted = self.parts[name].max_new_tokens
        return wanted if self._max_length is None else min(wanted, max(1, self._max_length // 2))

    def settings(self) -> dict[str, Any]:
        """See Task."""
        templated = {example.part: example.templated for example in self._examples}
        return {
            "subsets": self._names,
            "limit": self._options.limit,
            "max_length": self._max_length,
            "truncation": "middle",
            "max_new_tokens": {name: self._new_tokens(name) for name in self._names},
            "chat_template": templated,
            "question_after_context": True,
            "decoding": "greedy",
            "batch_size": self.batch_size,
            "sources": self._sources,
            "examples": len(self._examples),
            "examples_sha256": sha256_of_ids(example.ids for example in self._examples),
        }

    @property
    def batch_size(self) -> int:
        """See Task."""
        return self._options.batch_size or 1

    def batch_key(self, example: BenchmarkExample) -> Any:
        """See Task: one part's examples, with questions of about one length (see second_part)."""
        return example.part, second_part(example.split, len(example.ids) - example.split)

    def size(self, example: BenchmarkExample) -> int:
        """See Task."""
        return len(example.ids)

    def run(self, loaded: LoadedModel, cache: Any, example: BenchmarkExample) -> Record:
        """Answer one row."""
        return self.run_batch(loaded, cache, [example])[0]

    def run_batch(
        self, loaded: LoadedModel, cache: Any, examples: Sequence[BenchmarkExample]
    ) -> list[Record]:
        """Answer rows of one part."""
        first_line = self.parts[examples[0].part].first_line
        prompts = [example.prompt for example in examples]
        with torch.inference_mode():
            texts = generate_batch(
                loaded,
                cache,
                prompts,
                examples[0].max_new_tokens,
                until=self.ends(examples[0].part),
                beginnings=self.beginnings,
            )
        predictions = [text.lstrip("\n").split("\n")[0] if first_line else text for text in texts]
        return [
            {
                "subset": example.part,
                "row": example.row,
                **example.reference,
                "prediction": prediction,
                "score": self.score(example.part, prediction, example.reference),
                "context": len(example.ids),
                "context_before_truncation": example.full_length,
                "prompt_sha256": sha256_of_ids([prompt.context, prompt.question]),
            }
            for example, prompt, prediction in zip(examples, prompts, predictions, strict=True)
        ]

    def metrics(self, records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
        """`score`, the mean over the subsets, and one a subset, all in percent."""
        by_part = self.by_part(records)
        return {"score": mean(by_part.values()), **by_part}

    def by_part(self, records: Sequence[Record]) -> dict[str, float]:
        """The mean score of each subset, in percent."""
        return {
            name: 100 * mean(record["score"] for record in records if record["subset"] == name)
            for name in self._names
        }


def _has_first_line(text: str) -> bool:
    return "\n" in text.lstrip("\n")
