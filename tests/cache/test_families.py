"""With a codec that loses nothing, every family gives the logits it gives with its own cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from commvq_core.cache.cache import CommVQCache
from tests.cache.families import FAMILIES, build, oracle

CHUNKS = (20, 1, 1, 7, 1, 18)


def _steps(model: PreTrainedModel, cache: object, ids: torch.Tensor, mask: torch.Tensor | None):
    """Logits of each chunk, fed one after the other."""
    start = 0
    for count in CHUNKS:
        inputs = {"input_ids": ids[:, start : start + count]}
        if mask is not None:
            inputs["attention_mask"] = mask[:, : start + count]
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            inputs["position_ids"] = positions[:, start : start + count]
        with torch.no_grad():  # not around the yield, which would leave it switched on
            logits = model(**inputs, past_key_values=cache).logits
        yield logits
        start += count


@pytest.mark.parametrize("strict", [False, True], ids=["chunks-exact", "strict"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_cache_gives_the_logits_of_the_models_own(
    family: str, padded: bool, strict: bool
) -> None:
    model = build(family)
    torch.manual_seed(1)
    ids = torch.randint(3, 200, (2, sum(CHUNKS)))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    own = DynamicCache(config=model.config)
    with oracle(model, strict=strict) as cache:
        expected = _steps(model, own, ids, mask if padded else None)
        got = _steps(model, cache, ids, mask if padded else None)
        start = 0
        for want, have in zip(expected, got, strict=True):
            stop = start + want.shape[1]
            valid = mask[:, start:stop].bool() if padded else torch.ones(want.shape[:2]).bool()
            scale = want[valid].abs().max()
            assert (want - have)[valid].abs().max() < 1e-5 * scale
            start = stop
        assert all(layer.code_length > 30 for layer in cache.compressed_layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "llama-yarn", "gemma3", "glm4", "smollm3", "olmo2"])
def test_half_precision_models_get_logits_within_their_own_rounding(
    family: str, dtype: torch.dtype
) -> None:
    exact, model = build(family), build(family, dtype)
    ids = torch.randint(3, 200, (1, sum(CHUNKS)))
    truth = torch.cat(list(_steps(exact, DynamicCache(config=exact.config), ids, None)), dim=1)
    plain = torch.cat(list(_steps(model, DynamicCache(config=model.config), ids, None)), dim=1)
    with oracle(model) as cache:
        ours = torch.cat(list(_steps(model, cache, ids, None)), dim=1)
    assert ours.dtype == dtype
    # The project's rule: at most twice the error of plain attention in the same precision.
    assert (ours.float() - truth).norm() <= 2 * (plain.float() - truth).norm()


def test_a_strict_forward_equals_decoding_token_by_token() -> None:
    """With a codec that loses a lot, so that the two can differ."""
    from tests.cache.lossy import RoundingCodec, lossy_codecs

    model = build("qwen3")
    ids = torch.randint(3, 200, (1, 40))
    with torch.no_grad():
        with CommVQCache(model, lossy_codecs(model), window=8, sinks=2, strict=True) as cache:
            once = model(input_ids=ids, past_key_values=cache).logits
        with CommVQCache(model, lossy_codecs(model), window=8, sinks=2, strict=True) as cache:
            steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache) for i in range(40)]
        plain = model(input_ids=ids).logits
    decoded = torch.cat([step.logits for step in steps], dim=1)
    assert RoundingCodec.steps < 8
    assert (once - decoded).abs().max() < 1e-4
    assert (once - plain).abs().max() > 1e-2
