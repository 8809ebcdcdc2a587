"""With codes that lose something, the cache does what the slow float64 reference cache does."""

from __future__ import annotations

from functools import cache as remember

import pytest
import torch
from transformers import PreTrainedModel

from commvq_core.cache.cache import CommVQCache
from commvq_core.codecs.digest import LayerCodecs
from tests.cache.families import build
from tests.cache.lossy_codecs import preset_codecs
from tests.cache.reference_cache import reference
from tests.cache.ways import WAYS

# Half and interleaved pairs, partial rotation, a NoPE layer; learnt logits and sliding layers are
# the lossless matrix's.
FAMILIES = ("llama", "glm4", "smollm3")
WINDOW = {"window": 8, "sinks": 2}


@remember
def _setting(family: str, preset: str) -> tuple[PreTrainedModel, LayerCodecs]:
    model = build(family)
    return model, preset_codecs(model, preset)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("preset", ["default", "published"])
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_are_used_as_the_reference_uses_them(family: str, preset: str, way: str) -> None:
    model, codecs = _setting(family, preset)
    wanted = WAYS[way](model, lambda: reference(model, codecs, **WINDOW))
    got = WAYS[way](model, lambda: CommVQCache(model, codecs, **WINDOW))
    for want, have in zip(wanted, got, strict=True):
        if want.is_floating_point():
            assert (want - have).abs().max() < 1e-3 * want.abs().max()
        else:
            assert torch.equal(want, have)


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_change_what_the_model_says(family: str) -> None:
    """Else the test above would show nothing."""
    model, codecs = _setting(family, "default")
    with CommVQCache(model, codecs, **WINDOW) as cache:
        got = WAYS["greedy"](model, lambda: cache)[0]
    assert not torch.equal(got, model.generate(got[:, :24], max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_strict_chunks_are_used_as_the_reference_uses_them(family: str) -> None:
    model, codecs = _setting(family, "default")
    way = WAYS["chunks of any size"]
    wanted = way(model, lambda: reference(model, codecs, strict=True, **WINDOW))
    got = way(model, lambda: CommVQCache(model, codecs, strict=True, **WINDOW))
    for want, have in zip(wanted, got, strict=True):
        assert (want - have).abs().max() < 1e-3 * want.abs().max()
