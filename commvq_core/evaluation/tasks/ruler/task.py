"""The task `ruler`: examples of every subset and length, and their scores."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from commvq_core.errors import InputError
from commvq_core.evaluation.answers import generate_after_context
from commvq_core.evaluation.haystack import Haystack
from commvq_core.evaluation.metrics import mean
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.prompts import (
    Prompt,
    text_prompt,
    use_template,
    wrap_prompt,
)
from commvq_core.evaluation.scoring.strings import string_match_all, string_match_part
from commvq_core.evaluation.tasks.base import Record, Task
from commvq_core.evaluation.tasks.ruler.draft import Draft, Kit
from commvq_core.evaluation.tasks.ruler.frequencies import draw_common_words, draw_frequent_words
from commvq_core.evaluation.tasks.ruler.made import find_made, read_made
from commvq_core.evaluation.tasks.ruler.needles import NEEDLES, draw_needles
from commvq_core.evaluation.tasks.ruler.questions import (
    QUESTION_FILES,
    draw_question,
    find_questions,
    read_questions,
)
from commvq_core.evaluation.tasks.ruler.tracking import draw_tracking
from commvq_core.evaluation.text import haystack_ids, sha256_of_ids, text_split
from commvq_core.files import sha256_of_file
from commvq_core.generation import check_context

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

SUBSETS = (*NEEDLES, "vt", "cwe", "fwe", *QUESTION_FILES)
# Tokens generated, as the benchmark sets them; a length counts them too.
_NEW_TOKENS = {
    **dict.fromkeys(NEEDLES, 128),
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    **dict.fromkeys(QUESTION_FILES, 32),
}
_LENGTH = 4096
_EXAMPLES = 10
_ROUND = 64  # tokens
_MOST_TEXT = 4  # the essay haystack is so many times as long as the longest context


@dataclass(frozen=True)
class RulerExample:
    """One prompt. `any_will_do`: one of `expected` is enough."""

    subset: str
    length: int
    prompt: Prompt
    expected: tuple[str, ...]
    any_will_do: bool

    def score(self, prediction: str) -> float:
        """From 0 to 1."""
        match = string_match_part if self.any_will_do else string_match_all
        return match(prediction, self.expected)


class Ruler(Task):
    """Share of the right answers that a model names, by subset and length.

    The context is run first and the question after it. A prompt and what is generated after it take
    at most the length that was asked for, and as many tokens of it as the task's pieces fill.
    """

    name = "ruler"
    uses = frozenset({"datasets", "lengths", "subsets", "data_dir", "chat"})
    has_grid = True

    def __init__(self, options: EvalOptions) -> None:
        if options.lengths is not None and options.max_length is not None:
            raise InputError(
                "--lengths and --max-length both say how long contexts are", "give one of the two"
            )
        unknown = [name for name in options.subsets or () if name not in SUBSETS]
        if unknown:
            raise InputError(
                f"ruler has no subset {unknown[0]}", f"give --subset one of {', '.join(SUBSETS)}"
            )
        self._options = options
        self._lengths = options.lengths or (options.max_length or _LENGTH,)
        self._limit = options.limit or _EXAMPLES
        self._made = {
            name: path
            for name in options.subsets or SUBSETS
            if (path := find_made(options.data_dir, name)) is not None
        }
        self._questions = {
            name: path
            for name in QUESTION_FILES
            if name not in self._made
            and name in (options.subsets or SUBSETS)
            and (path := find_questions(options.data_dir, name)) is not None
        }
        self._subsets = self._choose()
        self._sources: list[dict[str, Any]] = []
        self._examples: list[RulerExample] = []

    def _choose(self) -> tuple[str, ...]:
        """What was asked for, or all that can be made. Raises InputError for a missing file."""
        asked = self._options.subsets
        missing = [
            name
            for name in asked or ()
            if name in QUESTION_FILES and name not in self._made and name not in self._questions
        ]
        if missing:
            raise InputError(
                f"{missing[0]} asks questions about documents that are not part of this toolkit",
                f"give --data-dir a folder with {' or '.join(QUESTION_FILES[missing[0]])}",
            )
        if self._options.data_dir is not None and not self._made and not self._questions:
            raise InputError(
                f"{self._options.data_dir} has no file of ruler",
                "put SUBSET/validation.jsonl, squad.json or hotpotqa.json there, or leave out "
                "--data-dir",
            )
        return asked or tuple(
            name
            for name in SUBSETS
            if name not in QUESTION_FILES or name in self._made or name in self._questions
        )

    def prepare(self, loaded: LoadedModel) -> Sequence[RulerExample]:
        """All examples, subset by subset. Raises InputError for lengths too short or too long."""
        self._sources = []
        kit = self._kit(loaded)
        self._examples = [
            example
            for subset in self._subsets
            for example in (
                self._read(loaded, subset) if subset in self._made else self._generate(kit, subset)
            )
        ]
        longest = max(
            len(example.prompt.context) + len(example.prompt.question) + _NEW_TOKENS[example.subset]
            for example in self._examples
        )
        check_context(loaded, longest, "give smaller --lengths")
        return self._examples

    def _kit(self, loaded: LoadedModel) -> Kit:
        drawn = [name for name in self._subsets if name not in self._made]
        essay = None
        if any(name in NEEDLES and NEEDLES[name].haystack == "essay" for name in drawn):
            check_context(loaded, max(self._lengths), "give smaller --lengths")
            ids, sources = haystack_ids(
                loaded, self._options, tokens=_MOST_TEXT * max(self._lengths)
            )
            essay = Haystack(loaded, ids, sentences=True)
            self._sources += sources
        questions = {}
        for name, path in self._questions.items():
            found = read_questions(path, name)
            random.Random(f"{self._options.seed}/{name}").shuffle(found.questions)
            questions[name] = found
            self._sources.append({"name": found.path, "sha256": found.sha256})
        return Kit(loaded, essay, Haystack.of_noise(loaded), questions)

    def _read(self, loaded: LoadedModel, subset: str) -> list[RulerExample]:
        path = self._made[subset]
        length, rows = read_made(path, self._limit)
        self._sources.append({"name": str(path), "sha256": sha256_of_file(path)})
        # Ready-made prompts have a model's template already, if they are to have one.
        templated = use_template(loaded, self._options.chat, default=False)
        return [
            RulerExample(
                subset,
                length,
                text_prompt(loaded, row.context, row.question, templated=templated, room=None),
                row.expected,
                subset in QUESTION_FILES,
            )
            for row in rows
        ]

    def _generate(self, kit: Kit, subset: str) -> list[RulerExample]:
        return [
            self._example(kit, subset, length, number)
            for length in self._lengths
            for number in range(self._limit)
        ]

    def _example(self, kit: Kit, subset: str, length: int, number: int) -> RulerExample:
        source = random.Random(f"{self._options.seed}/{subset}/{length}/{number}")
        draft = _draw(kit, subset, length, number, source)
        frame = wrap_prompt(
            kit.loaded, draft.introduction, draft.question, draft.answer, chat=self._options.chat
        )
        room = length - len(frame.context) - len(frame.question) - _NEW_TOKENS[subset]
        if room < draft.least:
            # The next example has other words, of more tokens perhaps.
            least = _ROUND * math.ceil(1.1 * (length + draft.least - room) / _ROUND)
            raise InputError(
                f"a context of {length:,} tokens has no room for {subset}",
                f"give lengths of at least {least:,} tokens, or choose others with --subset",
            )
        context = [*frame.context, *draft.fill(room)]
        prompt = Prompt(context, frame.question, frame.templated)
        return RulerExample(subset, length, prompt, draft.expected, draft.any_will_do)

    def settings(self) -> dict[str, Any]:
        """See Task."""
        return {
            "subsets": list(self._subsets),
            "lengths": sorted({example.length for example in self._examples}),
            "limit": self._limit,
            "seed": self._options.seed,
            "read_from_files": sorted(self._made),
            "split": text_split(self._options),
            "sources": self._sources,
            "chat_template": any(example.prompt.templated for example in self._examples),
            "question_after_context": True,
            "max_new_tokens": {name: _NEW_TOKENS[name] for name in self._subsets},
            "examples_sha256": sha256_of_ids(
                example.prompt.context + example.prompt.question for example in self._examples
            ),
        }

    def run(self, loaded: LoadedModel, cache: Any, example: RulerExample) -> Record:
        """Ask; greedy decoding, which ends early once nothing more can be gained."""
        with torch.inference_mode():
            prediction = generate_after_context(
                loaded,
                cache,
                example.prompt,
                _NEW_TOKENS[example.subset],
                until=lambda text: example.score(text) == 1,
                beginnings=self.beginnings,
            )
        return {
            "subset": example.subset,
            "length": example.length,
            "expected": list(example.expected),
            "prediction": prediction.strip(),
            "score": example.score(prediction),
            "context": len(example.prompt.context) + len(example.prompt.question),
        }

    def metrics(self, records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
        """`accuracy` (the mean over subsets), `subsets`, and `grid` [subset][length], 0 to 1.

        `kept` is the share of what fp16 got right that this cache gets right as well.
        """
        lengths: dict[str, list[int]] = {}
        for record in records:
            known = lengths.setdefault(record["subset"], [])
            if record["length"] not in known:
                known.append(record["length"])
        grid = {
            subset: {
                str(length): mean(
                    record["score"]
                    for record in records
                    if (record["subset"], record["length"]) == (subset, length)
                )
                for length in known
            }
            for subset, known in lengths.items()
        }
        by_subset = {subset: mean(cells.values()) for subset, cells in grid.items()}
        pairs = list(zip(records, baseline, strict=True))
        right = sum(reference["score"] for _, reference in pairs)
        both = sum(min(record["score"], reference["score"]) for record, reference in pairs)
        return {
            "accuracy": mean(by_subset.values()),
            "kept": both / right if right else None,
            "subsets": by_subset,
            "grid": grid,
        }


def _draw(kit: Kit, subset: str, length: int, number: int, source: random.Random) -> Draft:
    if subset in NEEDLES:
        return draw_needles(kit, NEEDLES[subset], source)
    if subset == "vt":
        return draw_tracking(kit, source)
    if subset == "cwe":
        return draw_common_words(kit, length, source)
    if subset == "fwe":
        return draw_frequent_words(kit, source)
    return draw_question(kit, subset, length, number, source)
