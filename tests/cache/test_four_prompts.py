"""A left-padded batch says of each prompt what the prompt says alone, token for token.

Up to a tie: padding moves tokens to other blocks of the kernels, which round otherwise, and random
models have next tokens that are nearer to each other than that."""

from __future__ import annotations

import pytest
import torch

from commvq_core.cache.cache import CommVQCache
from tests.cache.families import build
from tests.cache.lossy_codecs import preset_codecs
from tests.cache.ways import prompt

LENGTHS = (37, 5, 21, 12)
TIE = 1e-3  # of logits of order one; padding moves them by up to 6e-4


@pytest.mark.parametrize("preset", ["default", "published"])
@pytest.mark.parametrize("family", ["llama", "glm4", "qwen3"])
def test_a_batch_of_four_equals_the_four(family: str, preset: str) -> None:
    model = build(family)
    codecs = preset_codecs(model, preset)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    longest = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    alone = []
    for row, length in enumerate(LENGTHS):
        own = prompt(1, length, row)
        ids[row, longest - length :], mask[row, longest - length :] = own[0], 1
        with CommVQCache(model, codecs, window=8, sinks=2) as cache:
            alone.append(model.generate(own, past_key_values=cache, **options))
    with CommVQCache(model, codecs, window=8, sinks=2) as cache:
        batch = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    ties = 0
    for row, length in enumerate(LENGTHS):
        same = batch.sequences[row, longest:] == alone[row].sequences[0, length:]
        until = 12 if same.all() else int((~same).nonzero()[0])
        for step in range(until):
            torch.testing.assert_close(
                batch.logits[step][row], alone[row].logits[step][0], rtol=0, atol=TIE
            )
        if until < 12:
            first, second = alone[row].logits[until][0].topk(2).values
            assert first - second < TIE
            ties += 1
    assert ties <= 1
