"""Words, numbers and ids to hide, drawn at random without any word list to download."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _listed(
    """
    amber ancient arctic autumn bitter blunt bold brave brief bright broad broken calm clever
    clumsy coastal cold copper cosmic cozy crisp crimson curious dainty daring dark deep distant
    dusty eager early eastern elegant emerald empty fabled faded famous fierce final floral
    fluffy foggy formal fragile frosty gentle giant gilded glad golden grand gray harsh hidden
    hollow honest humble icy idle inland ivory jolly keen kind lively lonely lucky lunar mellow
    merry mighty misty modest nimble noble northern odd olive pale patient plain polite proud
    quick quiet rapid rare rough royal rustic sandy scarlet secret shy silent silver simple
    sleepy smooth solar
    """
)
SECOND = _listed(
    """
    acorn anchor anvil apple arrow badge bakery ballad banner barrel basket beacon bell bench
    berry blanket bottle bridge bucket button cabin camera candle canyon carpet castle cellar
    chapel cherry circle clock cloud coin comet cradle crystal curtain desert diamond dollar
    dragon drum eagle engine falcon feather fiddle flute forest fountain garden glacier glove
    hammer harbor harvest hazel helmet hornet island jacket jewel jungle kettle ladder lantern
    lemon lizard magnet market meadow mirror monkey mountain needle ocean orchard oyster paddle
    parrot pebble pencil pepper planet pocket pumpkin puzzle rabbit ribbon river saddle sailor
    shadow shelter spider
    """
)


def plain_words(source: random.Random) -> Iterator[str]:
    """Different words, simple ones first and then made of two or three, endlessly."""
    simple = [*FIRST, *SECOND]
    source.shuffle(simple)
    yield from simple
    yield from made_words(source, "")


def made_words(source: random.Random, join: str) -> Iterator[str]:
    """Different words of two parts, such as "quiet" + join + "lantern", then of three, endlessly.

    No word of two parts holds another one.
    """
    pairs = [f"{first}{join}{second}" for first in FIRST for second in SECOND]
    source.shuffle(pairs)
    yield from pairs
    seen: set[str] = set()
    while len(seen) < len(FIRST) * len(pairs):
        word = join.join((source.choice(FIRST), source.choice(SECOND), source.choice(SECOND)))
        if word not in seen:
            seen.add(word)
            yield word


def coded_words(source: random.Random, letters: int, alphabet: str) -> Iterator[str]:
    """Different words of `letters` random letters of the alphabet, endlessly."""
    seen: set[str] = set()
    while True:
        word = "".join(source.choices(alphabet, k=letters))
        if word not in seen:
            seen.add(word)
            yield word


def numbers(source: random.Random, digits: int) -> Iterator[str]:
    """Different numbers of so many digits, endlessly."""
    seen: set[int] = set()
    while True:
        number = source.randrange(10 ** (digits - 1), 10**digits)
        if number not in seen:
            seen.add(number)
            yield str(number)


def uuids(source: random.Random) -> Iterator[str]:
    """Random UUIDs, endlessly."""
    while True:
        yield str(uuid.UUID(int=source.getrandbits(128), version=4))
