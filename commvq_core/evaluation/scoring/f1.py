"""F1 of the words that an answer shares with the right one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from commvq_core.evaluation.scoring.words import chinese_words, normalized, normalized_chinese


def f1(prediction: str, answer: str) -> float:
    """Word F1 of two English texts, normalized as for SQuAD; 0 where they share no word."""
    return word_f1(normalized(prediction).split(), normalized(answer).split())


def f1_chinese(prediction: str, answer: str) -> float:
    """Word F1 of two Chinese texts, cut into words by jieba and these normalized (LongBench)."""
    cut = ([normalized_chinese(word) for word in chinese_words(t)] for t in (prediction, answer))
    return word_f1(*([word for word in words if word] for words in cut))


def f1_characters(prediction: str, answer: str) -> float:
    """F1 of two Chinese texts character by character, normalized (InfiniteBench)."""
    return word_f1(list(normalized_chinese(prediction)), list(normalized_chinese(answer)))


def word_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Twice the shared words over all words, a word as often as both have it."""
    shared = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * shared / (len(prediction) + len(answer)) if shared else 0.0
