"""RULER's two aggregation tasks: the words that a long list, or a coded text, has most often."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from itertools import islice

from commvq_core.evaluation.tasks.ruler.draft import Draft, Kit
from commvq_core.evaluation.tasks.ruler.words import coded_words, plain_words

_ASKED = 10
_SHORT = 4096  # tokens; below, a list has room for fewer repeats
# How often common and other words are listed, in the task and in the worked example, and the
# example's different words.
_REPEATS = {True: ((6, 1), (3, 1), 20), False: ((30, 3), (10, 3), 40)}
_ALPHA = 2.0
_ZETA = math.pi**2 / 6  # zeta(2)
_LETTERS = 6
_DOTS = "..."
_LEAST_WORDS = 200  # of the coded text, so that its first ranks differ in number


def draw_common_words(kit: Kit, length: int, source: random.Random) -> Draft:
    """A numbered list in which ten words are more frequent, behind a short worked example."""
    (often, seldom), (shown_often, shown_seldom), shown = _REPEATS[length < _SHORT]
    words = plain_words(source)
    example = list(islice(words, shown))
    listed = _shuffled(example, _ASKED, shown_often, shown_seldom, source)
    shot = "".join(_entries(listed))
    answer = "".join(_entries(example[:_ASKED]))
    introduction, question, begin = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n",
        f"\nQuestion: What are the {_ASKED} most common words in the above list?",
        f"Answer: The top {_ASKED} words that appear most often in the list are:",
    )
    common = list(islice(words, _ASKED))
    cost = {word: len(kit.ids(f" {word}")) for word in common}
    total = often * sum(cost.values()) + _numbering(kit, 0, often * _ASKED)

    def fill(room: int) -> list[int]:
        chosen, count, used = list(common), often * _ASKED, total
        for word in words:
            if any(one in word for one in common):
                continue  # naming it would count as naming the common one
            more = seldom * len(kit.ids(f" {word}")) + _numbering(kit, count, count + seldom)
            if used + more > room:
                break
            chosen.append(word)
            count, used = count + seldom, used + more
        entries = _shuffled(chosen, _ASKED, often, seldom, source)
        return [
            token
            for at, word in enumerate(entries)
            for token in [*kit.ids(f" {at + 1}."), *kit.ids(f" {word}")]
        ]

    return Draft(
        f"{introduction}{shot}{question}\n{begin}{answer}\n\n{introduction}",
        question,
        begin,
        tuple(common),
        fill,
        total,
    )


def _shuffled(
    words: Sequence[str], common: int, often: int, seldom: int, source: random.Random
) -> list[str]:
    listed = [*words[:common]] * often + [*words[common:]] * seldom
    source.shuffle(listed)
    return listed


def _entries(words: Sequence[str]) -> list[str]:
    return [f" {at + 1}. {word}" for at, word in enumerate(words)]


def _numbering(kit: Kit, start: int, stop: int) -> int:
    return sum(len(kit.ids(f" {at + 1}.")) for at in range(start, stop))


def draw_frequent_words(kit: Kit, source: random.Random) -> Draft:
    """A text of coded words by Zipf's law: the k-th most frequent is k^-2 as frequent as dots."""
    words = coded_words(source, _LETTERS, string.ascii_lowercase)
    ranked = [_DOTS, *islice(words, 3)]
    costs = [len(kit.ids(f" {word}")) for word in ranked]

    def tokens(size: int) -> int:
        counts = _zipf(size)
        while len(ranked) < len(counts):
            ranked.append(next(words))
            costs.append(len(kit.ids(f" {ranked[-1]}")))
        return sum(count * cost for count, cost in zip(counts, costs, strict=False))

    def fill(room: int) -> list[int]:
        low, high = 1, room * 4  # a word has a token at least, and its count is rounded down
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if tokens(middle) <= room else (low, middle - 1)
        text = [word for word, count in zip(ranked, _zipf(low), strict=False) for _ in range(count)]
        source.shuffle(text)
        return [token for word in text for token in kit.ids(f" {word}")]

    return Draft(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words.",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(ranked[1:4]),
        fill,
        tokens(_LEAST_WORDS),
    )


def _zipf(size: int) -> list[int]:
    """How often each rank occurs among `size` words, until less than once."""
    ranks = range(1, math.isqrt(size) + 1)
    counts = [int(size * rank**-_ALPHA / _ZETA) for rank in ranks]
    return [count for count in counts if count]
