"""Divergence: how far a cache moves the model's next-token distribution from fp16's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commvq_core.cache.half import HalfPrecisionCache
from commvq_core.evaluation.metrics import (
    delta_percent,
    mean,
    percentile,
    token_kl,
    token_nll,
)
from commvq_core.evaluation.tasks.base import Record
from commvq_core.evaluation.tasks.windows import WindowTask, records_perplexity

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_FORWARD = 512  # tokens a forward pass: the logits of two models are held at once
_DIGITS = 8  # of a KL in the record; sums of thousands still agree to five


class Divergence(WindowTask):
    """KL(fp16 || cache) in nats, top-1 agreement and perplexity over every token of each window.

    The fp16 cache runs beside the other one, piece by piece, so that no window's logits are kept.
    """

    name = "divergence"

    def run(self, loaded: LoadedModel, cache: Any, example: Tensor) -> Record:
        """Feed one window through the cache and through an fp16 one."""
        ids = example.to(loaded.model.device)
        reference = HalfPrecisionCache(loaded.model)
        divergences: list[float] = []
        agreed, nll = 0, 0.0
        for start in range(0, len(ids), _FORWARD):
            chunk = ids[start : start + _FORWARD]
            targets = ids[start + 1 : start + 1 + len(chunk)]
            with torch.inference_mode():
                wanted, got = (
                    loaded.model(input_ids=chunk[None], past_key_values=store, use_cache=True)
                    for store in (reference, cache)
                )
            divergences += token_kl(wanted.logits[0], got.logits[0]).tolist()
            nll += float(token_nll(got.logits[0, : len(targets)], targets).double().sum())
            agreed += int((wanted.logits[0].argmax(-1) == got.logits[0].argmax(-1)).sum())
        return {
            "kl": [float(f"{value:.{_DIGITS}g}") for value in divergences],
            "agreed": agreed,
            "nll": nll,
            "tokens": len(ids) - 1,
            "context": len(ids),
        }

    def metrics(self, records: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Any]:
        """`kl_mean`, `kl_p99` (nats) and `top1_agreement` (a share) over all `tokens`.

        `perplexity` and `delta_percent` are the perplexity task's, of the same logits.
        """
        value, reference = records_perplexity(records), records_perplexity(baseline)
        divergences = [value for record in records for value in record["kl"]]
        return {
            "kl_mean": mean(divergences),
            "kl_p99": percentile(divergences, 99),
            "top1_agreement": sum(record["agreed"] for record in records) / len(divergences),
            "perplexity": value,
            "delta_percent": delta_percent(value, reference),
            "tokens": len(divergences),
        }
