"""Passkey retrieval: a number in filler that says the same thing over and over."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from commvq_core.evaluation.haystack import NOISE, Haystack
from commvq_core.evaluation.tasks.grid import GridTask
from commvq_core.evaluation.tasks.niah import Needle, Wording

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel


class Passkey(Needle):
    """Accuracy of finding a pass key of five digits (Mohtashami and Jaggi 2023, section 4.2)."""

    name = "passkey"
    unit = "pass keys"
    uses = GridTask.uses

    def wording(self) -> Wording:
        """See Needle."""
        return Wording(
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize it. I will quiz you about the important information there.\n",
            "The pass key is {number}. Remember it. {number} is the pass key.\n",
            "\nWhat is the pass key?",
            "The pass key is",
        )

    def read_text(self, loaded: LoadedModel, longest: int) -> Haystack:
        """The filler; nothing is read."""
        return Haystack.of_noise(loaded)

    def start(self, hay: Haystack, source: random.Random) -> int:
        """At the beginning of the filler."""
        return 0

    def texts(self) -> dict[str, Any]:
        """See GridTask."""
        found = super().texts()
        del found["split"], found["sources"]
        return {"filler": NOISE.strip(), **found}
