"""RULER's eight needle tasks: values of keys, hidden in filler, in text, or among their like."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from commvq_core.evaluation.tasks.ruler.draft import Draft, Kit
from commvq_core.evaluation.tasks.ruler.words import made_words, numbers, uuids

_DIGITS = 7
_PLACES = 40  # depths, evenly from 0 to 100 percent, of which each needle gets another


@dataclass(frozen=True)
class Needles:
    """One needle task. `haystack` is noise, essay, or needles: as many more as there is room for.

    `keys` needles' keys (`key_kind` words or uuids) have `values` values each (`value_kind` numbers
    or uuids); `asked` of the keys are asked for.
    """

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value_kind="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, asked=4),
}


def draw_needles(kit: Kit, kind: Needles, source: random.Random) -> Draft:
    """An example of one needle task (Hsieh et al. 2024, table 2)."""
    keys = _keys(kind.key_kind, source)
    values = _values(kind.value_kind, source)
    hidden = {next(keys): [next(values) for _ in range(kind.values)] for _ in range(kind.keys)}
    asked = source.sample(list(hidden), kind.asked)
    expected = tuple(value for key in asked for value in hidden[key])
    sentences = [_sentence(kind, key, value) for key in hidden for value in hidden[key]]
    source.shuffle(sentences)

    if kind.haystack == "needles":
        pieces = [kit.ids(f"{sentence}\n") for sentence in sentences]

        def fill(room: int) -> list[int]:
            more = (kit.ids(f"{_sentence(kind, key, next(values))}\n") for key in keys)
            return _among_their_like(pieces, more, room, source)
    else:
        noise = kit.noise if kind.haystack == "noise" else None
        hay = noise or kit.essay
        assert hay is not None
        pieces = [kit.ids(f"{one}\n" if noise else f"\n{one}\n") for one in sentences]
        depths = sorted(source.sample(range(_PLACES), len(pieces)))
        start = 0 if noise else source.randrange(len(hay))

        def fill(room: int) -> list[int]:
            text = room - sum(len(piece) for piece in pieces)
            percent = [100 * depth / (_PLACES - 1) for depth in depths]
            return hay.hide(pieces, percent, start=start, text=text)

    introduction, question, answer = _words(kind, asked, several=len(expected) > 1)
    least = sum(len(piece) for piece in pieces) + 1
    return Draft(introduction, question, answer, expected, fill, least)


def _keys(kind: str, source: random.Random) -> Iterator[str]:
    return uuids(source) if kind == "uuids" else made_words(source, "-")


def _values(kind: str, source: random.Random) -> Iterator[str]:
    return uuids(source) if kind == "uuids" else numbers(source, _DIGITS)


def _sentence(kind: Needles, key: str, value: str) -> str:
    return f"One of the special magic {kind.value_kind} for {key} is: {value}."


def _among_their_like(
    pieces: Sequence[list[int]], more: Iterator[list[int]], room: int, source: random.Random
) -> list[int]:
    """`pieces` at random places among as many of `more` as the room has."""
    room -= sum(len(piece) for piece in pieces)
    lines: list[list[int]] = []
    for line in more:
        if len(line) > room:
            break
        room -= len(line)
        lines.append(line)
    for piece in pieces:
        lines.insert(source.randint(0, len(lines)), piece)
    return [token for line in lines for token in line]


def _words(kind: Needles, asked: Sequence[str], *, several: bool) -> tuple[str, str, str]:
    what = kind.value_kind if several else kind.value_kind[:-1]
    keys = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    opening = f"Some special magic {what} are" if several else f"A special magic {what} is"
    return (
        f"{opening} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {what} afterwards.\n",
        f"\nWhat {'are all' if several else 'is'} the special magic {what} for {keys} mentioned in "
        "the provided text?",
        f"The special magic {what} for {keys} mentioned in the provided text "
        f"{'are' if several else 'is'}",
    )
