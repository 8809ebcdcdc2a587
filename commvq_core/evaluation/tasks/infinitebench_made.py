"""Rows of InfiniteBench's retrieval parts, made here at any length."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

from commvq_core.errors import InputError
from commvq_core.evaluation.data import Row

MADE = ("passkey", "number_string", "kv_retrieval")

_NOISE = "The hills are old. The sea is wide. The rain comes down. Off we walk. Home is far.\n"
_KEY = "The pass key is {key}. Remember it. {key} is the pass key.\n"
_DIGITS = "The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n"


def make_row(
    name: str, length: int, depth: float, source: random.Random, tokens: Callable[[Row], int]
) -> Row:
    """One row whose prompt has at most `length` tokens, and no room for another line or pair.

    `depth` from 0 to 1 is where the answer stands; `tokens(row)` counts a row's prompt. Raises
    InputError for a length without room.
    """
    build = _pairs(source, depth) if name == "kv_retrieval" else _lines(name, source, depth)
    shortest, some = tokens(build(1)), tokens(build(101))
    if shortest > length:
        raise InputError(
            f"{name} at {length:,} tokens has no room for the answer and the question",
            f"give lengths of at least {shortest:,}",
        )
    each = (some - shortest) / 100
    count = 1 + int((length - shortest) / each) + 1
    # Lines of the same text have the same tokens, but pairs don't.
    while (over := tokens(row := build(count)) - length) > 0:
        count -= max(1, int(over / each))
    while tokens(longer := build(count + 1)) <= length:
        count, row = count + 1, longer
    return row


def _lines(name: str, source: random.Random, depth: float) -> Callable[[int], Row]:
    if name == "passkey":
        sentence, thing = _KEY, "pass key"
        key = "".join(source.choices("0123456789", k=5))
    else:
        sentence, thing = _DIGITS, "sequence of digits"
        # Digits that repeat their neighbours: easy to miscount.
        key = "".join(digit * source.randint(1, 3) for digit in source.choices("0123456789", k=10))
        key = key[:10]

    def build(count: int) -> Row:
        before = round((count - 1) * depth)
        context = _NOISE * before + sentence.format(key=key) + _NOISE * (count - 1 - before)
        return {"context": context, "input": f"What is the {thing}?", "answer": key}

    return build


def _pairs(source: random.Random, depth: float) -> Callable[[int], Row]:
    seed = source.getrandbits(64)

    def build(count: int) -> Row:
        made = random.Random(seed)
        pairs = [(_identifier(made), _identifier(made)) for _ in range(count)]
        key, value = pairs[round((count - 1) * depth)]
        context = ", ".join(f'"{name}": "{content}"' for name, content in pairs)
        question = f'Key: "{key}"\nThe value that belongs to this key is: '
        return {"context": f"JSON data:\n{{{context}}}", "input": question, "answer": value}

    return build


def _identifier(source: random.Random) -> str:
    return str(uuid.UUID(int=source.getrandbits(128), version=4))
