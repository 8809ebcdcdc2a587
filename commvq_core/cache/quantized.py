"""transformers' own quantized caches, as they come: the "hf-..." codecs of evaluations.

The settings are transformers' defaults: groups of 64 numbers, up to 128 newest tokens exact, no
sinks, and the whole history quantized again whenever the exact part is full. A prompt that comes at
once sees itself exactly; a strict evaluation therefore feeds the tokens one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import QuantizedCache

from commvq_core.cache.half import half_dtype
from commvq_core.cache.prefill import split_prompt
from commvq_core.codecs.asymmetric import largest_divisor
from commvq_core.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP, RESIDUAL = 64, 128
_MEASURED = 1024  # tokens whose bytes are counted for `bits_per_element`


class OwnQuantizedCache(QuantizedCache):
    """transformers' QuantizedCache, given 16-bit states also by a float32 model."""

    def __init__(self, model: PreTrainedModel, backend: str, width: int) -> None:
        self._stored = half_dtype(model)
        config = model.config.get_text_config(decoder=True)
        dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        try:
            super().__init__(
                backend,
                model.config,
                nbits=width,
                q_group_size=largest_divisor(dims, GROUP),
                residual_length=RESIDUAL,
            )
        except ValueError as error:
            raise InputError(
                f"transformers' {backend} cache can't serve this model ({first_line(error)})",
                "leave the codec out",
            ) from error

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store 16-bit states, return all of them in the model's dtype."""
        dtype = key_states.dtype
        keys, values = super().update(
            key_states.to(self._stored), value_states.to(self._stored), layer_idx, *args, **kwargs
        )
        return keys.to(dtype), values.to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes stored for the context now: codes, scales and the exact part."""
        names = ("keys", "values", "_quantized_keys", "_quantized_values")
        return sum(_bytes_of(getattr(layer, name, None)) for layer in self.layers for name in names)


def bits_per_element(model: PreTrainedModel, backend: str, width: int) -> float:
    """Bits a quantized number costs, counted on what the backend returns for random numbers."""
    layer: Any = OwnQuantizedCache(model, backend, width).layers[0]
    states = torch.randn(1, 1, _MEASURED, GROUP, dtype=half_dtype(model), device=model.device)
    layer.lazy_initialization(states, states)
    return 8 * _bytes_of(layer._quantize(states, axis=layer.axis_key)) / states.numel()


@contextlib.contextmanager
def own_quantized_cache(
    model: PreTrainedModel, backend: str, width: int, strict: bool
) -> Iterator[OwnQuantizedCache]:
    """A fresh cache. While it is open and `strict`, tokens reach it one by one."""
    cache = OwnQuantizedCache(model, backend, width)
    with one_by_one(model, cache) if strict else contextlib.nullcontext():
        yield cache


@contextlib.contextmanager
def one_by_one(model: PreTrainedModel, cache: OwnQuantizedCache) -> Iterator[None]:
    """Cut every call of the model with `cache` into calls of one token; outputs are as of one."""
    decoder: Any = model.get_decoder()
    earlier: list[Tensor] = []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("past_key_values") is not cache or args:
            return None
        pieces = split_prompt(kwargs, cache.get_seq_length(), 1)
        if pieces is None:
            return None
        earlier.extend([decoder(**piece).last_hidden_state for piece in pieces[:-1]])
        return (), pieces[-1]

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not earlier or kwargs.get("past_key_values") is not cache:
            return None
        output["last_hidden_state"] = torch.cat((*earlier, output.last_hidden_state), dim=1)
        earlier.clear()
        return output

    handles = (
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bytes_of(stored: Any) -> int:
    """Bytes of all plain tensors in what a backend made, whatever holds them."""
    if isinstance(stored, dict):
        return sum(_bytes_of(value) for value in stored.values())
    if isinstance(stored, (list, tuple)) and not isinstance(stored, torch.Size):
        return sum(_bytes_of(value) for value in stored)
    if not isinstance(stored, Tensor):
        return 0
    # quanto's tensors look like what they stand for; these are what they hold.
    held = [getattr(stored, name, None) for name in ("_data", "_scale", "_shift")]
    if held[0] is not None and type(stored) is not Tensor:
        return sum(_bytes_of(part) for part in held)
    return stored.numel() * stored.element_size()
