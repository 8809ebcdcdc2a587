"""LongBench: its parts, prompts, scores and averages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commvq_core.errors import InputError
from commvq_core.evaluation.beginnings import Beginnings
from commvq_core.evaluation.codecs import EvalCodec, resolve_codecs
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.report import length_rows, subset_rows, summary_rows
from commvq_core.evaluation.runner import evaluate
from commvq_core.evaluation.tasks import make_task
from commvq_core.evaluation.tasks.benchmark import BenchmarkExample
from commvq_core.evaluation.tasks.longbench import METRICS, LongBench
from commvq_core.evaluation.tasks.longbench_parts import (
    ALL,
    EVEN,
    METRIC_OF,
    PAPER8,
    PARTS,
    TEMPLATES,
)
from commvq_core.models import LoadedModel
from commvq_core.progress import Silent
from tests.evaluation.benchmarks import WORDS, longbench, longbench_row, write_rows


def options(folder: Path, *names: str, **more: Any) -> EvalOptions:
    return EvalOptions(data_dir=folder, subsets=names or None, **more)


def text_of(loaded: LoadedModel, example: BenchmarkExample) -> str:
    return str(loaded.tokenizer.decode(example.ids.tolist()))


def test_every_part_has_a_prompt_a_length_and_a_metric() -> None:
    assert len(ALL) == len(set(ALL)) == 21
    assert len(EVEN) == len(set(EVEN)) == 13
    assert {name.removesuffix("_e") for name in EVEN} <= set(ALL)
    assert set(PAPER8) <= set(ALL)
    assert set(TEMPLATES) == set(ALL)
    assert set(PARTS) == {*ALL, *EVEN}
    assert set(METRIC_OF.values()) == {*METRICS, "classification"}
    for name in ALL:
        assert TEMPLATES[name].count("{context}") == 1
        assert TEMPLATES[name].replace("{context}", "").replace("{input}", "").count("{") == 0
    without = {name for name in ALL if "{input}" not in TEMPLATES[name]}
    assert without == {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}


def test_answers_are_as_long_as_published() -> None:
    lengths = {name: PARTS[name].max_new_tokens for name in ALL}
    assert [name for name, length in lengths.items() if length == 512] == [
        *("gov_report", "qmsum", "multi_news", "vcsum"),
    ]
    assert sum(lengths.values()) == 4 * 512 + 4 * 128 + 6 * 64 + 7 * 32


def test_parts_that_are_completed_have_no_chat_template() -> None:
    plain = {name for name in ALL if not PARTS[name].chat}
    assert plain == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {name for name in ALL if PARTS[name].first_line} == {
        *("trec", "triviaqa", "samsum", "lsht"),
    }
    assert PARTS["trec_e"] == PARTS["trec"]


def test_subsets_come_by_name_or_group_in_the_benchmarks_order(tmp_path: Path) -> None:
    task = LongBench(options(tmp_path, "lcc", "paper8", "lcc"))
    assert task.settings()["subsets"] == [name for name in ALL if name in PAPER8]
    assert LongBench(EvalOptions()).settings()["subsets"] == list(ALL)
    assert LongBench(options(tmp_path, "longbench-e")).settings()["subsets"] == list(EVEN)
    with pytest.raises(InputError, match=r"has no subset nonsense: give all, paper8, longbench-e"):
        LongBench(options(tmp_path, "nonsense"))
    with pytest.raises(InputError, match="end in _e by themselves"):
        LongBench(options(tmp_path, "trec", "trec_e"))


def test_the_context_comes_first_and_the_question_after_it(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    task = LongBench(options(longbench(tmp_path, "hotpotqa"), "hotpotqa"))
    examples = task.prepare(loaded)
    assert len(examples) == 3
    context = loaded.tokenizer.decode(examples[1].prompt.context)
    question = loaded.tokenizer.decode(examples[1].prompt.question)
    assert f"Row 1. {WORDS}" in context
    assert "Which word is number 1?" not in context
    assert question.endswith("Question: Which word is number 1?\nAnswer:")
    assert not examples[1].templated


def test_braces_in_rows_are_nobodys_business(loaded: LoadedModel, tmp_path: Path) -> None:
    row = longbench_row(context="a {input} {context} {0} b", input="c {context} d")
    write_rows(tmp_path / "repobench-p.jsonl", [row])
    (example,) = LongBench(options(tmp_path, "repobench-p")).prepare(loaded)
    assert text_of(loaded, example).endswith(
        "code below.\na {input} {context} {0} bc {context} dNext line of code:\n"
    )


def test_the_official_prompts_are_used_where_they_are(loaded: LoadedModel, tmp_path: Path) -> None:
    longbench(tmp_path, "qasper_e")
    ours = LongBench(options(tmp_path, "qasper_e"))
    ours.prepare(loaded)
    official = tmp_path / "config" / "dataset2prompt.json"
    official.parent.mkdir()
    official.write_text(json.dumps({"qasper": "Look: {context}! {input}? {input}"}))
    task = LongBench(options(tmp_path, "qasper_e", limit=1))
    (example,) = task.prepare(loaded)
    asked = "Which word is number 0?"
    assert text_of(loaded, example) == f"Look: Row 0. {WORDS}! {asked}? {asked}"
    assert ours.settings()["prompts"] == "commvq"
    assert task.settings()["prompts"].startswith("official, ")
    official.write_text(json.dumps({"qasper": "{input}"}))
    with pytest.raises(InputError, match="no prompt of qasper with"):
        LongBench(options(tmp_path, "qasper_e"))


def test_long_prompts_lose_their_middle_and_leave_room_for_the_answer(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    task = LongBench(options(longbench(tmp_path, "hotpotqa"), "hotpotqa", max_length=300))
    for example in task.prepare(loaded):
        assert len(example.ids) == 300 - 32
        assert example.full_length > 300
        text = text_of(loaded, example)
        assert text.startswith("Use the passages below")
        assert text.endswith("?\nAnswer:")
    settings = task.settings()
    assert settings["max_length"] == 300
    assert settings["max_new_tokens"] == {"hotpotqa": 32}


def test_an_answer_takes_at_most_half_of_a_short_context(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    task = LongBench(options(longbench(tmp_path, "multi_news"), "multi_news", max_length=400))
    assert {len(example.ids) for example in task.prepare(loaded)} == {200}
    assert task.settings()["max_new_tokens"] == {"multi_news": 200}


def test_without_a_limit_the_models_own_context_counts(loaded: LoadedModel, tmp_path: Path) -> None:
    task = LongBench(options(longbench(tmp_path, "lcc", rows=1), "lcc"))
    task.prepare(loaded)
    assert task.settings()["max_length"] == 4096
    with pytest.raises(InputError, match="takes at most 4,096 tokens"):
        LongBench(options(tmp_path, "lcc", max_length=5000)).prepare(loaded)


def test_a_question_without_room_names_its_row(loaded: LoadedModel, tmp_path: Path) -> None:
    write_rows(tmp_path / "lcc.jsonl", [longbench_row(), longbench_row()])
    with pytest.raises(InputError, match=r"lcc, row 1: 2 tokens have no room.*--max-length"):
        LongBench(options(tmp_path, "lcc", max_length=4)).prepare(loaded)


@pytest.mark.parametrize(
    ("name", "answer", "prediction", "score"),
    [
        ("qasper", "The blue cat", "blue cat!", 1),
        ("multifieldqa_zh", "北京。", "北京", 1),
        ("gov_report", "a b. c d", "c d. a b", 1),
        ("vcsum", "我来到北京", "我来到北京", 1),
        ("dureader", "我来到北京", "我来到上海", 2 / 3),
        ("trec", "Food", "Food or Sport", 1 / 2),
        ("passage_count", "7", "It is 7.", 1),
        ("passage_retrieval_en", "Paragraph 7", "Paragraph 7 of 30", 1 / 2),
        ("passage_retrieval_zh", "段落7", "段落7", 1),
        ("lcc", "return x", "# comment\nreturn x", 1),
        ("repobench-p_e", "return x", "return y", 0.88),
    ],
)
def test_every_metric_is_the_benchmarks(
    name: str, answer: str, prediction: str, score: float, tmp_path: Path
) -> None:
    reference = {"answers": ["never", answer], "all_classes": ["Food", "Sport"]}
    found = LongBench(options(tmp_path, name)).score(name, prediction, reference)
    assert found == pytest.approx(score, abs=1e-7)


def test_no_right_answer_scores_nothing(tmp_path: Path) -> None:
    assert LongBench(options(tmp_path, "qasper")).score("qasper", "x", {"answers": []}) == 0


def records(**scores: list[float]) -> list[dict[str, Any]]:
    return [
        {"subset": name, "score": score, "length": 3000 + 3000 * number}
        for name, values in scores.items()
        for number, score in enumerate(values)
    ]


def test_averages_are_over_subsets_and_in_percent(tmp_path: Path) -> None:
    task = LongBench(options(tmp_path, "qasper", "lcc"))
    metrics = task.metrics(records(qasper=[0.0, 1.0], lcc=[0.2]), [])
    assert metrics == {
        "score": pytest.approx(35),
        "qasper": pytest.approx(50),
        "lcc": pytest.approx(20),
    }


def test_the_papers_eight_have_an_average_of_their_own(tmp_path: Path) -> None:
    task = LongBench(options(tmp_path, "paper8", "lsht"))
    scores = {name: [1.0 if name == "lcc" else 0.0] for name in (*PAPER8, "lsht")}
    metrics = task.metrics(records(**scores), [])
    assert metrics["score_paper8"] == pytest.approx(100 / 8)
    assert metrics["score"] == pytest.approx(100 / 9)


def test_longbench_e_is_averaged_by_length(tmp_path: Path) -> None:
    task = LongBench(options(tmp_path, "trec_e", "lcc_e"))
    # Lengths 3000, 6000, 9000 and, for the second, 3000 and 6000.
    metrics = task.metrics(records(trec_e=[1.0, 0.5, 0.25], lcc_e=[0.0, 0.1]), [])
    assert metrics["lengths"] == {
        "0-4k": pytest.approx(50),
        "4-8k": pytest.approx(30),
        "8k+": pytest.approx(25),
    }


def test_scores_by_length_are_shown_for_all_subsets_or_for_each() -> None:
    def shown(*lengths: Any) -> Any:
        entries = [{"codec": f"c{n}", "metrics": {"lengths": one}} for n, one in enumerate(lengths)]
        return length_rows({"results": entries})

    names = ["subset", "length", "c0", "c1"]
    assert shown({"0-4k": 1.0}, {"0-4k": 2.0}) == (names, [["all", "0-4k", 1.0, 2.0]])
    assert shown({"passkey": {"64": 1.0}}, {"passkey": {"64": 2.0}}) == (
        names,
        [["passkey", "64", 1.0, 2.0]],
    )
    assert length_rows({"results": [{"metrics": {}}]}) is None


def test_rows_without_classes_are_refused_where_they_count(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    write_rows(tmp_path / "trec.jsonl", [longbench_row(all_classes=["Food"]), longbench_row()])
    with pytest.raises(InputError, match=r"trec\.jsonl:2: field 'all_classes' holds null"):
        LongBench(options(tmp_path, "trec")).prepare(loaded)


def test_it_runs_through_every_codec_and_records_every_answer(
    loaded: LoadedModel, codecs: list[EvalCodec], tmp_path: Path
) -> None:
    folder = longbench(tmp_path, "hotpotqa", "trec", rows=2)
    task = LongBench(options(folder, "hotpotqa", "trec", max_length=200))
    result = evaluate(loaded, codecs, task)
    json.dumps(result, allow_nan=False)
    for entry in result["results"]:
        assert set(entry["metrics"]) == {"score", "hotpotqa", "trec"}
        first = entry["examples"][0]
        assert first["answers"] == ["word0", "another"]
        assert first["id"] == "id-0"
        assert first["context"] == 168 < first["context_before_truncation"]
        assert isinstance(first["prediction"], str)
        assert "\n" not in entry["examples"][2]["prediction"]
    sources = result["settings"]["sources"]
    assert [source["rows"] for source in sources] == [2, 2]
    assert len(sources[0]["sha256"]) == 64
    names, cells = subset_rows(result) or ([], [])
    assert names == ["subset", "examples", "fp16", "commvq-0.5bit"]
    assert [row[:2] for row in cells] == [["hotpotqa", 2], ["trec", 2]]
    assert "score" in summary_rows(result)[0]


def test_reading_rows_shows_its_progress(loaded: LoadedModel, tmp_path: Path) -> None:
    said: list[str] = []

    class Watching(Silent):
        def task(self, description: str, *more: Any, **named: Any) -> Any:
            said.append(description)
            return super().task(description, *more, **named)

    folder = longbench(tmp_path, "hotpotqa", "trec", rows=1)
    task = LongBench(options(folder, "hotpotqa", "trec", max_length=200))
    evaluate(loaded, resolve_codecs(loaded), task, progress=Watching())
    assert said == ["reading hotpotqa", "reading trec", "longbench fp16"]


def test_every_codec_is_fed_the_same_tokens(
    loaded: LoadedModel, codecs: list[EvalCodec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By construction: watched where tokens enter the model, whatever the task believes.

    A beginning that was run for another cache counts as entering with the cache it is put into.
    """
    fed: list[list[int]] = []
    ran: list[int] = []  # tokens for the beginning that a cache is filled with
    fill = Beginnings.fill

    def watch(module: Any, arguments: Any) -> None:
        fed[-1].extend(arguments[0].flatten().tolist())

    def watched(self: Beginnings, cache: Any, model: Any, ids: Any, mask: Any, most: int) -> int:
        before = len(fed[-1])
        count = fill(self, cache, model, ids, mask, most)
        ran.append(len(fed[-1]) - before)
        fed[-1][:] = ids[0, :count].tolist()  # the cache was empty
        return count

    folder = longbench(tmp_path, "hotpotqa", rows=2)
    task = LongBench(options(folder, "hotpotqa", max_length=200))

    def opened(codec: EvalCodec) -> EvalCodec:
        def fresh(strict: bool) -> Any:
            fed.append([])
            return codec.open(strict)

        return replace(codec, open=fresh)

    monkeypatch.setattr(Beginnings, "fill", watched)
    handle = loaded.model.get_input_embeddings().register_forward_pre_hook(watch)
    try:
        result = evaluate(loaded, [opened(codec) for codec in codecs], task)
    finally:
        handle.remove()
    prompts = [tokens[:168] for tokens in fed]
    assert len(prompts) == 4
    assert prompts[::2] == prompts[1::2]
    assert [example.ids.tolist() for example in task.prepare(loaded)] == prompts[::2]
    assert ran[0] > 0
    assert ran[1::2] == [0, 0]  # it ran for the first cache already
    hashes = [[r["prompt_sha256"] for r in entry["examples"]] for entry in result["results"]]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 2


def test_running_twice_gives_the_same_numbers(
    loaded: LoadedModel, codecs: list[EvalCodec], tmp_path: Path
) -> None:
    folder = longbench(tmp_path, "hotpotqa", rows=2)
    first, second = (
        evaluate(loaded, codecs, LongBench(options(folder, "hotpotqa", max_length=200)))
        for _ in range(2)
    )
    assert first["run_key"] == second["run_key"]
    for one, two in zip(first["results"], second["results"], strict=True):
        assert one["metrics"] == two["metrics"]
        assert [r["prediction"] for r in one["examples"]] == [
            r["prediction"] for r in two["examples"]
        ]


def test_batches_give_the_answers_of_single_examples(
    loaded: LoadedModel, codecs: list[EvalCodec], tmp_path: Path
) -> None:
    """Contexts and questions of several lengths: codes and answers are the same."""
    rows = [
        longbench_row(
            number, context=WORDS[: 700 - 200 * number], input="And which is it" + "?" * number
        )
        for number in range(3)
    ]
    write_rows(tmp_path / "hotpotqa.jsonl", rows)
    found = {}
    for size in (None, 2):
        task = LongBench(options(tmp_path, "hotpotqa", batch_size=size))
        examples = task.prepare(loaded)
        assert len({len(example.ids) for example in examples}) == 3
        assert len({len(example.ids) - example.split for example in examples}) > 1
        assert len({task.batch_key(example) for example in examples}) == 1
        result = evaluate(loaded, codecs, task)
        assert result["settings"]["batch_size"] == (size or 1)
        found[size] = [
            (record["prediction"], record["prompt_sha256"])
            for entry in result["results"]
            for record in entry["examples"]
        ]
    assert found[None] == found[2]
    assert len({prediction for prediction, _ in found[None]}) > 2


def test_options_of_other_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task longbench has no use for --depths"):
        make_task("longbench", EvalOptions(depths=(0,)))
    for name in ("perplexity", "kv"):
        with pytest.raises(InputError, match=f"task {name} has no use for --subset"):
            make_task(name, EvalOptions(subsets=("trec",)))
        with pytest.raises(InputError, match=f"task {name} has no use for --data-dir"):
            make_task(name, EvalOptions(data_dir=tmp_path))
    for name in ("longbench", "infinitebench", "gsm8k", "kv", "passkey"):
        with pytest.raises(InputError, match=f"task {name} has no use for --dataset"):
            make_task(name, EvalOptions(datasets=("essays.txt",)))
