"""GSM8K: worked examples, prompts, and what counts as the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commvq_core.errors import InputError
from commvq_core.evaluation.codecs import EvalCodec
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.report import subset_rows, summary_rows
from commvq_core.evaluation.runner import evaluate
from commvq_core.evaluation.tasks import make_task
from commvq_core.evaluation.tasks.gsm8k import GSM8K
from commvq_core.models import LoadedModel
from tests.evaluation.benchmarks import write_rows


def row(number: int, kind: str) -> dict[str, Any]:
    return {
        "question": f"{kind} {number}: what is {number} plus 2? ",
        "answer": f"It is {number}+2=<<{number}+2={number + 2}>>{number + 2}.\n#### {number + 2}",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "train.jsonl", [row(number, "Worked") for number in range(30)])
    write_rows(tmp_path / "test.jsonl", [row(number, "Asked") for number in range(5)])
    return tmp_path


def texts(loaded: LoadedModel, options: EvalOptions) -> list[tuple[str, str]]:
    return [
        (
            str(loaded.tokenizer.decode(example.prompt.context)),
            str(loaded.tokenizer.decode(example.prompt.question)),
        )
        for example in GSM8K(options).prepare(loaded)
    ]


def test_eight_worked_examples_come_before_the_problem(loaded: LoadedModel, folder: Path) -> None:
    found = texts(loaded, EvalOptions(data_dir=folder))
    assert len(found) == 5
    (shots,) = {context for context, _ in found}
    worked = shots.removesuffix("\n\n").split("\n\n")
    assert len(set(worked)) == 8
    for text in worked:
        number = int(text.split("Worked ")[1].split(":")[0])
        assert text == (
            f"Question: Worked {number}: what is {number} plus 2?\n"
            f"Answer: It is {number}+2={number + 2}.\nThe answer is {number + 2}."
        )
    for number, (_, question) in enumerate(found):
        assert question == f"Question: Asked {number}: what is {number} plus 2?\nAnswer:"


def test_the_seed_draws_the_worked_examples(loaded: LoadedModel, folder: Path) -> None:
    def shots(seed: int) -> str:
        return texts(loaded, EvalOptions(data_dir=folder, seed=seed, limit=1))[0][0]

    assert shots(1) == shots(1) != shots(2)
    task = GSM8K(EvalOptions(data_dir=folder, seed=1))
    task.prepare(loaded)
    worked = task.settings()["worked_examples"]
    assert len(set(worked["rows"])) == 8
    assert f"Worked {worked['rows'][0]}:" in shots(1).split("\n")[0]
    assert worked["source"]["name"].endswith("train.jsonl")
    assert len(worked["source"]["sha256"]) == 64


def test_an_answer_ends_where_the_next_problem_begins(folder: Path) -> None:
    task = GSM8K(EvalOptions(data_dir=folder))
    ends = task.ends("gsm8k")
    assert ends is not None
    assert ends("The answer is 7.\n\nQuestion:")
    assert not ends("The answer is 7.\n\n")
    reference = {"expected": "7"}
    assert task.score("gsm8k", "5+2=7. The answer is 7.\n\nQuestion: 1?", reference) == 1
    assert task.score("gsm8k", "5+2=7.\n\nQuestion: The answer is 7.", reference) == 0
    assert task.score("gsm8k", "5+2=7", reference) == 0


def test_exact_match_is_strict_and_flexible(folder: Path) -> None:
    task = GSM8K(EvalOptions(data_dir=folder))
    said = ["The answer is 7.", "So 7\n\nQuestion: 9", "The answer is 8.", "no idea"]
    records = [
        {"prediction": text, "expected": "7", "score": task.score("gsm8k", text, {"expected": "7"})}
        for text in said
    ]
    metrics = task.metrics(records, records)
    assert metrics == {"exact_match": 0.25, "exact_match_flexible": 0.5, "kept": 1.0}
    wrong = [{**record, "score": 0.0} for record in records]
    assert task.metrics(wrong, records)["kept"] == 0
    assert task.metrics(records, wrong)["kept"] is None


def test_every_cache_gets_the_same_problems(
    loaded: LoadedModel, codecs: list[EvalCodec], folder: Path
) -> None:
    task = make_task("gsm8k", EvalOptions(data_dir=folder, limit=2, max_length=700, batch_size=2))
    result = evaluate(loaded, codecs, task)
    assert subset_rows(result) is None
    assert len(summary_rows(result)[1]) == 2
    first, second = (
        [(r["prompt_sha256"], r["expected"]) for r in entry["examples"]]
        for entry in result["results"]
    )
    assert first == second
    assert [expected for _, expected in first] == ["2", "3"]


def test_what_is_wrong_with_the_files_is_named(loaded: LoadedModel, folder: Path) -> None:
    with pytest.raises(InputError, match="no use for --subset"):
        make_task("gsm8k", EvalOptions(data_dir=folder, subsets=("gsm8k",)))
    (folder / "test.jsonl").write_text(json.dumps({"question": "?", "answer": "no number"}) + "\n")
    with pytest.raises(InputError, match="has no number after ####"):
        GSM8K(EvalOptions(data_dir=folder)).prepare(loaded)
    write_rows(folder / "train.jsonl", [row(1, "Worked")] * 7)
    with pytest.raises(InputError, match="7 rows, fewer than the 8"):
        GSM8K(EvalOptions(data_dir=folder)).prepare(loaded)
    (folder / "train.jsonl").unlink()
    with pytest.raises(InputError, match=r"has no train\.jsonl"):
        GSM8K(EvalOptions(data_dir=folder)).check()
