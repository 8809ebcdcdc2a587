"""RULER's variable tracking: which variables got a value, by way of one another."""

from __future__ import annotations

import random
import string
from itertools import islice, pairwise

from commvq_core.evaluation.haystack import Haystack
from commvq_core.evaluation.tasks.ruler.draft import Draft, Kit
from commvq_core.evaluation.tasks.ruler.words import coded_words, numbers

_HOPS = 4
_DIGITS = 5
_LETTERS, _SHOT_LETTERS = 5, 3
_SHOT_TEXT = 160  # tokens of filler in the worked example


def draw_tracking(kit: Kit, source: random.Random) -> Draft:
    """One chain of five variables in filler text, behind a short worked example."""
    shown = _chain(kit, source, _SHOT_LETTERS)
    lines = "".join(kit.loaded.tokenizer.decode(shown.fill(shown.least + _SHOT_TEXT)))
    shot = f"{shown.introduction}{lines}{shown.question}\n{shown.answer} {' '.join(shown.expected)}"
    draft = _chain(kit, source, _LETTERS)
    return Draft(
        f"{shot}\n\n{draft.introduction}",
        draft.question,
        draft.answer,
        draft.expected,
        draft.fill,
        draft.least,
    )


def _chain(kit: Kit, source: random.Random, letters: int) -> Draft:
    variables = tuple(islice(coded_words(source, letters, string.ascii_uppercase), _HOPS + 1))
    value = next(numbers(source, _DIGITS))
    lines = [f"VAR {variables[0]} = {value}\n"]
    lines += [f"VAR {later} = VAR {earlier}\n" for earlier, later in pairwise(variables)]
    pieces = [kit.ids(line) for line in lines]
    depths = sorted(source.uniform(0, 100) for _ in pieces)
    noise: Haystack = kit.noise

    def fill(room: int) -> list[int]:
        text = room - sum(len(piece) for piece in pieces)
        return noise.hide(pieces, depths, start=0, text=text)

    return Draft(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(variables)} variables are assigned the value {value}, they are:",
        variables,
        fill,
        sum(len(piece) for piece in pieces) + 1,
    )
