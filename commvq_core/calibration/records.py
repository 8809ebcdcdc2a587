"""Made-up records: log lines, tables, settings, contacts, identifiers.

Documentation holds few numbers, and codebooks that never saw a digit where it matters lose it: of
five random digits in a long context, codebooks of documentation alone brought back two thirds
(docs/benchmarks.md). Real contexts are full of such records, so some belong in the text that
codebooks learn from.
"""

from __future__ import annotations

import random

_WORDS = (
    *("alpha", "beacon", "cedar", "delta", "ember", "falcon", "garnet", "harbor", "indigo"),
    *("juniper", "kestrel", "lumen", "maple", "nimbus", "onyx", "pepper", "quartz", "raven"),
    *("sable", "tundra", "umber", "violet", "willow", "xenon", "yarrow", "zephyr"),
)
_PLACES = (
    *("Athens", "Berlin", "Cairo", "Dublin", "Lima", "Oslo", "Paris", "Quito", "Rome", "Sydney"),
    *("Tokyo", "Vienna"),
)
_LEVELS = ("INFO", "WARN", "ERROR")
_SUFFIXES = ("txt", "csv", "bin")
_KINDS = 8


def records(seed: int, characters: int) -> str:
    """Lines of at least `characters` in all, of every kind in turn at random; decided by `seed`."""
    source = random.Random(f"commvq records {seed}")
    lines: list[str] = []
    length = 0
    while length < characters:
        lines.append(_record(source))
        length += len(lines[-1]) + 1
    return "\n".join(lines) + "\n"


def _record(source: random.Random) -> str:
    word, other, place = source.choice(_WORDS), source.choice(_WORDS), source.choice(_PLACES)
    number, second = _number(source), _number(source)
    below = source.randrange
    year, month, day = 2000 + below(40), 1 + below(12), 1 + below(28)
    return (
        f'{{"id": {number}, "name": "{word}", "amount": {_amount(source)}, "city": "{place}"}}',
        f"{year}-{month:02d}-{day:02d} {below(24):02d}:{below(60):02d}:{below(60):02d} "
        f"{source.choice(_LEVELS)} {word}[{below(10**5)}]: request {number} took {below(9999)} ms",
        f"The {word} number of {place} is {number}.",
        f"{word},{number},{second},{_amount(source)}",
        f"{word}_{other} = {number}",
        f"Invoice {number} of {place}: {below(99)} {word} at ${_amount(source)}, "
        f"due {day} May {year}",
        f"{source.getrandbits(64):016x}  {word}.{source.choice(_SUFFIXES)}",
        f"Call {word.title()} {other.title()} at +{1 + below(98)} {100 + below(900)} "
        f"{1000 + below(9000)} {100 + below(900)}",
    )[below(_KINDS)]


def _number(source: random.Random) -> int:
    return source.randrange(10 ** source.randrange(1, 8))


def _amount(source: random.Random) -> str:
    return f"{source.random() * 10 ** source.randrange(1, 5):.2f}"
