"""Answers that name one of a few options, as InfiniteBench reads them."""

from __future__ import annotations

import re

_LETTERS = "ABCD"


def chosen_option(prediction: str, letter: str, text: str) -> float:
    """1 where the prediction chooses the option `letter`, which says `text`.

    Its first letter decides where that is one of A to D; else what follows "answer is" and the
    like; else the first of its words that is one of these letters.
    """
    prediction = prediction.strip()
    if prediction[:1] and prediction[0] in _LETTERS:
        return float(prediction[0] == letter)
    if prediction == text:
        return 1.0
    plain = _without(prediction, "\n\"'.,?!{}")
    after = _after(plain, ("answer is:", "answer:", "answer is", "option is"))
    if after is not None:
        return float(after.startswith((letter, text)))
    first = next((word for word in plain.split() if word in list(_LETTERS)), None)
    return float(first == letter)


def named_option(prediction: str, letter: str, text: str) -> float:
    """1 where the prediction begins with "B." or "B:", or names letter or text after "is:".

    Stricter than `chosen_option`: a bare letter is no answer.
    """
    prediction = prediction.strip()
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    plain = _without(re.sub("[Oo]ption", " ", prediction), "\n`'\"-*")
    after = _after(plain, ("answer is:", "is:", "answer:"))
    return float(after is not None and after.startswith((letter, text)))


def _without(text: str, signs: str) -> str:
    """The text with blanks for signs, and one blank for several."""
    return re.sub(" {2,}", " ", text.translate(str.maketrans(signs, " " * len(signs))))


def _after(text: str, phrases: tuple[str, ...]) -> str | None:
    """What comes after the first of `phrases` that is there, and the blank behind it."""
    for phrase in phrases:
        at = text.find(phrase)
        if at >= 0:
            return text[at + len(phrase) + 1 :]
    return None
