"""A left-padded batch says of each prompt what the prompt says alone, token for token."""

from __future__ import annotations

import pytest
import torch

from commvq_core.cache.cache import CommVQCache
from tests.cache.families import build
from tests.cache.lossy_codecs import preset_codecs
from tests.cache.ways import prompt

LENGTHS = (37, 5, 21, 12)


@pytest.mark.parametrize("preset", ["default", "published"])
@pytest.mark.parametrize("family", ["llama", "glm4", "qwen3"])
def test_a_batch_of_four_equals_the_four(family: str, preset: str) -> None:
    model = build(family)
    codecs = preset_codecs(model, preset)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    longest = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    alone = []
    for row, length in enumerate(LENGTHS):
        own = prompt(1, length, row)
        ids[row, longest - length :], mask[row, longest - length :] = own[0], 1
        with CommVQCache(model, codecs, window=8, sinks=2) as cache:
            alone.append(model.generate(own, past_key_values=cache, **options)[0, length:])
    with CommVQCache(model, codecs, window=8, sinks=2) as cache:
        batch = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(batch[:, longest:], torch.stack(alone))
