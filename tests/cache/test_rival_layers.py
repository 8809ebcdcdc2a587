"""The cache serves codecs that want keys after RoPE, or tokens in groups."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from commvq_core.cache.attention import attend
from commvq_core.cache.cache import CommVQCache
from commvq_core.cache.layer import CommVQLayer
from commvq_core.cache.positions import Positions
from commvq_core.codecs.base import Codec, SideSpec
from commvq_core.codecs.digest import LayerCodecs
from commvq_core.codecs.identity import IdentityCodec
from commvq_core.codecs.kivi import GROUP, KiviKeyCodec, KiviValueCodec
from commvq_core.models import describe_model
from commvq_core.rope import unrotated
from commvq_core.sides import side_spec
from tests.cache.families import build
from tests.codecs import rivals_reference as naive

WINDOW, SINKS = 40, 3
HEADS, GROUPS, DIM = 2, 2, 32


def kivi(model: PreTrainedModel) -> LayerCodecs:
    codecs: dict[int, tuple[Codec, Codec]] = {}
    for layer in describe_model(model).compressible:
        key, value = side_spec(layer, "key"), side_spec(layer, "value")
        codecs[layer.index] = (KiviKeyCodec(key, 2), KiviValueCodec(value, 2))
    return codecs


@pytest.mark.parametrize("strict", [True, False])
def test_attention_over_kivi_is_attention_over_the_papers_formula(strict: bool) -> None:
    """A chunk of 150 tokens after one of 50, against loops over queries in float64."""
    generator = torch.Generator().manual_seed(0)
    tokens, first = 200, 50
    keys, values = torch.randn(2, 1, HEADS, tokens, DIM, generator=generator)
    keys = keys + torch.randn(1, HEADS, 1, DIM, generator=generator)
    query = torch.randn(1, HEADS * GROUPS, tokens, DIM, generator=generator)
    codecs = [
        kind(SideSpec(side, HEADS, DIM, 0), 2)
        for kind, side in ((KiviKeyCodec, "key"), (KiviValueCodec, "value"))
    ]
    layer = CommVQLayer(
        *codecs, unrotated(), Positions(), window=WINDOW, sinks=SINKS, strict=strict
    )
    found = []
    for part in (slice(0, first), slice(first, tokens)):
        layer.update(keys[:, :, part], values[:, :, part])
        found.append(attend(layer, query[:, :, part], None, scaling=DIM**-0.5)[0])
    got = torch.cat(found)
    whole = tokens // GROUP * GROUP
    for head in range(HEADS * GROUPS):
        k, v = (x[0, head // GROUPS].double() for x in (keys, values))
        lossy_k = torch.from_numpy(naive.kivi_keys(k[:whole].numpy(), 2))
        lossy_v = torch.from_numpy(naive.kivi_values(v[:whole].numpy(), 2, GROUP))
        for q in range(tokens):
            # Tokens leave the window of the query itself, or that of the last chunk's end.
            newest = q if strict else (-1 if q < first else first - 1)
            old = max(newest + 1 - WINDOW, 0) // GROUP * GROUP
            used_k = torch.cat((k[:SINKS], lossy_k[SINKS:old], k[max(old, SINKS) : q + 1]))
            used_v = torch.cat((v[:SINKS], lossy_v[SINKS:old], v[max(old, SINKS) : q + 1]))
            used_k, used_v = used_k[-(q + 1) :], used_v[-(q + 1) :]
            if old <= SINKS:
                used_k, used_v = k[: q + 1], v[: q + 1]
            weights = (used_k @ query[0, head, q].double() * DIM**-0.5).softmax(0)
            assert (got[q, head] - weights @ used_v).abs().max() < 2e-3


@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_keys_after_rope_are_those_of_the_models_own_cache(family: str) -> None:
    seen: list[torch.Tensor] = []

    class Watching(IdentityCodec):
        name = "watching"
        before_rope = False

        def encode(self, vectors: torch.Tensor) -> torch.Tensor:
            seen.append(vectors)
            return super().encode(vectors)

    model = build(family)
    spec = describe_model(model)
    codecs = {
        layer.index: (
            Watching(side_spec(layer, "key")),
            IdentityCodec(side_spec(layer, "value")),
        )
        for layer in spec.compressible
    }
    ids = torch.randint(3, 200, (2, 60), generator=torch.Generator().manual_seed(0))
    own = DynamicCache(config=model.config)
    with torch.no_grad(), CommVQCache(model, codecs, window=16, sinks=2) as cache:
        wanted = model(input_ids=ids, past_key_values=own).logits
        model(input_ids=ids[:, :50], past_key_values=cache)
        logits = model(input_ids=ids[:, 50:], past_key_values=cache).logits
    first = spec.compressible[0].index
    assert torch.allclose(seen[0], own.layers[first].keys[:, :, : seen[0].shape[2]], atol=1e-5)
    assert (logits - wanted[:, 50:]).abs().max() < 1e-4 * wanted.abs().max()


def test_a_strict_forward_over_groups_equals_decoding_token_by_token() -> None:
    model = build("llama")
    ids = torch.randint(3, 200, (1, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with CommVQCache(model, kivi(model), window=16, sinks=2, strict=True) as cache:
            once = model(input_ids=ids, past_key_values=cache).logits
        with CommVQCache(model, kivi(model), window=16, sinks=2, strict=True) as cache:
            steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache) for i in range(120)]
            coded = [layer.code_length for layer in cache.compressed_layers]
        plain = model(input_ids=ids).logits
    assert set(coded) == {(120 - 16) // GROUP * GROUP}
    decoded = torch.cat([step.logits for step in steps], dim=1)
    assert (once - decoded).abs().max() < 1e-4
    assert (once - plain).abs().max() > 1e-2


def test_a_group_is_not_cut_in_two() -> None:
    model = build("llama")
    ids = torch.randint(3, 200, (1, 120))
    with torch.no_grad(), CommVQCache(model, kivi(model), window=16, sinks=2) as cache:
        model(input_ids=ids, past_key_values=cache)
        layer = cache.compressed_layers[0]
        assert layer.code_length == 96
        layer.crop(-2)
        with pytest.raises(ValueError, match="multiples of 32 tokens"):
            layer.crop(-28)
        layer.crop(64 - layer.get_seq_length())
        assert (layer.code_length, layer.get_seq_length()) == (64, 64)
