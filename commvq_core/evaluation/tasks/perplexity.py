"""Perplexity over windows of held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commvq_core.errors import InputError
from commvq_core.evaluation.metrics import delta_percent, perplexity, token_nll
from commvq_core.evaluation.options import EvalOptions
from commvq_core.evaluation.tasks.base import Record, Task
from commvq_core.evaluation.text import sha256_of_ids, text_windows
from commvq_core.generation import check_context

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_LENGTH = 2048
_WINDOWS = 4
_FORWARD = 2048  # tokens a forward pass, which bounds the memory of the logits


class Perplexity(Task):
    """exp of the mean negative log-likelihood of every token but each window's first.

    Every window starts with an empty cache. Caches are strict: a token is predicted from what
    token-by-token decoding would have in the cache, the newest tokens exact and the rest codes.
    """

    name = "perplexity"
    unit = "windows"
    strict = True

    def __init__(self, options: EvalOptions) -> None:
        options.refuse_grid(self.name)
        if options.max_length == 1:
            raise InputError("--max-length 1 predicts nothing", "give at least 2")
        self._options = options
        self._length = options.max_length or _LENGTH
        self._windows: list[Tensor] = []
        self._sources: list[dict[str, Any]] = []

    def prepare(self, loaded: LoadedModel) -> Sequence[Tensor]:
        """Windows, int64 [max_length]. Without --limit a short text may give fewer than four."""
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
            "split": "heldout",
            "sources": self._sources,
            "examples_sha256": sha256_of_ids(window.tolist() for window in self._windows),
        }

    def run(self, loaded: LoadedModel, cache: Any, example: Tensor) -> Record:
        """Feed one window through a fresh cache."""
        ids = example.to(loaded.model.device)
        total = 0.0
        for start in range(0, len(ids), _FORWARD):
            chunk = ids[start : start + _FORWARD]
            targets = ids[start + 1 : start + 1 + len(chunk)]
            with torch.inference_mode():
                output = loaded.model(input_ids=chunk[None], past_key_values=cache, use_cache=True)
            total += float(token_nll(output.logits[0, : len(targets)], targets).double().sum())
        return {"nll": total, "tokens": len(ids) - 1, "context": len(ids)}

    def metrics(self, records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
        """`perplexity`, `delta_percent` against fp16 in the same run, `tokens` predicted."""
        value, reference = _perplexity(records), _perplexity(baseline)
        return {
            "perplexity": value,
            "delta_percent": delta_percent(value, reference),
            "tokens": sum(record["tokens"] for record in records),
        }


def _perplexity(records: Sequence[Record]) -> float:
    return perplexity(
        sum(record["nll"] for record in records), sum(record["tokens"] for record in records)
    )
