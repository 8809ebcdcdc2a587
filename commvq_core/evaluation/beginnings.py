"""The beginning of a context, computed once for all caches of an evaluation.

Until a cache drops exact keys, it computes what any other one would: the first piece of a prompt
sees itself exactly. An evaluation runs each batch through one cache after another, so that piece
runs once, and every cache is filled with its keys and values.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from commvq_core.cache.cache import CommVQCache
from commvq_core.cache.half import HalfPrecisionCache
from commvq_core.cache.positions import padded_positions
from commvq_core.cache.prefill import PREFILL_CHUNK
from commvq_core.cache.seed import seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Beginnings:
    """Holds the exact cache of the last batch's first tokens.

    `spared` counts the seconds that `fill` would have taken without: whoever times caches adds
    them, so that each is charged with the whole of its work.
    """

    def __init__(self) -> None:
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._exact: HalfPrecisionCache | None = None
        self._seconds = 0.0
        self.spared = 0.0

    def fill(self, cache: Any, model: PreTrainedModel, ids: Tensor, mask: Tensor, most: int) -> int:
        """Put the first tokens of `ids` into the empty cache, at most `most`; returns how many.

        `ids`, `mask` int64 [batch, tokens], padded on the left. 0 for caches that would see
        these tokens otherwise: strict ones, transformers' own quantized ones, and those of a
        float32 model with layers that have no codes.
        """
        count = min(most, PREFILL_CHUNK)
        if count == 0 or not _computes_as_fp16(cache, model):
            return 0
        ids, mask = ids[:, :count], mask[:, :count]
        if self._exact is not None and _same(ids, self._ids) and _same(mask, self._mask):
            self.spared += self._seconds
        else:
            self._exact = None  # before there is another one
            self._run(model, ids, mask)
        assert self._exact is not None
        if isinstance(cache, CommVQCache):
            seed(cache, self._exact, mask, dtype=model.dtype)
        else:
            cache.layers = [_copy(layer) for layer in self._exact.layers]
        return count

    def _run(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> None:
        began = time.monotonic()
        exact = HalfPrecisionCache(model)
        run_tokens(model, exact, ids, mask, 0, ids.shape[1])
        if ids.device.type != "cpu":
            torch.accelerator.synchronize(ids.device)
        self._seconds = time.monotonic() - began
        self._ids, self._mask, self._exact = ids, mask, exact


def run_tokens(
    model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, start: int, stop: int
) -> None:
    """Run the tokens start..stop of `ids` into `cache`, which holds those before.

    `ids` int64 [batch, tokens], padded on the left where `mask`, of that shape, is 0. The decoder
    alone runs: nobody needs a logit of them.
    """
    where = {}
    if not bool(mask.all()):
        numbers = padded_positions(mask[:, :stop])[:, start:]
        where = {"attention_mask": mask[:, :stop], "position_ids": numbers}
    model.get_decoder()(
        input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **where
    )


def _computes_as_fp16(cache: Any, model: PreTrainedModel) -> bool:
    """Whether a cache sees the first piece of a prompt as the fp16 cache does."""
    if not isinstance(cache, CommVQCache):
        return isinstance(cache, HalfPrecisionCache)
    # Layers that have no codes hold float32 where the model does.
    all_coded = len(cache.compressed_layers) == len(cache.layers)
    alike = all_coded or model.dtype != torch.float32
    return alike and not cache.strict and cache.prefill_chunk == PREFILL_CHUNK


def _same(found: Tensor, known: Tensor | None) -> bool:
    return known is not None and torch.equal(found, known)


def _copy(layer: Any) -> Any:
    # These never write into their tensors, others may.
    return copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer)
