"""Every kind of ROUGE: worked by hand, and against the packages that benchmarks use."""

from __future__ import annotations

import random

import pytest
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

from commvq_core.evaluation.scoring.rouge import rouge_1, rouge_l, rouge_l_sum, rouge_l_unique


def test_words_in_order_count_once_each() -> None:
    # Hits: the, cat, mat. Different words: 4 of 5 in the prediction, 5 of 6 in the answer.
    got = rouge_l_unique("the cat the mat here", "the cat on the mat today")
    precision, recall = 3 / 4, 3 / 5
    assert got == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-7)


def test_sentences_end_at_full_stops_or_at_newlines() -> None:
    swapped, answer = "dogs bark. cats sleep", "cats sleep. dogs bark"
    assert rouge_l_unique(swapped, answer) == pytest.approx(1, abs=1e-7)
    assert rouge_l_sum(swapped, answer) == pytest.approx(0.5)
    assert rouge_l_sum("Dogs bark\nCats sleep!", "cats sleep\ndogs bark") == pytest.approx(1)


def test_texts_without_words_score_nothing() -> None:
    for text in ("", "...", "\n"):
        assert rouge_l_unique(text, "a b") == 0
        assert rouge_l_sum(text, "a b") == 0
        assert rouge_l_sum("a b", text) == 0
    assert rouge_l_unique("a b", "c d") == rouge_l_sum("a b", "c d") == 0


def texts(seed: int) -> tuple[str, str]:
    source = random.Random(seed)
    words = ["the", "a", "cat", "Cat", "dog", "sat", "on", "mat", "it's", "42", "né", "x-y"]
    ends = [". ", ".", " ", " ", " ", "\n", "! ", "  "]
    return tuple(  # type: ignore[return-value]
        "".join(source.choice(words) + source.choice(ends) for _ in range(source.randint(1, 40)))
        for _ in range(2)
    )


@pytest.mark.parametrize("seed", range(40))
def test_it_is_what_the_package_rouge_gives(seed: int) -> None:
    prediction, answer = texts(seed)
    want = Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    assert rouge_l_unique(prediction, answer) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_what_the_package_rouge_score_gives(seed: int) -> None:
    prediction, answer = texts(seed)
    want = RougeScorer(["rougeLsum"]).score(answer, prediction)["rougeLsum"].fmeasure
    assert rouge_l_sum(prediction, answer) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("seed", range(50))
def test_rouge_of_a_whole_text_is_that_of_the_package_rouge_score(seed: int) -> None:
    prediction, answer = texts(seed)
    scorer = RougeScorer(["rouge1", "rougeL"])
    want = scorer.score(answer, prediction)
    assert rouge_1(prediction, answer) == pytest.approx(want["rouge1"].fmeasure)
    assert rouge_l(prediction, answer) == pytest.approx(want["rougeL"].fmeasure)
