"""RULER: every generator keeps to its length and hides what it asks for; scoring; files."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from commvq_core.errors import InputError
from commvq_core.evaluation.codecs import EvalCodec
from commvq_core.evaluation.haystack import NOISE
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.report import grid_rows, subset_rows
from commvq_core.evaluation.runner import evaluate
from commvq_core.evaluation.scoring.strings import string_match_all, string_match_part
from commvq_core.evaluation.tasks.ruler import Ruler
from commvq_core.evaluation.tasks.ruler.needles import NEEDLES
from commvq_core.evaluation.tasks.ruler.task import SUBSETS, RulerExample
from commvq_core.evaluation.tasks.ruler.words import FIRST, SECOND, made_words
from commvq_core.models import LoadedModel
from tests.cli.helpers import refusal, succeed_json

MADE = SUBSETS[:-2]  # all but the questions
NEW_TOKENS = {
    **dict.fromkeys(NEEDLES, 128),
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}
LENGTH = 3000  # the tiny tokenizer needs three times the tokens of a real one


@pytest.fixture(scope="module")
def options(tiny_text_file: Path) -> dict[str, Any]:
    return {"datasets": (str(tiny_text_file),), "lengths": (LENGTH,), "limit": 3, "chat": False}


@pytest.fixture(scope="module")
def examples(loaded: LoadedModel, options: dict[str, Any]) -> dict[str, list[RulerExample]]:
    """Three examples of every subset that needs no file."""
    found: dict[str, list[RulerExample]] = {}
    for example in Ruler(EvalOptions(**options)).prepare(loaded):
        found.setdefault(example.subset, []).append(example)
    assert tuple(found) == MADE
    return found


def text_of(loaded: LoadedModel, example: RulerExample) -> str:
    return loaded.tokenizer.decode(example.prompt.context + example.prompt.question)


def context_of(loaded: LoadedModel, example: RulerExample) -> str:
    return loaded.tokenizer.decode(example.prompt.context)


def question_of(loaded: LoadedModel, example: RulerExample) -> str:
    return loaded.tokenizer.decode(example.prompt.question)


@pytest.mark.parametrize("subset", MADE)
def test_prompt_and_answer_fill_the_length_and_no_more(
    examples: dict[str, list[RulerExample]], subset: str
) -> None:
    # What one more line, word three times over, or rank of words would have taken.
    spare = {"niah_multikey_2": 60, "niah_multikey_3": 110, "cwe": 60, "fwe": 40}.get(subset, 0)
    for example in examples[subset]:
        prompt = len(example.prompt.context) + len(example.prompt.question)
        assert LENGTH - spare <= prompt + NEW_TOKENS[subset] <= LENGTH


@pytest.mark.parametrize("subset", MADE)
def test_the_seed_decides_the_examples(
    loaded: LoadedModel, options: dict[str, Any], subset: str
) -> None:
    def made(seed: int) -> tuple[list[tuple[str, ...]], str]:
        task = Ruler(EvalOptions(**{**options, "subsets": (subset,), "seed": seed, "limit": 2}))
        found = [example.expected for example in task.prepare(loaded)]
        return found, task.settings()["examples_sha256"]

    first, second = made(1), made(1)
    assert first == second
    assert made(2)[0] != first[0]
    assert len(set(first[0])) == 2


@pytest.mark.parametrize("subset", list(NEEDLES))
def test_what_is_asked_for_is_hidden(
    loaded: LoadedModel, examples: dict[str, list[RulerExample]], subset: str
) -> None:
    kind = NEEDLES[subset]
    values = r"\d{7}" if kind.value_kind == "numbers" else r"[0-9a-f]{8}-[0-9a-f-]{27}"
    for example in examples[subset]:
        context, question = context_of(loaded, example), question_of(loaded, example)
        hidden = re.findall(
            rf"(?m)^One of the special magic {kind.value_kind} for (\S+) is: ({values})\.$",
            context,
        )
        more = kind.haystack == "needles"
        assert len(hidden) > 20 if more else len(hidden) == kind.keys * kind.values
        of_key: dict[str, list[str]] = {}
        for key, value in hidden:
            of_key.setdefault(key, []).append(value)
        asked = [key for key in of_key if key in question]
        assert len(asked) == kind.asked
        wanted = Counter(value for key in asked for value in of_key[key])
        assert Counter(example.expected) == wanted
        assert sum(wanted.values()) == kind.asked * kind.values
        several = len(example.expected) > 1
        assert question.endswith(" provided text are" if several else " provided text is")
        assert not any(value in question for value in example.expected)


@pytest.mark.parametrize(
    ("subset", "filler"), [("niah_single_1", "The grass is green."), ("niah_single_2", "etaoin")]
)
def test_needles_are_in_the_right_kind_of_text(
    loaded: LoadedModel, examples: dict[str, list[RulerExample]], subset: str, filler: str
) -> None:
    texts = [context_of(loaded, example) for example in examples[subset]]
    assert all((NOISE in text) == (subset == "niah_single_1") for text in texts)
    places = [text.index("One of the special") / len(text) for text in texts]
    assert len(set(places)) == 3


def test_multikey_needles_lie_anywhere_among_their_like(loaded: LoadedModel) -> None:
    task = Ruler(EvalOptions(lengths=(2000,), limit=8, subsets=("niah_multikey_2",)))
    places = []
    for example in task.prepare(loaded):
        lines = context_of(loaded, example).split("\n")
        places.append(next(i for i, line in enumerate(lines) if example.expected[0] in line))
    assert max(places) - min(places) > 8


def test_a_chain_of_variables_comes_in_order(
    loaded: LoadedModel, examples: dict[str, list[RulerExample]]
) -> None:
    for example in examples["vt"]:
        context, question = context_of(loaded, example), question_of(loaded, example)
        lines = re.findall(r"(?m)^VAR (\w{5}) = (?:VAR (\w{5})|(\d{5}))$", context)
        assert tuple(line[0] for line in lines) == example.expected
        assert [line[1] for line in lines] == ["", *example.expected[:-1]]
        value = lines[0][2]
        assert f"assigned the value {value} in the text above" in question
        assert question.endswith(f"5 variables are assigned the value {value}, they are:")


def test_a_worked_example_comes_before_the_variables(
    loaded: LoadedModel, examples: dict[str, list[RulerExample]]
) -> None:
    context = context_of(loaded, examples["vt"][0])
    shot = re.findall(r"(?m)^VAR (\w{3}) = ", context)
    assert len(shot) == 5
    assert f"they are: {' '.join(shot)}\n\nMemorize and track" in context


@pytest.mark.parametrize(("length", "often", "seldom"), [(3000, 6, 1), (12000, 30, 3)])
def test_ten_words_are_more_common_than_the_others(
    loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    often: int,
    seldom: int,
) -> None:
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 16384)
    (example,) = Ruler(EvalOptions(lengths=(length,), limit=1, subsets=("cwe",))).prepare(loaded)
    lists = context_of(loaded, example).split("Memorize the ones that appear most often.\n")[1:]
    shown, listed = (re.findall(r"(\d+)\. ([a-z]+)", text) for text in lists)
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    common = {word for word, count in counts.items() if count == often}
    assert common == set(example.expected)
    assert {count for word, count in counts.items() if word not in common} == {seldom}
    assert not common & {word for _, word in shown}
    assert not any(one in word for one in common for word in counts if word != one)
    answer = re.findall(r"\d+\. ([a-z]+)", lists[0].split("in the list are:")[1])
    first = Counter(word for _, word in shown[: -len(answer)])
    assert {word for word, _ in first.most_common(10)} == set(answer)


def test_coded_words_follow_zipfs_law(
    loaded: LoadedModel, examples: dict[str, list[RulerExample]]
) -> None:
    for example in examples["fwe"]:
        text = context_of(loaded, example).split("coded words.")[1]
        ranked = Counter(text.split()).most_common()
        assert ranked[0][0] == "..."
        assert tuple(word for word, _ in ranked[1:4]) == example.expected
        assert ranked[3][1] > ranked[4][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        for rank in (2, 3, 4):
            assert ranked[rank - 1][1] == pytest.approx(ranked[0][1] / rank**2, abs=1)


def test_made_words_differ_and_none_holds_another() -> None:
    simple = [*FIRST, *SECOND]
    assert not any(one in other for one in simple for other in simple if one != other)
    pairs = list(islice(made_words(random.Random(0), ""), len(FIRST) * len(SECOND) + 50))
    assert len(set(pairs)) == len(pairs)
    known = set(pairs[: len(FIRST) * len(SECOND)])
    shortest = min(map(len, known))
    for word in known:
        inside = {
            word[start:stop]
            for start in range(len(word))
            for stop in range(start + shortest, len(word) + 1)
        }
        assert inside & known == {word}


# Questions about documents.


def write_squad(folder: Path) -> list[str]:
    """40 articles of 3 paragraphs, each with a question that it answers and one that none does."""
    articles = [
        {
            "paragraphs": [
                {
                    "context": f"In town {article} street {part} there is a tower "
                    f"of {article * 100 + part} bricks.",
                    "qas": [
                        {
                            "question": f"Town {article} street {part}: how many bricks?",
                            "is_impossible": False,
                            "answers": [{"text": f"{article * 100 + part} bricks"}] * 2,
                        },
                        {"question": "Why?", "is_impossible": True, "answers": []},
                    ],
                }
                for part in range(3)
            ]
        }
        for article in range(40)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    return [p["context"] for article in articles for p in article["paragraphs"]]


def write_hotpot(folder: Path) -> None:
    rows = [
        {
            "question": f"Which is older, {row} or {row + 1}?",
            "answer": f"number {row}",
            "context": [
                [f"Title {row + at}", [f"The age of number {row + at} ", f"is {99 - row - at}."]]
                for at in range(2)
            ],
        }
        for row in range(60)
    ]
    (folder / "hotpot_dev_distractor_v1.json").write_text(json.dumps(rows))


def test_the_right_paragraph_is_among_as_many_others_as_fit(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    paragraphs = write_squad(tmp_path)
    task = Ruler(EvalOptions(lengths=(1500,), limit=12, subsets=("qa_1",), data_dir=tmp_path))
    found = task.prepare(loaded)
    places = set()
    for example in found:
        context, question = context_of(loaded, example), question_of(loaded, example)
        prompt = len(example.prompt.context) + len(example.prompt.question)
        assert 1500 - 90 <= prompt + 32 <= 1500
        documents = re.findall(r"Document (\d+):\n(.*)\n\n", context)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        texts = [text for _, text in documents]
        assert len(set(texts)) == len(texts) > 8
        assert set(texts) <= set(paragraphs)
        asked = re.search(r"Question: Town (\d+) street (\d+): how many", question)
        assert asked is not None
        article, part = map(int, asked.groups())
        places.add(texts.index(paragraphs[article * 3 + part]))
        # The others of its article come before those of other articles.
        assert all(paragraphs[article * 3 + other] in texts for other in range(3))
        assert example.expected == (f"{article * 100 + part} bricks",)
        assert example.score(f"It has {article * 100 + part} BRICKS, I think") == 1
    assert len({example.expected for example in found}) == 12
    assert len(places) > 4


def test_hotpots_documents_have_titles(loaded: LoadedModel, tmp_path: Path) -> None:
    write_hotpot(tmp_path)
    task = Ruler(EvalOptions(lengths=(1500,), limit=4, data_dir=tmp_path, subsets=("qa_2",)))
    for example in task.prepare(loaded):
        asked = re.search(r"Which is older, (\d+) or (\d+)", question_of(loaded, example))
        assert asked is not None
        for number in map(int, asked.groups()):
            document = f"Title {number}\nThe age of number {number} is {99 - number}."
            assert document in context_of(loaded, example)
    (source,) = task.settings()["sources"]
    assert source["name"].endswith("hotpot_dev_distractor_v1.json")
    assert len(source["sha256"]) == 64


def test_questions_take_part_when_their_file_is_there(tmp_path: Path) -> None:
    write_squad(tmp_path)
    assert Ruler(EvalOptions(data_dir=tmp_path))._subsets == (*MADE, "qa_1")
    assert Ruler(EvalOptions())._subsets == MADE


def test_what_is_missing_or_broken_is_named(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"qa_1 asks .* --data-dir .* squad\.json"):
        Ruler(EvalOptions(subsets=("vt", "qa_1")))
    with pytest.raises(InputError, match="no subset nonsense: give --subset one of niah_single_1"):
        Ruler(EvalOptions(subsets=("nonsense",)))
    with pytest.raises(InputError, match="has no file of ruler"):
        Ruler(EvalOptions(data_dir=tmp_path))
    (tmp_path / "hotpotqa.json").write_text('[{"question": "?"}]')
    task = Ruler(EvalOptions(data_dir=tmp_path, subsets=("qa_2",)))
    with pytest.raises(InputError, match=r"hotpotqa\.json is not in the format of HotpotQA"):
        task.prepare(loaded)
    with pytest.raises(InputError, match=r"no room for niah_multiquery: give lengths of at least"):
        Ruler(EvalOptions(lengths=(300,), subsets=("niah_multiquery",))).prepare(loaded)
    with pytest.raises(InputError, match="at most 4,096 tokens"):
        Ruler(EvalOptions(lengths=(8192,), subsets=("vt",), limit=1)).prepare(loaded)
    write_squad(tmp_path)
    with pytest.raises(InputError, match="no 121 questions"):
        Ruler(EvalOptions(data_dir=tmp_path, subsets=("qa_1",), lengths=(600,), limit=121)).prepare(
            loaded
        )


def test_a_length_that_a_message_asks_for_is_enough(loaded: LoadedModel) -> None:
    for subset in ("niah_multikey_3", "niah_multiquery", "vt", "fwe"):
        with pytest.raises(InputError, match="at least") as refused:
            Ruler(EvalOptions(lengths=(140,), subsets=(subset,), limit=1)).prepare(loaded)
        least = int(re.sub(r"\D", "", str(refused.value).split("at least")[1].split("tokens")[0]))
        Ruler(EvalOptions(lengths=(least,), subsets=(subset,), limit=1)).prepare(loaded)


# Scores, and the files of RULER's own scripts.


def test_all_answers_count_or_any_of_them() -> None:
    assert string_match_all("Here are 12 and 34.", ["12", "34", "56", "78"]) == 0.5
    assert string_match_all("ABC", ["abc"]) == 1
    assert string_match_part("He was born in Paris", ["in Paris", "Paris, France"]) == 1
    assert string_match_part("Rome", ["Paris"]) == 0
    assert string_match_all("\x00a\x01b", ["a\nb"]) == 1


def write_made(folder: Path, subset: str, **extra: str) -> None:
    rows = [
        {
            "index": at,
            "input": f"Remember.\n{NOISE}The magic is {at}55.\n{NOISE}What is the magic?",
            "outputs": [f"{at}55", "nothing"],
            "length": 980 + at,
            **extra,
        }
        for at in range(4)
    ]
    path = folder / subset / "validation.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_ready_made_files_are_read_as_they_are(loaded: LoadedModel, tmp_path: Path) -> None:
    write_made(tmp_path, "niah_single_1")
    write_made(tmp_path, "qa_2", answer_prefix=" Answer:")
    task = Ruler(EvalOptions(data_dir=tmp_path, limit=2, subsets=("niah_single_1", "qa_2")))
    needle, _, question, _ = task.prepare(loaded)
    assert text_of(loaded, needle).endswith(f"The magic is 055.\n{NOISE}What is the magic?")
    assert question_of(loaded, needle) == "What is the magic?"
    assert question_of(loaded, question) == "What is the magic? Answer:"
    assert (needle.length, needle.expected) == (1024, ("055", "nothing"))
    assert needle.score("055") == 0.5
    assert question.score("055") == 1
    assert task.settings()["read_from_files"] == ["niah_single_1", "qa_2"]


def test_a_ready_made_row_without_a_field_is_named(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "vt.jsonl").write_text('{"input": "a", "outputs": ["b"], "length": "c"}\n')
    with pytest.raises(InputError, match=r"vt\.jsonl:1: field 'length'"):
        Ruler(EvalOptions(data_dir=tmp_path, subsets=("vt",))).prepare(loaded)


# Through the runner and the command.


def test_every_cache_gets_the_same_prompts_and_a_grid(
    loaded: LoadedModel, codecs: list[EvalCodec], tmp_path: Path
) -> None:
    write_made(tmp_path, "qa_2")
    task = Ruler(EvalOptions(data_dir=tmp_path, lengths=(1000,), limit=1, subsets=("vt", "qa_2")))
    result = evaluate(loaded, codecs, task)
    assert result["settings"]["lengths"] == [1000, 1024]
    for entry in result["results"]:
        assert set(entry["metrics"]["grid"]) == {"qa_2", "vt"}
        assert set(entry["metrics"]["subsets"]) == {"qa_2", "vt"}
        for record in entry["examples"]:
            assert {"subset", "length", "expected", "prediction", "score"} <= set(record)
    columns, cells = grid_rows(result) or ([], [])
    assert columns == ["cache", "subset", "1000 tokens", "1024 tokens"]
    assert [row[1] for row in cells] == ["vt", "qa_2"] * 2
    assert cells[0][3] is None
    assert subset_rows(result) is None


def test_metrics_are_means_over_subsets() -> None:
    task = Ruler(EvalOptions())
    cells = [("vt", 1000), ("vt", 1000), ("vt", 2000), ("cwe", 1000)]

    def records(scores: list[float]) -> list[dict[str, Any]]:
        rows = zip(cells, scores, strict=True)
        return [{"subset": s, "length": n, "score": score} for (s, n), score in rows]

    metrics = task.metrics(records([1, 0.5, 0, 0.5]), records([1, 1, 0.5, 0.5]))
    assert metrics["grid"] == {"vt": {"1000": 0.75, "2000": 0.0}, "cwe": {"1000": 0.5}}
    assert metrics["subsets"] == {"vt": 0.375, "cwe": 0.5}
    assert metrics["accuracy"] == pytest.approx(0.4375)
    assert metrics["kept"] == pytest.approx(2 / 3)


def test_the_command_draws_the_grid(
    tiny_model_dir: Path, tiny_artifact: Path, tmp_path: Path
) -> None:
    command = ("eval", tiny_model_dir, "--codebook", tiny_artifact, "--task", "ruler", "--quiet")
    command += ("--lengths", "1000", "--limit", 1, "--subset", "vt")
    result = succeed_json(*command, "--out", tmp_path / "r.json", "--png", tmp_path / "r.png")
    assert result["settings"]["subsets"] == ["vt"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    again = ("--out", tmp_path / "s.json", "--png", tmp_path / "r.png")
    assert "exists already" in refusal(*command, *again)
    other = ("eval", tiny_model_dir, "--task", "perplexity", "--png", tmp_path / "p.png")
    line = refusal(*other, "--out", tmp_path / "p.json")
    assert "task perplexity has no grid to draw" in line
