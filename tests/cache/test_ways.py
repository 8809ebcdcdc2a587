"""Every family generates in every way as with transformers' own cache, given a lossless codec."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache as remember
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, PreTrainedModel

from tests.cache.compatibility import PAGE, page
from tests.cache.families import FAMILIES, build, oracle
from tests.cache.ways import WAYS


@remember
def _model(family: str) -> PreTrainedModel:
    return build(family)


def _layers(model: PreTrainedModel) -> list[Any]:
    return DynamicCache(config=model.config).layers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lossless_cache_changes_nothing(family: str, way: str) -> None:
    model = _model(family)
    try:
        wanted = WAYS[way](model, lambda: nullcontext(DynamicCache(config=model.config)))
    except (RuntimeError, ValueError) as error:
        # Before 5.18 transformers' own layers could not crop past a sliding window.
        assert Version(transformers.__version__) < Version("5.18")
        assert any(type(layer).__name__ == "DynamicSlidingWindowLayer" for layer in _layers(model))
        with pytest.raises((type(error), IndexError)):
            WAYS[way](model, lambda: oracle(model))
        return
    got = WAYS[way](model, lambda: oracle(model))
    for want, have in zip(wanted, got, strict=True):
        if want.is_floating_point():
            assert (want - have).abs().max() < 1e-4 * want.abs().max()
        else:
            assert torch.equal(want, have)


def test_the_page_on_compatibility_is_the_matrix() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
