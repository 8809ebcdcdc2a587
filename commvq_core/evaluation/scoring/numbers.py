"""The number that an answer to a word problem ends with."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_STATED = re.compile(rf"(?:####|[Tt]he (?:final )?answer is:?)\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def stated_number(text: str) -> str | None:
    """The first number behind "####" or "The answer is"; None where none is stated.

    >>> stated_number("48 + 24 = 72. The answer is $1,072.50.")
    '1072.50'
    """
    found = _STATED.search(text)
    return None if found is None else _plain(found.group(1))


def last_number(text: str) -> str | None:
    """The last number of a text; None where there is none.

    >>> last_number("He has 3 - 5 = -2 left, and not $7.")
    '7'
    """
    found = _ANY.findall(text)
    return _plain(found[-1]) if found else None


def same_number(found: str | None, wanted: str) -> bool:
    """Whether two numbers are equal, however they are written: 18 is 18.00."""
    if found is None:
        return False
    try:
        return Decimal(found) == Decimal(_plain(wanted))
    except InvalidOperation:
        return found == wanted


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "")
