"""Attention over real codes: held to softmax attention over keys and values decoded by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from commvq_core.cache.cache import CommVQCache
from commvq_core.codecs.additive import AdditiveCodec
from commvq_core.models import describe_model
from commvq_core.rope import from_pairs, to_pairs
from tests import reference
from tests.cache.families import build
from tests.codecs.samples import additive_codec

TOKENS, WINDOW, SINKS = 40, 8, 2
# family -> (rotary dims, pair layout), of heads of 16 dims with 4 query and 2 KV heads
FAMILIES = {"llama": (16, "half"), "phi3-partial": (8, "half"), "glm4": (8, "interleaved")}


def quantized(codec: AdditiveCodec, rows: np.ndarray) -> np.ndarray:
    """Canonical rows [kv_heads, tokens, 16] after encoding and decoding."""
    decoded = codec.decode(codec.encode(torch.from_numpy(rows)[None]))
    return decoded[0].double().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_query_gets_softmax_attention_over_codes_window_and_sinks(family: str) -> None:
    rotary_dim, layout = FAMILIES[family]
    model = build(family)
    codecs = {
        layer.index: (additive_codec("key", stages=1), additive_codec("value", stages=1))
        for layer in describe_model(model).compressible
    }
    attention = model.model.layers[0].self_attn
    seen: dict[str, Tensor] = {}

    def remember(name: str, part: Tensor) -> None:
        seen[name] = part.detach()[0]

    attention.register_forward_pre_hook(
        lambda _, args, kwargs: remember("hidden", args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    attention.o_proj.register_forward_pre_hook(lambda _, args: remember("output", args[0]))
    ids = torch.randint(3, 200, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    options = {"window": WINDOW, "sinks": SINKS, "strict": True}
    with torch.no_grad(), CommVQCache(model, codecs, **options) as cache:
        model(input_ids=ids, past_key_values=cache)
        queries, keys, values = projections(attention, seen["hidden"])
    key_codec, value_codec = codecs[0]
    order = {"rotary_dim": rotary_dim, "layout": layout}
    canonical = to_pairs(torch.from_numpy(keys), **order).numpy()
    coded_keys = from_pairs(torch.from_numpy(quantized(key_codec, canonical)), **order).numpy()
    coded_values = quantized(value_codec, values)
    angles = np.arange(TOKENS)[:, None] * 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    queries = reference.rotate(queries, angles, **order)
    keys = reference.rotate(keys, angles, **order)
    coded_keys = reference.rotate(coded_keys, angles, **order)
    got = seen["output"].double().numpy().reshape(TOKENS, 4, 16)
    plain = np.zeros_like(got)
    for head, token in np.ndindex(4, TOKENS):
        slots = np.arange(token + 1)
        exact = ((slots > token - WINDOW) | (slots < SINKS))[:, None]
        own = (head // 2, slots)
        want = reference.softmax_attention(
            queries[head, token],
            np.where(exact, keys[own], coded_keys[own]),
            np.where(exact, values[own], coded_values[own]),
            scale=16**-0.5,
        )
        assert np.abs(got[token, head] - want).max() < 1e-4 * np.abs(got).max()
        plain[token, head] = reference.softmax_attention(
            queries[head, token], keys[own], values[own], scale=16**-0.5
        )
    assert np.abs(got - plain).max() > 0.1 * np.abs(got).max(), "these codes lose nothing"


def projections(
    attention: torch.nn.Module, hidden: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [4, tokens, 16], keys and values [2, tokens, 16], before RoPE, float64."""
    if hasattr(attention, "qkv_proj"):
        parts = attention.qkv_proj(hidden).split([64, 32, 32], dim=-1)
    else:
        parts = tuple(getattr(attention, f"{name}_proj")(hidden) for name in ("q", "k", "v"))
    heads = [part.double().unflatten(-1, (-1, 16)).transpose(0, 1).numpy() for part in parts]
    return heads[0], heads[1], heads[2]
