"""GSM8K: word problems of school arithmetic (Cobbe et al. 2021, arXiv 2110.14168).

Chain of thought with eight worked examples (Wei et al. 2022, arXiv 2201.11903): problem and
solution in turn, and then the problem that is asked.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from commvq_core.errors import InputError
from commvq_core.evaluation.data import (
    DataSource,
    Fields,
    HubFile,
    Row,
    find_file,
    load_rows,
)
from commvq_core.evaluation.metrics import mean
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.scoring.numbers import last_number, same_number, stated_number
from commvq_core.evaluation.tasks.base import Record
from commvq_core.evaluation.tasks.benchmark import BenchmarkTask, Part, PromptText

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_SHOTS = 8
_HUB = "openai/gsm8k"
_FIELDS: Fields = {"question": str, "answer": str}
_TEST = ("test.jsonl", "gsm8k-test.jsonl", "gsm8k_test.jsonl")
_TRAIN = ("train.jsonl", "gsm8k-train.jsonl", "gsm8k_train.jsonl", "gsm8k-train-200.jsonl")
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # the data set's own notes on how to calculate
_NEXT = "Question:"


class GSM8K(BenchmarkTask):
    """Share of problems whose number is right.

    The worked examples are cached as context, and problem and solution follow. They are drawn from
    the training rows by the seed, and are the same for every problem.
    """

    name = "gsm8k"
    uses = BenchmarkTask.uses - {"subsets"}
    # No chat template: the worked examples show the form of an answer, in one text.
    parts: ClassVar[Mapping[str, Part]] = {"gsm8k": Part(256, chat=False)}
    groups: ClassVar[Mapping[str, Sequence[str]]] = {"all": ("gsm8k",)}

    def __init__(self, options: EvalOptions) -> None:
        super().__init__(options)
        self._shots: list[tuple[int, str]] = []
        self._shot_source: dict[str, Any] = {}

    def places(self, name: str) -> Sequence[str]:
        """See BenchmarkTask."""
        return _TEST

    def check(self) -> None:
        """See BenchmarkTask: training rows as well."""
        super().check()
        if self._options.data_dir is not None:
            find_file(self._options.data_dir, _TRAIN)

    def rows(self, loaded: LoadedModel, name: str) -> tuple[list[Row], DataSource]:
        """See BenchmarkTask; reads the worked examples, too."""
        folder = self._options.data_dir
        train, source = load_rows(
            folder, _TRAIN, HubFile(_HUB, "main/train-00000-of-00001.parquet"), _FIELDS
        )
        if len(train) < _SHOTS:
            raise InputError(
                f"{source.name} has {len(train)} rows, fewer than the {_SHOTS} worked examples",
                "give the whole official file",
            )
        chosen = random.Random(self._options.seed).sample(range(len(train)), _SHOTS)
        self._shots = [
            (row, _worked(train[row], f"{source.name}, row {row + 1}")) for row in chosen
        ]
        self._shot_source = asdict(source)
        hub = HubFile(_HUB, "main/test-00000-of-00001.parquet")
        return load_rows(folder, _TEST, hub, _FIELDS, limit=self._options.limit)

    def text(self, name: str, row: Row) -> PromptText:
        """See BenchmarkTask."""
        shots = "".join(f"{text}\n\n" for _, text in self._shots)
        return PromptText(shots, f"{_NEXT} {row['question'].strip()}\nAnswer:")

    def reference(self, name: str, row: Row) -> dict[str, Any]:
        """See BenchmarkTask."""
        return {"expected": _gold(row, f"a test row ({row['question'][:40]}...)")}

    def ends(self, name: str) -> Callable[[str], bool] | None:
        """See BenchmarkTask: where the model makes up the next problem."""
        return lambda text: _NEXT in text

    def score(self, name: str, prediction: str, reference: Mapping[str, Any]) -> float:
        """Whether the number that the answer states is right."""
        stated = stated_number(prediction.partition(_NEXT)[0])
        return float(same_number(stated, reference["expected"]))

    def settings(self) -> dict[str, Any]:
        """See Task."""
        worked = {"rows": [row for row, _ in self._shots], "source": self._shot_source}
        found = {**super().settings(), "worked_examples": worked, "seed": self._options.seed}
        del found["subsets"]  # there are none
        return found

    def metrics(self, records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
        """`exact_match`: the number after "The answer is" or "####" is right, 0 to 1.

        `exact_match_flexible`: the last number of the answer is right. `kept`: of what fp16 got
        right, the share that this cache gets right.
        """
        kept = [
            record["score"]
            for record, reference in zip(records, baseline, strict=True)
            if reference["score"]
        ]
        return {
            "exact_match": mean(record["score"] for record in records),
            "exact_match_flexible": mean(
                float(
                    same_number(
                        last_number(record["prediction"].partition(_NEXT)[0]), record["expected"]
                    )
                )
                for record in records
            ),
            "kept": mean(kept) if kept else None,
        }


def _gold(row: Row, place: str) -> str:
    found = stated_number(row["answer"])
    if found is None:
        raise InputError(
            f"{place}: field 'answer' has no number after ####", "give the official file"
        )
    return found


def _worked(row: Row, place: str) -> str:
    """A training row as a worked example."""
    gold = _gold(row, place)
    steps = _CALCULATOR.sub("", row["answer"].partition("####")[0]).strip()
    return f"{_NEXT} {row['question'].strip()}\nAnswer: {steps}\nThe answer is {gold}."
