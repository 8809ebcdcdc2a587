"""The needle task: prompts of exact length, the needle where it should be, and scoring."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from commvq_core.errors import InputError
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.prompts import wrap_prompt
from commvq_core.evaluation.tasks.grid import GridExample
from commvq_core.evaluation.tasks.niah import Needle
from commvq_core.evaluation.tasks.passkey import Passkey
from commvq_core.models import LoadedModel

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def options(tiny_text_file: Path) -> EvalOptions:
    return EvalOptions(
        datasets=(str(tiny_text_file),), lengths=(500, 900), depths=(0, 50, 100), limit=2
    )


def text_of(loaded: LoadedModel, example: GridExample) -> str:
    return loaded.tokenizer.decode(example.prompt.context + example.prompt.question)


def test_prompts_have_exactly_the_length_asked_for(
    loaded: LoadedModel, options: EvalOptions
) -> None:
    examples = Needle(options).prepare(loaded)
    assert len(examples) == 2 * 3 * 2
    for example in examples:
        assert len(example.prompt.context) + len(example.prompt.question) == example.length


def test_the_needle_is_at_its_depth_at_the_end_of_a_line(
    loaded: LoadedModel, options: EvalOptions
) -> None:
    for example in Needle(options).prepare(loaded):
        text = text_of(loaded, example)
        needle = f"\nThe special magic number is {example.number}.\n"
        assert text.count(example.number) == 1
        before, after = text.split(needle)
        assert before.endswith("\n") or example.depth == 100
        hay = before.split("afterwards.\n\n", 1)[1], after.split("\n\nWhat is")[0]
        depth = 100 * len(hay[0]) / (len(hay[0]) + len(hay[1]))
        assert depth == pytest.approx(example.depth, abs=16)


def test_a_text_without_line_ends_does_as_well(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("words without end " * 2000)
    task = Needle(EvalOptions(datasets=(str(path),), lengths=(600,), depths=(50,)))
    (example,) = task.prepare(loaded)
    before, after = text_of(loaded, example).split(f"magic number is {example.number}.")
    assert len(before) == pytest.approx(len(after), rel=0.2)


def test_a_text_shorter_than_the_context_goes_round(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("one line only\n")
    (example,) = Needle(EvalOptions(datasets=(str(path),), lengths=(600,), depths=(0,))).prepare(
        loaded
    )
    assert text_of(loaded, example).count("one line only") > 5


def test_the_seed_decides_the_numbers(loaded: LoadedModel, tiny_text_file: Path) -> None:
    def settings(seed: int) -> tuple[list[str], str]:
        task = Needle(EvalOptions(datasets=(str(tiny_text_file),), lengths=(500,), seed=seed))
        examples = task.prepare(loaded)
        return [example.number for example in examples], task.settings()["examples_sha256"]

    assert settings(1) == settings(1)
    assert settings(1)[0] != settings(2)[0]
    assert settings(1)[1] != settings(2)[1]
    assert len(set(settings(1)[0])) == 5


def test_max_length_is_the_longer_of_two_lengths(loaded: LoadedModel, options: EvalOptions) -> None:
    task = Needle(EvalOptions(datasets=options.datasets, max_length=1000))
    task.prepare(loaded)
    assert task.settings()["lengths"] == [500, 1000]


def test_the_chat_template_is_used_and_recorded(
    loaded: LoadedModel, options: EvalOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Needle(options)
    plain = text_of(loaded, task.prepare(loaded)[0])
    assert task.settings()["chat_template"] is False
    monkeypatch.setattr(loaded.tokenizer, "chat_template", TEMPLATE)
    templated = text_of(loaded, task.prepare(loaded)[0])
    assert task.settings()["chat_template"] is True
    assert templated.startswith("<|user|>A special magic number")
    assert templated.endswith("text above?<|assistant|>The special magic number is")
    assert plain.startswith("A special magic number")
    assert plain.endswith("text above?\nThe special magic number is")


def test_tokens_that_a_tokenizer_puts_first_come_first(loaded: LoadedModel) -> None:
    class Tokenizer:
        bos_token_id = 7
        chat_template = None

        def __call__(
            self, text: str, add_special_tokens: bool = True, verbose: bool = True
        ) -> dict[str, list[int]]:
            ids = [ord(letter) for letter in text]
            return {"input_ids": [7, *ids] if add_special_tokens else ids}

    double: Any = type("Loaded", (), {"tokenizer": Tokenizer()})()
    frame = wrap_prompt(double, "a", "b", "c")
    assert frame.context == [7, ord("a")]
    assert frame.question == [ord("b"), ord("\n"), ord("c")]


def record(answer: str, correct: bool, length: int, depth: float) -> dict[str, Any]:
    return {"answer": answer, "correct": correct, "length": length, "depth": depth}


def test_metrics_count_what_was_found_and_what_was_kept(options: EvalOptions) -> None:
    task = Needle(EvalOptions(datasets=options.datasets, lengths=(64,), depths=(0, 100), limit=2))
    cells = [(64, 0.0), (64, 0.0), (64, 100.0), (64, 100.0)]
    full = [record("", ok, *cell) for ok, cell in zip([1, 1, 1, 0], cells, strict=True)]
    small = [record("", ok, *cell) for ok, cell in zip([1, 0, 1, 1], cells, strict=True)]
    metrics = task.metrics(small, full)
    assert metrics["accuracy"] == pytest.approx(0.75)
    assert metrics["kept"] == pytest.approx(2 / 3)
    assert metrics["grid"] == {"64": {"0": 0.5, "100": 1.0}}
    assert task.metrics(small, [record("", False, *cell) for cell in cells])["kept"] is None


def test_an_answer_is_scored_by_its_first_number(
    loaded: LoadedModel, options: EvalOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Needle(options)
    example = task.prepare(loaded)[0]
    answers = {f" {example.number}. Yes.": True, " 1 no": False, "": False}
    for answer, correct in answers.items():
        monkeypatch.setattr(
            "commvq_core.evaluation.tasks.grid.generate_after_context",
            lambda *arguments, said=answer, **options: said,
        )
        found = task.run(loaded, None, example)
        assert (found["correct"], found["answer"]) == (correct, answer.strip())


def test_lengths_without_room_are_refused(loaded: LoadedModel, options: EvalOptions) -> None:
    with pytest.raises(InputError, match=r"at least \d+ tokens"):
        Needle(EvalOptions(datasets=options.datasets, lengths=(20,))).prepare(loaded)
    with pytest.raises(InputError, match="at most 4,096 tokens"):
        Needle(EvalOptions(datasets=options.datasets, lengths=(4096,))).prepare(loaded)


# Several needles, and sentences.


def test_several_numbers_start_at_the_depth_and_spread_to_the_end(
    loaded: LoadedModel, tiny_text_file: Path
) -> None:
    task = Needle(
        EvalOptions(
            datasets=(str(tiny_text_file),), lengths=(900,), depths=(0, 50), limit=2, needles=3
        )
    )
    for example in task.prepare(loaded):
        assert len(example.prompt.context) + len(example.prompt.question) == 900
        text = text_of(loaded, example)
        numbers = example.number.split(", ")
        assert len(set(numbers)) == 3
        hay = text.split("afterwards.\n\n", 1)[1].split("\n\nWhat are")[0]
        places = []
        for which, number in enumerate(numbers, start=1):
            needle = f"\nSpecial magic number {which} is {number}.\n"
            assert hay.count(needle) == 1
            places.append(100 * hay.index(needle) / len(hay))
        want = [example.depth + which * (100 - example.depth) / 3 for which in range(3)]
        assert places == pytest.approx(want, abs=16)


def test_of_several_numbers_the_share_that_was_found_counts(
    loaded: LoadedModel, options: EvalOptions
) -> None:
    task = Needle(EvalOptions(datasets=options.datasets, lengths=(500,), depths=(0,), needles=4))
    example = task.prepare(loaded)[0]
    numbers = example.number.split(", ")
    assert task.grade(example, f"They are {numbers[2]} and {numbers[0]}.")["correct"] == 0.5
    assert task.grade(example, example.number)["correct"] == 1
    assert task.grade(example, f"9{numbers[0]}")["correct"] == 0
    assert task.settings()["needles"] == 4
    assert task.settings()["max_new_tokens"] == 48
    shares = [{"correct": 0.5, "length": 500, "depth": 0.0}]
    whole = [{"correct": 1.0, "length": 500, "depth": 0.0}]
    assert task.metrics(shares, whole)["kept"] == 0.5


SENTENCES = ("The best thing to do in Ulm is to climb the tower.", "Bring a coat.")


@pytest.fixture
def told(loaded: LoadedModel, options: EvalOptions) -> Needle:
    task = Needle(
        EvalOptions(
            datasets=options.datasets,
            lengths=(900,),
            depths=(0, 100),
            needle=SENTENCES,
            question="What is there to do in Ulm?",
        )
    )
    task.prepare(loaded)
    return task


def test_the_users_sentences_are_hidden_and_asked_for(loaded: LoadedModel, told: Needle) -> None:
    for example in told.prepare(loaded):
        text = text_of(loaded, example)
        assert all(text.count(f"\n{sentence}\n") == 1 for sentence in SENTENCES)
        assert text.endswith("\n\nWhat is there to do in Ulm?\n")
    assert told.settings()["needle"] == "\n".join(SENTENCES)


def test_sentences_are_scored_exactly_and_by_rouge(loaded: LoadedModel, told: Needle) -> None:
    example = told.prepare(loaded)[0]
    said = told.grade(example, "the best thing to do in Ulm: climb the tower. Bring a coat!")
    assert said["correct"] == 0.5
    # 15 words hidden, 13 said, all of them hidden ones and in order ("is to" is missing).
    assert said["rouge_1"] == said["rouge_l"] == pytest.approx(2 * 13 / (15 + 13))
    turned = told.grade(example, "coat a bring")
    assert turned["rouge_1"] == pytest.approx(2 * 3 / 18)
    assert turned["rouge_l"] == pytest.approx(2 * 1 / 18)
    cells = [{**said, "length": 900, "depth": 0.0}, {**turned, "length": 900, "depth": 100.0}]
    metrics = told.metrics(cells, cells)
    assert metrics["grid"] == {"900": {"0": 0.5, "100": 0.0}}
    assert metrics["grid_rouge_1"]["900"]["100"] == pytest.approx(1 / 3)
    assert metrics["rouge_l"] == pytest.approx((26 / 28 + 2 / 18) / 2)


def test_what_is_hidden_is_said_once(options: EvalOptions) -> None:
    with pytest.raises(InputError, match="--needle and --question belong together"):
        Needle(EvalOptions(datasets=options.datasets, needle=SENTENCES))
    with pytest.raises(InputError, match="both say what is hidden"):
        Needle(EvalOptions(datasets=options.datasets, needle=SENTENCES, question="?", needles=2))
    with pytest.raises(InputError, match="empty --needle"):
        EvalOptions(needle=(" ",), question="?")


# Pass keys.


def test_a_pass_key_is_at_its_depth_in_filler_of_exact_length(loaded: LoadedModel) -> None:
    task = Passkey(EvalOptions(lengths=(1100, 1600), depths=(0, 50, 100)))
    examples = task.prepare(loaded)
    assert len(examples) == 6
    for example in examples:
        assert len(example.prompt.context) + len(example.prompt.question) == example.length
        text = text_of(loaded, example)
        key = f"The pass key is {example.number}. Remember it. {example.number} is the pass key.\n"
        before, after = text.split(key)
        assert re.fullmatch(r"\d{5}", example.number)
        filler = before.split("there.\n", 1)[1], after.split("\nWhat is the pass key?")[0]
        assert (filler[0] + filler[1]).startswith("The grass is green. The sky is blue.")
        depth = 100 * len(filler[0]) / (len(filler[0]) + len(filler[1]))
        assert depth == pytest.approx(example.depth, abs=16)
        assert text.endswith("\nWhat is the pass key?\nThe pass key is")
    assert task.settings()["needle"].startswith("The pass key is {number}")
    assert len({example.number for example in examples}) == 6
