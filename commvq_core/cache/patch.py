"""Teach a model to run on a compressed cache, without touching its code.

Two seams of transformers: an attention function registered by name, and hooks on the model's
decoder. The hooks switch the decoder to that function only while it runs with a CommVQCache, and
switch it back afterwards, also after an exception; with any other cache the model runs as ever.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from commvq_core.cache.attention import attend, make_tiles, needs_codes, settle
from commvq_core.cache.fast import shows_codes
from commvq_core.cache.layer import CommVQLayer
from commvq_core.cache.prefill import split_prompt
from commvq_core.errors import InputError
from commvq_core.malloc import trim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from commvq_core.cache.cache import CommVQCache

ATTENTION = "commvq"
_running = threading.local()  # the cache of the forward pass that this thread is in


class Patch:
    """The hooks on one model, shared by all its caches and removed with the last of them."""

    _of_model: ClassVar[weakref.WeakKeyDictionary[nn.Module, Patch]] = weakref.WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel) -> None:
        _register()
        self._model = weakref.ref(model)
        self._users = 0
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self._signature = inspect.signature(decoder.forward)
        self._before = decoder.register_forward_pre_hook(self._enter, with_kwargs=True)
        # Always called, so that an exception in the forward pass also switches back.
        self._after = decoder.register_forward_hook(self._leave, always_call=True)
        self._saved: list[tuple[Any, Any]] = []
        self._earlier: list[Tensor] = []  # hidden states of a long prompt's pieces but the last

    @classmethod
    def acquire(cls, model: PreTrainedModel) -> Patch:
        """The model's patch, made if it has none; every `acquire` needs one `release`."""
        patch = cls._of_model.get(model)
        if patch is None:
            patch = cls._of_model[model] = cls(model)
        patch._users += 1
        return patch

    def release(self) -> None:
        """Give the patch back; the last one to do so removes the hooks."""
        self._users -= 1
        if self._users == 0:
            self._before.remove()
            self._after.remove()
            model = self._model()
            if model is not None:
                self._of_model.pop(model, None)

    def _enter(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        from commvq_core.cache.cache import CommVQCache

        given = self._signature.bind_partial(*args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        cache = given.get("past_key_values")
        if not isinstance(cache, CommVQCache):
            return None
        cache.check_runs_on(self._model())
        pieces = split_prompt(given, cache.get_seq_length(), cache.prefill_chunk)
        if pieces is not None:
            # Each call runs these hooks itself; the last piece goes on as the call that was asked.
            states = []
            for piece in pieces[:-1]:
                states.append(decoder(**piece).last_hidden_state)
                trim()
            self._earlier, given = states, pieces[-1]
        self._switch(decoder, cache, given)
        return None if pieces is None else ((), pieces[-1])

    def _switch(self, decoder: nn.Module, cache: CommVQCache, given: dict[str, Any]) -> None:
        """Let the decoder attend through `cache` until `_leave`."""
        inputs = given.get("input_ids")
        inputs = given["inputs_embeds"] if inputs is None else inputs
        length, count = cache.get_seq_length(), inputs.shape[1]
        ids = given.get("position_ids")
        if ids is None:
            ids = torch.arange(length, length + count, device=inputs.device)[None]
        cache.positions.begin_forward(length, ids)
        configs = {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}
        self._saved = [(c, getattr(c, "_attn_implementation", None)) for c in configs.values()]
        for config, _ in self._saved:
            config._attn_implementation_internal = ATTENTION
        _running.cache = cache

    def _leave(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        earlier, self._earlier = self._earlier, []
        for config, implementation in self._saved:
            config._attn_implementation_internal = implementation
        self._saved = []
        cache = running_cache()
        _running.cache = None
        if cache is None:
            return None
        cache.positions.end_forward()
        deaf = [i for i, layer in enumerate(cache.layers) if getattr(layer, "awaits_attention", 0)]
        if deaf and output is not None:
            # It attended to the window alone, as if the codes were not there.
            raise InputError(
                f"attention layer {deaf[0]} does not use transformers' attention interface",
                "this model can't run on a compressed cache; use its own",
            )
        if earlier and output is not None:
            output["last_hidden_state"] = torch.cat((*earlier, output.last_hidden_state), dim=1)
        return output


def running_cache() -> CommVQCache | None:
    """The cache of the forward pass that this thread is in."""
    return getattr(_running, "cache", None)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)


def _mask(**given: Any) -> Tensor | None:
    """SDPA's mask, but none for plain causal attention, which needs no mask to be computed.

    A mask of a piece of a long prompt would have as many entries as the piece's scores: half a
    gigabyte for 4,096 tokens in a context of 128K.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    padding = given.get("attention_mask")
    skips = given.get("allow_is_causal_skip", True)
    if not skips or given.get("mask_function") is not causal_mask_function:
        return sdpa_mask(**given)
    if padding is None:
        return None
    # A single token's mask is the padding, so that both questions about it can be put at once.
    layer = _begun_layer() if given.get("q_length") == 1 and padding.dim() == 2 else None
    shown = padding.bool()
    shows = 0 if layer is None else shows_codes(layer, shown[:, None], layer.code_length)
    answers = int(2 * shown.all() + shows)  # one number, for which the host waits once
    if answers >= 2:
        return None
    mask = sdpa_mask(**given | {"allow_is_causal_skip": False})  # or it would ask again
    if layer is not None and mask is not None:
        layer.positions.once(mask, layer.code_length, lambda: answers == 1)
    return mask


def _begun_layer() -> CommVQLayer | None:
    """A layer of the cache in use that has codes and knows where its rows begin."""
    cache = running_cache()
    for layer in () if cache is None else cache.compressed_layers:
        if layer.code_length and layer.all_begun:
            return layer
    return None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of every layer of a model that runs on a CommVQCache."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache = running_cache()
    own = cache.layers[module.layer_idx] if cache is not None else None
    layer = own if isinstance(own, CommVQLayer) else None
    if layer is not None:
        layer.awaits_attention = False
    if layer is not None and needs_codes(layer):
        output = attend(
            layer, query, attention_mask, scaling=scaling, softcap=softcap, sink_logits=s_aux
        )
        return output, None
    # SDPA's own causal masks are of squares.
    plain = attention_mask is not None or query.shape[2] in (1, key.shape[2])
    if softcap is None and s_aux is None and plain:
        # Everything that is seen is exact: torch's kernels serve.
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    else:
        output = _exact(query, key, value, attention_mask, scaling, softcap, s_aux)
    if layer is not None:
        settle(layer, attention_mask, query.shape[2])
    return output, None


def _exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Plain attention with what SDPA does not have: soft-capping, learnt sinks, later queries."""
    kv_heads, tokens = key.shape[1], key.shape[2]
    first = tokens - query.shape[2]
    keys, values = key.float(), value.float()
    seen = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device=query.device)
    tiles = make_tiles(query, kv_heads, mask, first, scaling=scaling, softcap=softcap)
    for tile in tiles:
        tile.add(tile.query, keys, values, range(tokens), seen)
        if sink_logits is not None:
            tile.add_logits(sink_logits)
    return torch.cat([tile.output() for tile in tiles], dim=1).to(query.dtype).contiguous()
