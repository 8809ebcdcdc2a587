"""InfiniteBench (Zhang et al. 2024, arXiv 2402.13718)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from commvq_core.errors import InputError
from commvq_core.evaluation.data import DataSource, HubFile, Row, load_rows
from commvq_core.evaluation.metrics import mean
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.prompts import text_prompt, use_template
from commvq_core.evaluation.scoring.f1 import f1, f1_characters
from commvq_core.evaluation.scoring.found import (
    first_digits,
    first_value,
    has_name,
    has_word,
    last_integer,
    leading_values,
)
from commvq_core.evaluation.scoring.options import chosen_option, named_option
from commvq_core.evaluation.scoring.rouge import rouge_l_sum
from commvq_core.evaluation.tasks.base import Record
from commvq_core.evaluation.tasks.benchmark import BenchmarkTask, PromptText
from commvq_core.evaluation.tasks.infinitebench_made import MADE, make_row
from commvq_core.evaluation.tasks.infinitebench_parts import PARTS, TEMPLATES
from commvq_core.files import sha256_of_text
from commvq_core.generation import check_context

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_HUB = "xinrongzhang2022/InfiniteBench"
_REPEATS = 10  # rows of a part and length that are made without --limit

# Parts whose best right answer counts, and those with a single one.
_BEST: dict[str, Callable[[str, str], float]] = {
    "longbook_qa_eng": f1,
    "longbook_qa_chn": f1_characters,
}
_SINGLE: dict[str, Callable[[str, Any], float]] = {
    "passkey": first_digits,
    "number_string": first_digits,
    "kv_retrieval": has_word,
    "longdialogue_qa_eng": has_name,
    "longbook_sum_eng": rouge_l_sum,
    "math_find": first_value,
    "code_run": last_integer,
}
_OPTION: dict[str, Callable[[str, str, str], float]] = {
    "longbook_choice_eng": chosen_option,
    "code_debug": named_option,
}


class InfiniteBench(BenchmarkTask):
    """InfiniteBench's 12 subsets; with --lengths, three of them made here at these lengths."""

    name = "infinitebench"
    uses = BenchmarkTask.uses | {"lengths"}
    parts = PARTS
    groups: ClassVar[Mapping[str, Sequence[str]]] = {"all": tuple(PARTS)}

    def __init__(self, options: EvalOptions) -> None:
        super().__init__(options)
        self._lengths = options.lengths
        if options.lengths is None:
            return
        if options.max_length is not None or options.data_dir is not None:
            raise InputError(
                "--lengths makes rows of these lengths", "leave out --max-length and --data-dir"
            )
        if options.subsets is None:
            self._names = list(MADE)
        if not set(self._names) <= set(MADE):
            raise InputError(
                "--lengths is for the subsets that can be made", f"give of {', '.join(MADE)}"
            )

    def places(self, name: str) -> Sequence[str]:
        """See BenchmarkTask."""
        return f"{name}.jsonl", f"data/{name}.jsonl"

    def rows(self, loaded: LoadedModel, name: str) -> tuple[list[Row], DataSource]:
        """See BenchmarkTask: of the folder's or the hub's NAME.jsonl, or made."""
        if self._lengths is not None:
            return self._make(loaded, name, self._lengths)
        template = TEMPLATES[name]
        fields = {"context": str, "input": str, "answer": template.kind}
        rows, source = load_rows(
            self._options.data_dir,
            self.places(name),
            HubFile(_HUB, self.places(name)[0]),
            fields | ({"options": list[str]} if template.options else {}),
            limit=self._options.limit,
        )
        for number, row in enumerate(rows, start=1):
            try:
                self.text(name, row)
                self.reference(name, row)
            except ValueError as error:
                raise InputError(f"{source.name}, row {number}: {error}", "mend the row") from None
        return rows, source

    def _make(
        self, loaded: LoadedModel, name: str, lengths: Sequence[int]
    ) -> tuple[list[Row], DataSource]:
        new_tokens = PARTS[name].max_new_tokens
        check_context(loaded, max(lengths) + new_tokens, "give smaller --lengths")
        templated = use_template(loaded, self._options.chat, PARTS[name].chat)

        def tokens(row: Row) -> int:
            text = self.text(name, row)
            prompt = text_prompt(
                loaded,
                text.context,
                text.question,
                answer=text.answer,
                templated=templated,
                room=None,
            )
            return prompt.full_length

        count = self._options.limit or _REPEATS
        rows = [
            make_row(
                name,
                length,
                number / max(1, count - 1),
                random.Random(f"{self._options.seed}/{name}/{length}/{number}"),
                tokens,
            )
            | {"length": length}
            for length in lengths
            for number in range(count)
        ]
        digest = sha256_of_text(json.dumps(rows))
        return rows, DataSource(f"made from seed {self._options.seed}", digest, len(rows))

    def text(self, name: str, row: Row) -> PromptText:
        """See BenchmarkTask. Raises ValueError for a row that no prompt can be made of."""
        template = TEMPLATES[name]
        words = {"input": row["input"]}
        if template.options:
            if len(row["options"]) != 4:
                raise ValueError(f"field 'options' has {len(row['options'])} options, not 4")
            words |= dict(zip("ABCD", row["options"], strict=True))
        if name == "math_find":
            words["wanted"] = _wanted(row["input"])
        if name == "code_run":
            found = re.search(r"(\w+)\([^()]*\)", row["input"])
            if found is None:
                raise ValueError("field 'input' calls no function")
            words |= {"call": found.group(), "function": found.group(1)}
        before, _, after = template.context.partition("{context}")
        return PromptText(
            _fill(before, words) + row["context"] + _fill(after, words),
            _fill(template.question, words),
            _fill(template.answer, words),
        )

    def reference(self, name: str, row: Row) -> dict[str, Any]:
        """See BenchmarkTask. Raises ValueError for an answer that is none."""
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if answers and isinstance(answers[0], list):
            answers = answers[0]
        if not answers:
            raise ValueError("field 'answer' is empty")
        kept: dict[str, Any] = {"answers": answers}
        if name == "math_find":
            kept["answers"] = [float(answers[0])]
        elif name in ("math_calc", "code_run"):
            kept["answers"] = [int(answer) for answer in answers]
        if TEMPLATES[name].options:
            if answers[0] not in row["options"]:
                raise ValueError(f"field 'answer' holds {answers[0]!r}, which is no option")
            kept["letter"] = "ABCD"[row["options"].index(answers[0])]
        return kept | ({"length": row["length"]} if "length" in row else {})

    def score(self, name: str, prediction: str, reference: Mapping[str, Any]) -> float:
        """See BenchmarkTask."""
        answers = reference["answers"]
        if name in _BEST:
            return max(_BEST[name](prediction, answer) for answer in answers)
        if name in _OPTION:
            return _OPTION[name](prediction, reference["letter"], answers[0])
        if name == "math_calc":
            return leading_values(prediction, answers)
        return _SINGLE[name](prediction, answers[0])

    def settings(self) -> dict[str, Any]:
        """See Task."""
        found = {**super().settings(), "prompts": "commvq"}
        if self._lengths is not None:
            found |= {"lengths": list(self._lengths), "seed": self._options.seed}
        return found

    def room(self, name: str) -> int | None:
        """Rows that are made have their length already."""
        return None if self._lengths is not None else super().room(name)

    def metrics(self, records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
        """See BenchmarkTask; for rows that were made also `lengths`: subset -> length -> score."""
        found = super().metrics(records, baseline)
        if self._lengths is not None:
            found["lengths"] = {
                name: {
                    str(length): 100
                    * mean(
                        record["score"]
                        for record in records
                        if (record["subset"], record["length"]) == (name, length)
                    )
                    for length in self._lengths
                }
                for name in self._names
            }
        return found


def _wanted(question: str) -> str:
    """What a list of numbers is searched for, said before it as well."""
    found = re.search(r"The (.+?) of ", question)
    return f"What is the {found.group(1)} in the list below?" if found else "Read the list below."


def _fill(template: str, words: Mapping[str, str]) -> str:
    """The template with each {name} replaced once, whatever braces the words have."""
    return re.sub(r"\{(\w+)\}", lambda found: words[found.group(1)], template)
