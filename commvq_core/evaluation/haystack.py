"""A long text as tokens, to hide sentences in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_NEAR = 64  # tokens that a depth may move to reach the end of a line or sentence

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
"""The filler of passkey retrieval (Mohtashami and Jaggi 2023), over and over."""


class Haystack:
    """The token ids of a text, which goes round when more are asked for.

    Sentences are hidden behind the end of a line; with `sentences`, also behind that of a sentence.
    """

    def __init__(self, loaded: LoadedModel, ids: Sequence[int], *, sentences: bool = False) -> None:
        texts = {token: str(loaded.tokenizer.decode([token])) for token in set(ids)}
        lines = {token for token, text in texts.items() if text.endswith("\n")}
        stops = {token for token, text in texts.items() if text.endswith((".", "!", "?"))}
        spaced = {token for token, text in texts.items() if text[:1].isspace()}
        self.ids = list(ids)
        self._reach = _NEAR
        self._ends = {index for index, token in enumerate(ids) if token in lines}
        if sentences:
            # Not the dots inside of numbers and names.
            self._ends |= {
                index
                for index, (token, following) in enumerate(pairwise(ids))
                if token in stops and following in spaced
            }

    @classmethod
    def of_noise(cls, loaded: LoadedModel) -> Haystack:
        """The filler, whose lines are never broken."""
        hay = cls(loaded, loaded.tokenizer(NOISE, add_special_tokens=False)["input_ids"])
        hay._reach = max(_NEAR, len(hay))
        return hay

    def __len__(self) -> int:
        return len(self.ids)

    def hide(
        self, needles: Sequence[Sequence[int]], depths: Sequence[float], *, start: int, text: int
    ) -> list[int]:
        """`text` tokens from token `start` on, with every needle at its depth, beside them.

        `depths` are in percent of the text, ascending. A needle stands behind the last end of a
        line in the 64 tokens before its depth; where there is none, right at its depth.
        """
        ids = [self.ids[(start + offset) % len(self)] for offset in range(text)]
        out: list[int] = []
        done = 0
        for needle, depth in zip(needles, depths, strict=True):
            cut = max(done, self._cut(start, text, depth))
            out += [*ids[done:cut], *needle]
            done = cut
        return [*out, *ids[done:]]

    def _cut(self, start: int, text: int, depth: float) -> int:
        cut = round(text * depth / 100)
        near = range(cut, max(-1, cut - self._reach), -1) if cut < text else ()
        return next((at for at in near if (start + at - 1) % len(self) in self._ends), cut)
