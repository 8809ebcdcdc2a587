"""See the queries, keys and values of every attention layer, for any model that uses RoPE.

Nothing here knows a model by name. transformers looks up the attention function by the name in the
model's config; while recording, that name is ours: the function hands on what it gets and then
calls the model's own. Keys arrive after RoPE and are un-rotated with the cos and sin that the
attention module was given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from commvq_core.errors import InputError
from commvq_core.models import LayerSpec, attention_modules
from commvq_core.probe import Tables, capture_position_embeddings
from commvq_core.rope import unrotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recorded:
    """One forward pass of one layer, dims in the model's own order.

    `query` [batch, heads, tokens, head_dim] as attention gets it: after RoPE, in the model's dtype.
    `key` [batch, kv_heads, tokens, head_dim] float32, before RoPE; `value` like `key`, in the
    model's dtype. `scale` is the factor by which RoPE lengthens the rotated dims (YaRN), mostly 1.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


Listener = Callable[[LayerSpec, Recorded], None]


@contextmanager
def recording(
    model: PreTrainedModel, layers: Mapping[int, LayerSpec], listener: Listener
) -> Iterator[None]:
    """While open, `listener` is told of every forward pass of the attention layers in `layers`.

    The forward passes must be without a cache. On leaving, also by an exception, the model, its
    configs and transformers' registries are as they were.
    """
    modules = [(index, module) for index, module in attention_modules(model) if index in layers]
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        tables = stack.enter_context(capture_position_embeddings(modules))
        tap = _Tap(dict(modules), layers, tables, listener)
        stack.enter_context(_attending_through(model, tap))
        yield


class _Tap:
    """The attention function that listens. `originals` maps a config's id to what it used."""

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        layers: Mapping[int, LayerSpec],
        tables: Mapping[int, Tables],
        listener: Listener,
    ) -> None:
        self._index = {id(module): index for index, module in modules.items()}
        self._layers = layers
        self._tables = tables
        self._listener = listener
        self.originals: dict[int, str] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        index = self._index.get(id(module))
        if index is not None:
            self._listener(self._layers[index], self._before_rope(index, query, key, value))
        function = _attention_function(module, self.originals[id(module.config)])
        return function(module, query, key, value, *args, **kwargs)

    def _before_rope(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Recorded:
        spec = self._layers[index]
        if spec.rotary_dim == 0:
            return Recorded(query, key.float(), value, 1.0)
        cos, sin = (table.float().unsqueeze(1) for table in self._tables[index])
        before = unrotate(key, cos, sin, rotary_dim=spec.rotary_dim, layout=spec.pair_layout)
        scale = float((cos.square() + sin.square()).mean().sqrt())
        return Recorded(query, before, value, scale)


def _attention_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function a model would have called, as its own file looks it up."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    source = sys.modules[type(module).__module__]
    eager = getattr(source, "eager_attention_forward", None)
    registry = getattr(source, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function = registry.get(implementation, eager)
    if function is None:
        raise InputError(
            f"{type(module).__name__} has no attention function {implementation!r}",
            "load the model with attn_implementation='sdpa'",
        )
    return function


@contextmanager
def _attending_through(model: PreTrainedModel, tap: _Tap) -> Iterator[None]:
    """Make `tap` the attention function of every part of the model."""
    from transformers import AttentionInterface, AttentionMaskInterface

    configs = {id(config): config for config in _configs(model)}
    saved = {key: config._attn_implementation for key, config in configs.items()}
    tap.originals.update(saved)
    masks = AttentionMaskInterface._global_mapping
    names: dict[str, str] = {}
    try:
        for implementation in sorted(set(saved.values())):
            # A name a model and implementation: the mask must be the one that the original takes.
            name = names[implementation] = f"commvq_record_{id(tap):x}_{implementation}"
            AttentionInterface.register(name, tap)
            if implementation in masks:
                AttentionMaskInterface.register(name, masks[implementation])
        for key, config in configs.items():
            config._attn_implementation_internal = names[saved[key]]
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = saved[key]
        for name in names.values():
            AttentionInterface._global_mapping.pop(name, None)
            masks.pop(name, None)


def _configs(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(getattr(config, "_attn_implementation_internal", None), str):
            yield config


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off and gradients too, and give every module its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
