"""Perplexity over windows of held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commvq_core.evaluation.metrics import delta_percent, token_nll
from commvq_core.evaluation.tasks.base import Record
from commvq_core.evaluation.tasks.windows import WindowTask, records_perplexity

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_FORWARD = 2048  # tokens a forward pass, which bounds the memory of the logits


class Perplexity(WindowTask):
    """exp of the mean negative log-likelihood of every token but each window's first."""

    name = "perplexity"

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
        value, reference = records_perplexity(records), records_perplexity(baseline)
        return {
            "perplexity": value,
            "delta_percent": delta_percent(value, reference),
            "tokens": sum(record["tokens"] for record in records),
        }
