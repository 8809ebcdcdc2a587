"""InfiniteBench: its parts, prompts and scores, and the rows that are made at any length."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from commvq_core.errors import InputError
from commvq_core.evaluation.codecs import EvalCodec
from commvq_core.evaluation.data import Row
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.runner import evaluate
from commvq_core.evaluation.tasks import make_task
from commvq_core.evaluation.tasks.infinitebench import InfiniteBench
from commvq_core.evaluation.tasks.infinitebench_made import MADE, make_row
from commvq_core.evaluation.tasks.infinitebench_parts import PARTS, TEMPLATES
from commvq_core.models import LoadedModel
from tests.evaluation.benchmarks import WORDS, write_rows

OPTIONS = ["run_all", "stop", "a tall man", "nothing"]
# A row of each part in the official format, and an answer that is right.
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "passkey": ({"input": "What is the pass key?", "answer": ["05123"]}, " 05123."),
    "number_string": ({"input": "Which digits?", "answer": "1122334455"}, " 1122334455"),
    "kv_retrieval": ({"input": 'Key: "a-b"\nValue: ', "answer": "c-d"}, '"c-d"}'),
    "longdialogue_qa_eng": ({"input": "", "answer": ["BILBO"]}, " Bilbo."),
    "longbook_sum_eng": ({"input": "", "answer": ["A man walks."]}, "a man walks"),
    "longbook_choice_eng": (
        {"input": "Who?", "answer": ["a tall man"], "options": OPTIONS},
        " C. a tall man",
    ),
    "longbook_qa_eng": ({"input": "Who?", "answer": ["a man", "Tom"]}, "Tom!"),
    "longbook_qa_chn": ({"input": "谁？", "answer": ["小明", "明"]}, "小明。"),
    "math_find": ({"input": "The largest number of the list is: ", "answer": [97]}, " 97"),
    "math_calc": ({"input": "", "answer": [[2, 7, 6]]}, " [2, 7, 6]"),
    "code_run": ({"input": "Give the value of func_12(-3).", "answer": [-8]}, " -8"),
    "code_debug": ({"input": "", "answer": ["stop"], "options": OPTIONS}, " B. stop"),
}


def official(folder: Path, *names: str) -> Path:
    """A folder with a row of each of the named parts, all by default."""
    for name in names or ROWS:
        write_rows(folder / f"{name}.jsonl", [{"id": 0, "context": WORDS, **ROWS[name][0]}])
    return folder


def task_of(folder: Path, *names: str, **more: Any) -> InfiniteBench:
    return InfiniteBench(EvalOptions(data_dir=folder, subsets=names or None, **more))


def test_there_are_twelve_parts_with_the_published_lengths() -> None:
    assert set(PARTS) == set(TEMPLATES) == set(ROWS)
    lengths = {name: part.max_new_tokens for name, part in PARTS.items()}
    assert sorted(lengths.values()) == [3, 5, 5, 6, 12, 40, 40, 40, 40, 50, 1200, 30000]
    assert not any(part.chat for part in PARTS.values())


@pytest.mark.parametrize("name", ROWS)
def test_every_part_scores_its_right_answer(name: str, loaded: LoadedModel, tmp_path: Path) -> None:
    task = task_of(official(tmp_path, name), name)
    (example,) = task.prepare(loaded)
    assert task.score(name, ROWS[name][1], example.reference) == pytest.approx(1)
    assert task.score(name, "", example.reference) == 0
    assert json.loads(json.dumps(example.reference)) == example.reference


def test_prompts_say_what_is_asked_before_and_after_the_context(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    task = task_of(official(tmp_path))
    texts = {
        example.part: (
            loaded.tokenizer.decode(example.prompt.context),
            loaded.tokenizer.decode(example.prompt.question),
        )
        for example in task.prepare(loaded)
    }
    assert list(texts) == list(PARTS)
    for context, question in texts.values():
        assert WORDS in context
        assert "{" not in question
    assert texts["math_find"][0].startswith(
        "What is the largest number in the list below?\n\nword0"
    )
    assert "called func_12." in texts["code_run"][0]
    assert texts["code_run"][1].endswith("The value of func_12(-3) is")
    assert "A. run_all\nB. stop\nC. a tall man\nD. nothing" in texts["code_debug"][1]
    assert texts["longbook_choice_eng"][1].endswith("The letter of the right answer is")
    assert texts["kv_retrieval"][1].endswith('Key: "a-b"\nValue: ')


def test_long_answers_never_take_more_than_half(loaded: LoadedModel, tmp_path: Path) -> None:
    task = task_of(official(tmp_path, "math_calc"), "math_calc", max_length=600)
    (example,) = task.prepare(loaded)
    assert example.max_new_tokens == len(example.ids) == 300


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("code_run", {"input": "no call"}, "row 1: field 'input' calls no function"),
        ("code_run", {"answer": ["x"]}, "row 1: invalid literal"),
        ("code_debug", {"options": ["stop"]}, "row 1: field 'options' has 1 options, not 4"),
        (
            "code_debug",
            {"answer": "gone"},
            "row 1: field 'answer' holds 'gone', which is no option",
        ),
        ("passkey", {"answer": []}, "row 1: field 'answer' is empty"),
        ("passkey", {"answer": 5}, r"jsonl:1: field 'answer' holds a whole number, not text or a"),
        ("math_calc", {"answer": "5"}, r"jsonl:1: field 'answer' holds text, not a list of"),
        ("code_debug", {"options": None}, r"jsonl:1: field 'options' holds null, not a list"),
    ],
)
def test_wrong_rows_are_named(
    name: str, changes: dict[str, Any], words: str, loaded: LoadedModel, tmp_path: Path
) -> None:
    row = {"id": 0, "context": WORDS, **ROWS[name][0], **changes}
    write_rows(tmp_path / f"{name}.jsonl", [row])
    with pytest.raises(InputError, match=words):
        task_of(tmp_path, name).prepare(loaded)


def test_it_runs_through_every_codec(
    loaded: LoadedModel, codecs: list[EvalCodec], tmp_path: Path
) -> None:
    names = ("passkey", "longbook_choice_eng", "math_find")
    result = evaluate(loaded, codecs, task_of(official(tmp_path), *names, max_length=200))
    json.dumps(result, allow_nan=False)
    for entry in result["results"]:
        assert set(entry["metrics"]) == {"score", *names}
        assert [record["subset"] for record in entry["examples"]] == list(names)
        assert entry["examples"][1]["letter"] == "C"


# Rows that are made.


def count_words(row: Row) -> int:
    return len(re.findall(r"\w+", row["context"] + row["input"]))


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", MADE)
def test_a_row_fills_its_length_and_hides_its_answer_at_its_depth(name: str, depth: float) -> None:
    row = make_row(name, 2000, depth, random.Random(1), count_words)
    assert 2000 - 20 < count_words(row) <= 2000
    context, answer = row["context"], row["answer"]
    if name == "kv_retrieval":
        key = re.search(r'Key: "(.*?)"', row["input"])
        assert key is not None
        pairs = json.loads(context.removeprefix("JSON data:\n"))
        assert pairs[key.group(1)] == answer
        place = list(pairs).index(key.group(1)) / (len(pairs) - 1)
    else:
        assert re.fullmatch(r"\d{5}|\d{10}", answer)
        assert context.count(answer) == 2
        lines = context.splitlines()
        place = next(at for at, line in enumerate(lines) if answer in line) / (len(lines) - 1)
    assert place == pytest.approx(depth, abs=0.02)


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(InputError, match="passkey at 10 tokens has no room"):
        make_row("passkey", 10, 0.5, random.Random(1), count_words)


def test_with_lengths_rows_are_made_and_scored_by_length(
    loaded: LoadedModel, codecs: list[EvalCodec]
) -> None:
    options = EvalOptions(lengths=(400, 700), limit=1, subsets=("passkey", "kv_retrieval"))
    task = make_task("infinitebench", options)
    examples = task.prepare(loaded)
    assert [example.part for example in examples] == ["passkey"] * 2 + ["kv_retrieval"] * 2
    for example in examples:
        length = example.reference["length"]
        assert length - 200 < len(example.ids) == example.full_length <= length
    result = evaluate(loaded, codecs, task)
    metrics = result["results"][1]["metrics"]
    assert {name: set(by) for name, by in metrics["lengths"].items()} == {
        name: {"400", "700"} for name in ("passkey", "kv_retrieval")
    }
    settings = result["settings"]
    assert (settings["lengths"], settings["seed"]) == ([400, 700], 0)


def test_the_seed_decides_what_is_made(loaded: LoadedModel) -> None:
    def hashed(seed: int) -> str:
        task = InfiniteBench(EvalOptions(lengths=(300,), limit=1, seed=seed))
        task.prepare(loaded)
        assert task.settings()["subsets"] == list(MADE)
        return str(task.settings()["examples_sha256"])

    assert hashed(1) == hashed(1) != hashed(2)


def test_lengths_are_for_what_can_be_made(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give of passkey, number_string, kv_retrieval"):
        InfiniteBench(EvalOptions(lengths=(300,), subsets=("code_run",)))
    with pytest.raises(InputError, match="leave out --max-length and --data-dir"):
        InfiniteBench(EvalOptions(lengths=(300,), max_length=300))
    with pytest.raises(InputError, match="leave out --max-length and --data-dir"):
        InfiniteBench(EvalOptions(lengths=(300,), data_dir=tmp_path))
    with pytest.raises(InputError, match="smaller --lengths"):
        InfiniteBench(EvalOptions(lengths=(5000,))).prepare(loaded)
