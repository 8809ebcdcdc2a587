"""What tasks share that score every token of a running text, window by window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from commvq_core.errors import InputError
from commvq_core.evaluation.metrics import perplexity
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.tasks.base import Record, Task
from commvq_core.evaluation.text import sha256_of_ids, text_split, text_windows
from commvq_core.generation import check_context

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_LENGTH = 2048
_WINDOWS = 4


class WindowTask(Task):
    """A task whose examples are windows of text, int64 [max_length].

    Every window starts with an empty cache. Caches are strict: a token is predicted from what
    token-by-token decoding would have in the cache, the newest tokens exact and the rest codes.
    """

    unit = "windows"
    uses = frozenset({"datasets"})
    strict = True

    def __init__(self, options: EvalOptions) -> None:
        if options.max_length == 1:
            raise InputError("--max-length 1 predicts nothing", "give at least 2")
        self._options = options
        self._length = options.max_length or _LENGTH
        self._windows: list[Tensor] = []
        self._sources: list[dict[str, Any]] = []

    def prepare(self, loaded: LoadedModel) -> Sequence[Tensor]:
        """The windows. Without --limit a short text may give fewer than four."""
        check_context(loaded, self._length, "give a smaller --max-length")
        limit = self._options.limit
        self._windows, self._sources = text_windows(
            loaded,
            self._options,
            length=self._length,
            limit=limit or _WINDOWS,
            at_least=limit or 1,
        )
        return self._windows

    def settings(self) -> dict[str, Any]:
        """See Task."""
        return {
            "max_length": self._length,
            "limit": len(self._windows),
            "split": text_split(self._options),
            "sources": self._sources,
            "examples_sha256": sha256_of_ids(window.tolist() for window in self._windows),
        }


def records_perplexity(records: Sequence[Record]) -> float:
    """Perplexity over records that have `nll`, summed, of so many predicted `tokens`."""
    return perplexity(
        sum(record["nll"] for record in records), sum(record["tokens"] for record in records)
    )
