"""A compressed cache written for clarity alone: every token is kept exactly *and* as its code.

Each token is encoded and decoded the moment it comes, and attention is a loop over rows and heads
in float64 that picks, for every query and token, the exact or the decoded one by the rules of
docs/cache.md. It shares with the real cache nothing but the codecs and the probed rotation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as remember
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from commvq_core.codecs.digest import LayerCodecs
from commvq_core.models import attention_modules, describe_and_probe
from commvq_core.probe import capture_position_embeddings
from commvq_core.rope import rotate, unrotate


def _joined(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat((old[0], new[0]), dim=2), torch.cat((old[1], new[1]), dim=2)


@remember
def _described(model: PreTrainedModel) -> Any:
    """Once a model: probing runs it, which it can't while it attends through a reference cache."""
    return describe_and_probe(model)


@dataclass(frozen=True)
class Rules:
    """What is exact and what is not; as CommVQCache's options."""

    window: int
    sinks: int
    strict: bool


class _Tables:
    """What the attention modules last got; one for all copies of a cache."""

    def __init__(self, seen: dict[int, Any]) -> None:
        self.seen = seen

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tables:
        return self


_updated: dict[int, ReferenceLayer] = {}  # layer index -> the layer that was updated last


class ReferenceLayer(DynamicLayer):
    """`keys`, `values` are exact; `lossy` holds their decoded twins, rotated, float64."""

    def __init__(self, codecs: Any, rotary: Any, tables: _Tables, index: int, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.codecs, self.rotary, self.tables, self.index = codecs, rotary, tables, index
        self.lossy: tuple[Tensor, Tensor] | None = None
        self.steps = 0  # of one token, since any were coded
        self.coded = 0  # tokens whose exact copies the real cache no longer has

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        _updated[self.index] = self
        new = (self._degraded_keys(key_states), self._degraded(value_states, 1))
        old = self.lossy
        self.lossy = new if old is None else _joined(old, new)
        return super().update(key_states, value_states, *args, **kwargs)

    def _degraded(self, vectors: Tensor, side: int) -> Tensor:
        codec = self.codecs[side]
        return codec.decode(codec.encode(vectors.float())).double()

    def _degraded_keys(self, keys: Tensor) -> Tensor:
        from commvq_core.rope import from_pairs, to_pairs

        dims = {"rotary_dim": self.rotary.rotary_dim, "layout": self.rotary.layout}
        if self.rotary.rotary_dim == 0:
            return from_pairs(self._degraded(to_pairs(keys, **dims), 0), **dims)
        cos, sin = (table[:, None].float() for table in self.tables.seen[self.index])
        plain = to_pairs(unrotate(keys, cos, sin, **dims), **dims)
        return rotate(from_pairs(self._degraded(plain, 0), **dims), cos, sin, **dims).double()

    def _change(self, change: Any) -> None:
        if self.lossy is not None:
            self.lossy = tuple(change(part) for part in self.lossy)  # type: ignore[assignment]

    def crop(self, amount: int) -> None:
        super().crop(amount)
        length = self.get_seq_length()
        self._change(lambda part: part[:, :, :length])
        self.coded = min(self.coded, length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change(lambda part: part[beam_idx])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda part: part[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        scaling: float,
        **extra: Any,
    ) -> Tensor:
        """Attention of the newest tokens, [batch, q, heads, head_dim]."""
        batch, heads, length, dim = query.shape
        total = self.keys.shape[2]
        if mask is None:
            allowed = np.arange(total) <= np.arange(total - length, total)[:, None]
            mask = torch.from_numpy(allowed).expand(batch, 1, length, total)
        allowed = mask[:, 0, :, :total].expand(batch, -1, -1).numpy()
        exact = [part.double().numpy() for part in (self.keys, self.values)]
        lossy = [part.numpy() for part in self.lossy]
        groups, out = heads // self.keys.shape[1], np.zeros((batch, length, heads, dim))
        for row in range(batch):
            seen = allowed[row, -1]
            first = int(seen.argmax()) if seen.any() else total
            for q in range(length):
                slot = total - length + q
                boundary = self.coded
                if self.rules.strict:
                    boundary = max(slot - self.rules.window + 1, boundary)
                token = np.arange(total)
                is_sink = (token >= first) & (token < first + self.rules.sinks)
                coded = (token < boundary) & ~is_sink
                for head in range(heads):
                    k, v = (
                        np.where(
                            coded[:, None],
                            lossy[s][row, head // groups],
                            exact[s][row, head // groups],
                        )
                        for s in (0, 1)
                    )
                    logits = k @ query[row, head, q].double().numpy() * scaling
                    if extra.get("softcap"):
                        logits = np.tanh(logits / extra["softcap"]) * extra["softcap"]
                    logits = np.where(allowed[row, q], logits, -np.inf)
                    if not allowed[row, q].any():
                        continue
                    learnt = extra.get("s_aux")
                    top = logits.max() if learnt is None else max(logits.max(), float(learnt[head]))
                    weights = np.exp(logits - top)
                    bottom = weights.sum()
                    if learnt is not None:
                        bottom += np.exp(float(learnt[head]) - top)
                    out[row, q, head] = weights @ v / bottom
        self.steps += 1
        if self.rules.strict or length > 1 or self.steps == 16:
            self.coded, self.steps = max(self.coded, total - self.rules.window), 0
        return torch.from_numpy(out).to(query.dtype)


class ReferenceCache(DynamicCache):
    """See the module's docstring. `window`, `sinks`, `strict` as CommVQCache's."""

    def __init__(
        self,
        model: PreTrainedModel,
        codecs: LayerCodecs,
        tables: _Tables,
        *,
        window: int,
        sinks: int,
        strict: bool = False,
    ) -> None:
        super().__init__(config=model.config)
        spec, probed = _described(model)
        for layer in spec.compressible:
            self.layers[layer.index] = ReferenceLayer(
                codecs[layer.index],
                probed[layer.index].rotary,
                tables,
                layer.index,
                Rules(window, sinks, strict),
            )


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **extra: Any
) -> tuple[Tensor, None]:
    scaling = extra.pop("scaling", None) or query.shape[-1] ** -0.5
    return _updated.pop(module.layer_idx).attend(query, mask, scaling, **extra), None


@contextmanager
def reference(model: PreTrainedModel, codecs: LayerCodecs, **options: Any) -> Iterator[Any]:
    """A ReferenceCache for `model`, which attends through it while this is open."""
    AttentionInterface.register("reference", _attention)
    AttentionMaskInterface.register("reference", sdpa_mask)
    before = model.config._attn_implementation
    with capture_position_embeddings(attention_modules(model)) as tables:
        cache = ReferenceCache(model, codecs, _Tables(tables), **options)
        model.config._attn_implementation_internal = "reference"
        try:
            yield cache
        finally:
            model.config._attn_implementation_internal = before
