"""LongBench and LongBench-E (Bai et al. 2024, arXiv 2308.14508)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from commvq_core.errors import InputError
from commvq_core.evaluation.data import DataSource, Fields, HubFile, Row, load_rows
from commvq_core.evaluation.metrics import mean
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.scoring.code import code_similarity
from commvq_core.evaluation.scoring.f1 import f1, f1_chinese
from commvq_core.evaluation.scoring.matches import classification, share_of_numbers
from commvq_core.evaluation.scoring.rouge import rouge_l_unique
from commvq_core.evaluation.scoring.words import check_chinese, chinese_words
from commvq_core.evaluation.tasks.base import Record
from commvq_core.evaluation.tasks.benchmark import BenchmarkTask, PromptText
from commvq_core.evaluation.tasks.longbench_parts import (
    ALL,
    CHINESE,
    EVEN,
    METRIC_OF,
    PAPER8,
    PARTS,
    TEMPLATES,
)
from commvq_core.files import read_json, sha256_of_file

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_HUB = "THUDM/LongBench"
_FIELDS: Fields = {
    "input": str,
    "context": str,
    "answers": list[str],
    "length": int,
    "all_classes": list[str] | None,
    "_id": str,
}
_OFFICIAL_PROMPTS = ("config/dataset2prompt.json", "dataset2prompt.json")
_BINS = {"0-4k": 4000, "4-8k": 8000}  # words, or characters of Chinese; beyond them "8k+"


def _rouge_chinese(prediction: str, answer: str) -> float:
    return rouge_l_unique(*(" ".join(chinese_words(text)) for text in (prediction, answer)))


METRICS: dict[str, Callable[[str, str], float]] = {
    "f1": f1,
    "f1_chinese": f1_chinese,
    "rouge": rouge_l_unique,
    "rouge_chinese": _rouge_chinese,
    "numbers": share_of_numbers,
    "code": code_similarity,
}


class LongBench(BenchmarkTask):
    """LongBench's 21 subsets in English, Chinese and code; or the 13 of LongBench-E, `NAME_e`."""

    name = "longbench"
    parts = PARTS
    groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "all": ALL,
        "paper8": PAPER8,
        "longbench-e": EVEN,
    }

    def __init__(self, options: EvalOptions) -> None:
        super().__init__(options)
        if len({name in EVEN for name in self._names}) > 1:
            raise InputError(
                "subsets of LongBench and of LongBench-E share rows and no score",
                "evaluate the ones that end in _e by themselves",
            )
        if any(name in CHINESE for name in self._names):
            check_chinese()
        self._templates: Mapping[str, str] = TEMPLATES
        self._prompts = "commvq"
        if options.data_dir is not None:
            self._use_official_prompts(options.data_dir)

    def _use_official_prompts(self, folder: Path) -> None:
        for path in (folder / name for name in _OFFICIAL_PROMPTS):
            if path.is_file():
                found = read_json(path, "LongBench's prompts")
                for name in {name.removesuffix("_e") for name in self._names}:
                    text = found.get(name)
                    if not isinstance(text, str) or text.count("{context}") != 1:
                        raise InputError(
                            f"{path} has no prompt of {name} with {{context}} in it",
                            "give the official file, or remove it",
                        )
                self._templates, self._prompts = found, f"official, {sha256_of_file(path)}"
                return

    def places(self, name: str) -> Sequence[str]:
        """See BenchmarkTask."""
        return f"data/{name}.jsonl", f"{name}.jsonl"

    def rows(self, loaded: LoadedModel, name: str) -> tuple[list[Row], DataSource]:
        """See BenchmarkTask; on the hub all parts are in data.zip."""
        classes = METRIC_OF[name.removesuffix("_e")] == "classification"
        return load_rows(
            self._options.data_dir,
            self.places(name),
            HubFile(_HUB, "data.zip", self.places(name)[0]),
            {**_FIELDS, "all_classes": list[str]} if classes else _FIELDS,
            limit=self._options.limit,
        )

    def text(self, name: str, row: Row) -> PromptText:
        """See BenchmarkTask: the template, divided behind the context."""
        before, _, after = self._templates[name.removesuffix("_e")].partition("{context}")
        before, after = (text.replace("{input}", row["input"]) for text in (before, after))
        return PromptText(before + row["context"], after)

    def reference(self, name: str, row: Row) -> dict[str, Any]:
        """See BenchmarkTask."""
        kept = {"id": row["_id"], "answers": row["answers"], "length": row["length"]}
        return kept | ({"all_classes": row["all_classes"]} if row["all_classes"] else {})

    def score(self, name: str, prediction: str, reference: Mapping[str, Any]) -> float:
        """The best over the right answers."""
        metric = METRIC_OF[name.removesuffix("_e")]
        if metric == "classification":
            classes = reference["all_classes"]
            scores = [classification(prediction, one, classes) for one in reference["answers"]]
        else:
            scores = [METRICS[metric](prediction, one) for one in reference["answers"]]
        return max(scores, default=0.0)

    def settings(self) -> dict[str, Any]:
        """See Task."""
        return {**super().settings(), "prompts": self._prompts}

    def metrics(self, records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
        """See BenchmarkTask; besides `score_paper8`, and for LongBench-E `lengths`.

        `score_paper8` is the mean over the CommVQ paper's eight subsets, where all were run.
        `lengths` gives the mean over the subsets for each range of lengths that has examples.
        """
        found = super().metrics(records, baseline)
        if set(PAPER8) <= set(self._names):
            found["score_paper8"] = mean(found[name] for name in PAPER8)
        if self._names[0] in EVEN:
            found["lengths"] = self._by_length(records)
        return found

    def _by_length(self, records: Sequence[Record]) -> dict[str, float]:
        scores: dict[str, dict[str, list[float]]] = {name: {} for name in (*_BINS, "8k+")}
        for record in records:
            one = next((name for name, end in _BINS.items() if record["length"] < end), "8k+")
            scores[one].setdefault(record["subset"], []).append(record["score"])
        return {
            name: 100 * mean(mean(values) for values in parts.values())
            for name, parts in scores.items()
            if parts
        }
