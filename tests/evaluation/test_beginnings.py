"""What caches share: filled with it, they go on as if they had run it themselves."""

from __future__ import annotations

import pytest
import torch

from commvq_core.cache.cache import CommVQCache
from commvq_core.cache.half import half_dtype
from commvq_core.evaluation.beginnings import Beginnings, run_tokens
from tests.cache.families import FAMILIES, build
from tests.cache.lossy import lossy_codecs

TOKENS, BEGINNING = 90, 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on_from_a_shared_beginning(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    torch.manual_seed(2)
    ids = torch.randint(3, 200, (2, TOKENS))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    logits = []
    for shared in (False, True):
        codecs, half = lossy_codecs(model), half_dtype(model)
        with (
            CommVQCache(model, codecs, window=8, sinks=2, exact_dtype=half) as cache,
            torch.inference_mode(),
        ):
            done = 0
            if shared:
                done = Beginnings().fill(cache, model, ids, mask, BEGINNING)
                coded = len(cache.compressed_layers) == len(cache.layers)
                assert done == (BEGINNING if coded or dtype != torch.float32 else 0)
                assert cache.get_seq_length() == done
            if done < BEGINNING:
                run_tokens(model, cache, ids, mask, done, BEGINNING)
            numbers = (mask.cumsum(-1) - 1).clamp_min(0)[:, BEGINNING:]
            found = model(
                input_ids=ids[:, BEGINNING:],
                past_key_values=cache,
                attention_mask=mask,
                position_ids=numbers,
            )
            logits.append(found.logits.float())
    own, other = logits
    # Soft-capped and sink attention is other arithmetic in transformers' own way, and what bf16
    # rounds may fall on the other side of a code's bounds.
    allowed = 1e-4 if dtype == torch.float32 else 0.05
    assert (own - other).abs().mean() <= allowed * own.abs().mean()
