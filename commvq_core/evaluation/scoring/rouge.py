"""ROUGE-L of summaries (Lin 2004), in the two ways that benchmarks report it.

They differ by several points on the same texts, so each benchmark keeps its own.
"""

from __future__ import annotations

from collections import Counter

from commvq_core.evaluation.scoring.f1 import word_f1
from commvq_core.evaluation.scoring.subsequence import common_pairs
from commvq_core.evaluation.scoring.words import latin_words

_TINY = 1e-8  # what the package `rouge` adds to a denominator


def rouge_l_unique(prediction: str, answer: str) -> float:
    """ROUGE-L as LongBench reports it: F1 of the package `rouge` 1.0.1, 0 for an empty text.

    Sentences end at full stops, words at white space, nothing is lowered or stemmed. Every word
    counts once a text, however often it occurs: the hits are the different words in the longest
    common subsequences of any two sentences, precision is of the prediction's different words and
    recall of the answer's.
    """
    texts = (_sentences(prediction), _sentences(answer))
    predicted, wanted = texts
    if not predicted or not wanted:
        return 0.0
    hits = {
        sentence[at]
        for sentence in wanted
        for other in predicted
        for at, _ in common_pairs(sentence, other)
    }
    sizes = [len({word for sentence in text for word in sentence}) for text in texts]
    precision, recall = (len(hits) / size for size in sizes)
    return 2 * precision * recall / (precision + recall + _TINY)


def _sentences(text: str) -> list[list[str]]:
    # A piece of nothing but blanks is a sentence of one empty word there, and so it is here.
    return [piece.split() or [""] for piece in text.split(".") if piece]


def rouge_l_sum(prediction: str, answer: str) -> float:
    """ROUGE-Lsum as InfiniteBench reports it: F1 of the package `rouge-score`, without stemming.

    Sentences end at newlines; words are runs of a-z and 0-9, lowered. For each sentence of the
    answer the hits are the words in any of its longest common subsequences with a sentence of the
    prediction, each at most as often as both texts have it.
    """
    predicted, wanted = (
        [latin_words(line) for line in text.split("\n") if line] for text in (prediction, answer)
    )
    left = [Counter(word for line in text for word in line) for text in (predicted, wanted)]
    sizes = [sum(counter.values()) for counter in left]
    if not all(sizes):
        return 0.0
    hits = 0
    for sentence in wanted:
        places = {at for other in predicted for _, at in common_pairs(other, sentence)}
        for at in sorted(places):
            word = sentence[at]
            if all(counter[word] > 0 for counter in left):
                hits += 1
                for counter in left:
                    counter[word] -= 1
    precision, recall = (hits / size for size in sizes)
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def rouge_1(prediction: str, answer: str) -> float:
    """ROUGE-1: F1 of single words (runs of a-z and 0-9, lowered), without stemming."""
    return word_f1(latin_words(prediction), latin_words(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L: F1 by the longest common subsequence of the two texts' words, without stemming."""
    predicted, wanted = latin_words(prediction), latin_words(answer)
    hits = len(common_pairs(predicted, wanted))
    return 2 * hits / (len(predicted) + len(wanted)) if hits else 0.0
