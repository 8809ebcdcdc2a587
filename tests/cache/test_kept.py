"""Kept decodings change nothing but how often codes are decoded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from commvq_core.cache.cache import CommVQCache
from commvq_core.codecs.digest import LayerCodecs
from commvq_core.codecs.kivi import KiviValueCodec
from commvq_core.models import describe_model
from commvq_core.sides import side_spec
from tests.cache.families import build
from tests.cache.lossy_codecs import preset_codecs
from tests.cache.ways import prompt

WINDOW = {"window": 40, "sinks": 3}


class Counting(KiviValueCodec):
    """Counts the tokens that it decodes."""

    decoded = 0

    def decode(self, codes: Tensor) -> Tensor:
        Counting.decoded += codes.shape[2]
        return super().decode(codes)


def run(family: str, keep: bool) -> tuple[list[Tensor], int, int]:
    """Logits of prefill, decoding, a crop into the codes and reordering; tokens decoded; bytes.

    Tokens leave the window at 110, 126 and 142; a crop to 128 and new ones to 159 follow.
    """
    model = build(family)
    codecs: LayerCodecs = {
        layer.index: (
            preset_codecs(model, "default")[layer.index][0],
            Counting(side_spec(layer, "value"), 2),
        )
        for layer in describe_model(model).compressible
    }
    Counting.decoded = 0
    logits = []
    with CommVQCache(model, codecs, keep_decoded=keep, **WINDOW) as cache, torch.no_grad():

        def step(rows: int, count: int, seed: int) -> None:
            ids = prompt(rows, count, seed)
            logits.append(model(input_ids=ids, past_key_values=cache).logits)

        step(2, 150, 0)
        for at in range(40):
            step(2, 1, at)
        cache.crop(128 - cache.get_seq_length())
        step(2, 1, 50)
        twin = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        step(2, 70, 60)
        step(2, 1, 70)
        cache.batch_repeat_interleave(2)
        step(4, 1, 80)
        nbytes = cache.nbytes
        twin.close()
    return logits, Counting.decoded, nbytes


@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_kept_decodings_give_the_same_logits_and_decode_once(family: str) -> None:
    want, often, nbytes = run(family, keep=False)
    got, once, kept = run(family, keep=True)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    layers = len(describe_model(build(family)).compressible)
    assert once == layers * (142 + 159 - 128)  # before the crop, and what came after it
    assert often > 10 * once
    assert kept == nbytes
