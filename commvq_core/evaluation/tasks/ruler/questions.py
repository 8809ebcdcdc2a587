"""RULER's two question tasks: SQuAD and HotpotQA, the right paragraphs among many others."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commvq_core.errors import InputError
from commvq_core.evaluation.tasks.ruler.draft import Draft, Kit
from commvq_core.files import sha256_of_file

QUESTION_FILES = {
    "qa_1": ("squad.json", "dev-v2.0.json", "dev-v1.1.json"),
    "qa_2": ("hotpotqa.json", "hotpot_dev_distractor_v1.json"),
}
_ORDER = "Answer the question based on the given documents. Only give me the answer and do not "


@dataclass(frozen=True)
class Question:
    """`gold` and `related` are indices of documents: those to answer from, and their like."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...]


@dataclass(frozen=True)
class QuestionSet:
    """The documents and questions of one file."""

    documents: list[str]
    questions: list[Question]
    path: str
    sha256: str


def find_questions(data_dir: Path | None, subset: str) -> Path | None:
    """The file of a question task in the folder, if it is there."""
    paths = [] if data_dir is None else [data_dir / name for name in QUESTION_FILES[subset]]
    return next((path for path in paths if path.is_file()), None)


def read_questions(path: Path, subset: str) -> QuestionSet:
    """Read SQuAD's or HotpotQA's official JSON; raises InputError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        documents, questions = _squad(value) if subset == "qa_1" else _hotpot(value)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = {"qa_1": "SQuAD", "qa_2": "HotpotQA"}[subset]
        raise InputError(
            f"{path} is not in the format of {what} ({type(error).__name__}: {error})",
            f"give the official file ({QUESTION_FILES[subset][-1]})",
        ) from error
    if not questions:
        raise InputError(f"{path} has no question with an answer", "give the official file")
    return QuestionSet(documents, questions, str(path), sha256_of_file(path))


def _squad(value: Any) -> tuple[list[str], list[Question]]:
    documents: dict[str, int] = {}
    questions = []
    for article in value["data"]:
        own = [
            documents.setdefault(str(part["context"]), len(documents))
            for part in article["paragraphs"]
        ]
        for index, part in zip(own, article["paragraphs"], strict=True):
            related = tuple(dict.fromkeys(other for other in own if other != index))
            questions += [
                Question(str(qa["question"]), answers, (index,), related)
                for qa in part["qas"]
                if not qa.get("is_impossible", False)
                and (answers := tuple(dict.fromkeys(str(a["text"]) for a in qa["answers"])))
            ]
    return list(documents), questions


def _hotpot(value: Any) -> tuple[list[str], list[Question]]:
    documents: dict[str, int] = {}
    questions = []
    for row in value:
        gold = tuple(
            documents.setdefault(f"{title}\n{''.join(sentences)}", len(documents))
            for title, sentences in row["context"]
        )
        gold = tuple(dict.fromkeys(gold))
        questions.append(Question(str(row["question"]), (str(row["answer"]),), gold, ()))
    return list(documents), questions


def draw_question(kit: Kit, subset: str, length: int, number: int, source: random.Random) -> Draft:
    """The `number`-th question with its documents, and as many others as there is room for.

    Questions whose own documents take more than half of `length` tokens are passed over; documents
    of the same article come before those of others. Raises InputError when no question is left.
    """
    data = kit.questions[subset]
    documents = data.documents
    fitting = (
        question
        for question in data.questions
        if sum(_size(kit, documents[at]) for at in question.gold) <= length // 2
    )
    question = next((one for place, one in enumerate(fitting) if place == number), None)
    if question is None:
        raise InputError(
            f"{data.path} has no {number + 1} questions that fit in {length:,} tokens",
            "give a smaller --limit or longer --lengths",
        )
    gold = list(question.gold)

    def fill(room: int) -> list[int]:
        chosen = list(gold)
        room -= _needed(kit, documents, gold)
        for at in _others(question, len(documents), source):
            need = _size(kit, documents[at]) + _number_size(kit, len(chosen))
            if need > room:
                break
            room -= need
            chosen.append(at)
        source.shuffle(chosen)
        return [
            token
            for place, at in enumerate(chosen)
            for token in [*kit.ids(_heading(place)), *kit.ids(_body(documents[at]))]
        ]

    return Draft(
        f"{_ORDER}output any other words.\n\nThe following are given documents.\n\n",
        f"{_ORDER}output any other words.\n\nQuestion: {question.text}",
        "Answer:",
        question.answers,
        fill,
        _needed(kit, documents, gold),
        any_will_do=True,
    )


def _others(question: Question, count: int, source: random.Random) -> Iterator[int]:
    """The related documents and then all others, each in random order."""
    taken = {*question.gold, *question.related}
    yield from source.sample(question.related, len(question.related))
    order = source.sample(range(count), count)
    yield from (at for at in order if at not in taken)


def _needed(kit: Kit, documents: list[str], gold: list[int]) -> int:
    return sum(
        _size(kit, documents[at]) + _number_size(kit, place) for place, at in enumerate(gold)
    )


def _heading(place: int) -> str:
    return f"Document {place + 1}:\n"


def _body(document: str) -> str:
    return f"{document}\n\n"


def _number_size(kit: Kit, place: int) -> int:
    return len(kit.ids(_heading(place)))


def _size(kit: Kit, document: str) -> int:
    return len(kit.ids(_body(document)))
