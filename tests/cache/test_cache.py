"""What a CommVQCache promises beside the right logits: no trace, true bytes, every batch change."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, FalconConfig, PreTrainedModel

from commvq_core.cache.cache import CommVQCache
from commvq_core.cache.half import HalfPrecisionCache
from commvq_core.errors import InputError
from tests.cache.families import build, oracle
from tests.cache.lossy import lossy_codecs


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


def _ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 200, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _hooks(model: PreTrainedModel) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_greedy_generation_equals_the_models_own_cache(model: PreTrainedModel) -> None:
    ids = _ids(1, 30)
    want = model.generate(ids, max_new_tokens=20, do_sample=False)
    with oracle(model) as cache:
        got = model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert torch.equal(want, got)


def test_layers_without_codecs_keep_the_models_own_cache(model: PreTrainedModel) -> None:
    ids, codecs = _ids(1, 30), lossy_codecs(model)
    with torch.no_grad(), CommVQCache(model, {1: codecs[1]}, window=4, sinks=1) as cache:
        model(input_ids=ids, past_key_values=cache)
        own = [type(layer).__name__ for layer in cache.layers]
        assert [name == "CommVQLayer" for name in own] == [i == 1 for i in range(len(own))]
        assert len(cache.compressed_layers) == 1
        plain = DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=plain)
        torch.testing.assert_close(cache.layers[0].keys, plain.layers[0].keys, rtol=0, atol=0)
    with torch.no_grad(), CommVQCache(model, {}) as cache:
        got = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(got, model(input_ids=ids).logits.detach())


def test_beam_search_equals_the_models_own_cache(model: PreTrainedModel) -> None:
    ids = _ids(1, 30)
    options = {"max_new_tokens": 15, "num_beams": 3, "do_sample": False}
    want = model.generate(ids, **options, past_key_values=DynamicCache(config=model.config))
    with oracle(model) as cache:
        got = model.generate(ids, **options, past_key_values=cache)
    assert torch.equal(want, got)


def test_the_model_is_as_before_after_close_and_after_an_exception(model: PreTrainedModel) -> None:
    implementation, hooks = model.config._attn_implementation, _hooks(model)
    with oracle(model) as cache:
        assert model.config._attn_implementation == implementation
        with pytest.raises(IndexError), torch.no_grad():
            model(input_ids=torch.tensor([[10_000]]), past_key_values=cache)
        assert model.config._attn_implementation == implementation
    cache.close()
    assert _hooks(model) == hooks


def test_a_forgotten_cache_lets_go_of_the_model(model: PreTrainedModel) -> None:
    hooks = _hooks(model)
    cache = oracle(model)
    assert _hooks(model) > hooks
    del cache
    gc.collect()
    assert _hooks(model) == hooks


def test_two_caches_on_one_model_do_not_meet(model: PreTrainedModel) -> None:
    a, b = _ids(1, 24, 1), _ids(1, 24, 2)
    with torch.no_grad(), oracle(model) as first, oracle(model) as second:
        model(input_ids=a[:, :20], past_key_values=first)
        model(input_ids=b[:, :12], past_key_values=second)
        got_a = model(input_ids=a[:, 20:], past_key_values=first).logits
        first.close()
        got_b = model(input_ids=b[:, 12:], past_key_values=second).logits
        assert torch.allclose(got_a, model(input_ids=a).logits[:, 20:], atol=1e-4)
        assert torch.allclose(got_b, model(input_ids=b).logits[:, 12:], atol=1e-4)


def test_a_closed_cache_and_a_foreign_cache_are_refused(model: PreTrainedModel) -> None:
    other = build("qwen3")
    with oracle(model) as cache, oracle(other), pytest.raises(InputError, match="another model"):
        other(input_ids=_ids(1, 4), past_key_values=cache)
    with pytest.raises(InputError, match="closed"):
        model(input_ids=_ids(1, 4), past_key_values=cache)


def test_crop_continues_as_if_the_tokens_had_never_come(model: PreTrainedModel) -> None:
    ids = _ids(2, 40)
    for kept in (38, 33, 12, 1):  # in the window, at its edge, among the codes, in the sinks
        with torch.no_grad(), oracle(model) as cache:
            model(input_ids=ids, past_key_values=cache)
            cache.crop(kept - 40)
            assert cache.get_seq_length() == kept
            got = model(input_ids=ids[:, kept:], past_key_values=cache).logits
            want = model(input_ids=ids).logits[:, kept:]
            assert torch.allclose(got, want, atol=1e-4)


def test_batch_changes_follow_the_rows(model: PreTrainedModel) -> None:
    ids = _ids(3, 30)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), oracle(model) as cache:
        model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        rows = torch.tensor([0, 2, 2, 0])
        new = _ids(1, 3, 9).expand(4, -1)
        full = torch.cat((ids[rows], new), dim=1)
        full_mask = torch.cat((mask[rows], torch.ones_like(new)), dim=1)
        at = (full_mask.cumsum(-1) - 1).clamp_min(0)
        got = model(
            input_ids=new,
            attention_mask=full_mask,
            position_ids=at[:, 30:],
            past_key_values=cache,
        ).logits
        want = model(input_ids=full, attention_mask=full_mask, position_ids=at).logits[:, 30:]
        assert torch.allclose(got, want, atol=1e-4)


def test_a_deep_copy_goes_its_own_way(model: PreTrainedModel) -> None:
    ids = _ids(1, 30)
    with torch.no_grad(), oracle(model) as cache:
        model(input_ids=ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        model(input_ids=_ids(1, 5, 7), past_key_values=cache)
        cache.close()
        got = model(input_ids=ids[:, :3], past_key_values=twin).logits
        want = model(input_ids=torch.cat((ids, ids[:, :3]), dim=1)).logits[:, 30:]
        assert twin.get_seq_length() == 33
        assert torch.allclose(got, want, atol=1e-4)
        twin.close()


def test_padding_never_becomes_a_sink(model: PreTrainedModel) -> None:
    """Sinks are the first real tokens: row by row the padded batch equals each prompt alone."""
    ids = _ids(1, 30)
    pad = 11
    padded = torch.cat((torch.zeros(1, pad, dtype=torch.long), ids), dim=1)
    mask = torch.cat((torch.zeros(1, pad, dtype=torch.long), torch.ones_like(ids)), dim=1)
    options = {"window": 8, "sinks": 3}
    with torch.no_grad():
        with CommVQCache(model, lossy_codecs(model), **options) as cache:
            alone = model.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)
        with CommVQCache(model, lossy_codecs(model), **options) as cache:
            batch = model.generate(
                padded,
                attention_mask=mask,
                max_new_tokens=12,
                do_sample=False,
                past_key_values=cache,
            )
    assert torch.equal(alone[0, 30:], batch[0, 30 + pad :])


def test_nbytes_counts_every_tensor_and_falls_to_the_codes(model: PreTrainedModel) -> None:
    with torch.no_grad(), CommVQCache(model, lossy_codecs(model), window=8, sinks=2) as cache:
        assert cache.nbytes == 0
        model(input_ids=_ids(1, 256), past_key_values=cache)
        scalars = 2 * 2 * 16  # two sides, two KV heads, 16 dims, in each of 2 layers
        codes = 2 * scalars * 256  # a byte a scalar; 248 tokens have codes, in steps of 64
        exact = 2 * scalars * 4 * (8 + 2)
        assert cache.nbytes == codes + exact + 4 * 256
        assert cache.bits_per_element == 8.0
        cache.reset()
        assert cache.nbytes == 0
        assert cache.get_seq_length() == 0


def test_tokens_that_come_one_by_one_get_codes_32_at_a_time(model: PreTrainedModel) -> None:
    """Until then they stay exact; tokens that come together get theirs at once."""
    seen = []
    with torch.no_grad(), CommVQCache(model, lossy_codecs(model), window=8, sinks=2) as cache:
        model(input_ids=_ids(1, 30), past_key_values=cache)
        for _ in range(66):
            seen.append(cache.layers[0].code_length)
            model(input_ids=_ids(1, 1), past_key_values=cache)
            assert cache.layers[0].keys.shape[2] + cache.layers[0].code_length == 30 + len(seen)
        model(input_ids=_ids(1, 2), past_key_values=cache)
        seen.append(cache.layers[0].code_length)
    assert seen == [22] * 32 + [54] * 32 + [86] * 2 + [30 + 66 + 2 - 8]


def test_the_fp16_cache_stores_16_bits(model: PreTrainedModel) -> None:
    cache = HalfPrecisionCache(model)
    with torch.no_grad():
        got = model(input_ids=_ids(1, 64), past_key_values=cache).logits
        want = model(input_ids=_ids(1, 64)).logits
    assert cache.nbytes == 2 * 2 * 2 * 16 * 64 * 2
    assert got.dtype == torch.float32
    assert 0 < (got - want).abs().max() < 0.05


@pytest.mark.parametrize("options", [{"window": 0}, {"sinks": -1}])
def test_impossible_windows_are_refused(model: PreTrainedModel, options: dict[str, int]) -> None:
    with pytest.raises(InputError):
        oracle(model, **options)


def test_a_model_that_ignores_the_attention_interface_is_refused() -> None:
    """Its layers would attend to the window alone, and answer nonsense without a word."""
    from tests.cache.families import build_from

    deaf = build_from(
        FalconConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=200)
    )
    with oracle(deaf) as cache, pytest.raises(InputError, match="attention interface"):
        deaf(input_ids=_ids(1, 20), past_key_values=cache)
    assert deaf(input_ids=_ids(1, 20)).logits.isfinite().all()


def test_a_window_grows_in_place_and_leaves_what_was_given_out_alone(
    model: PreTrainedModel,
) -> None:
    with CommVQCache(model, lossy_codecs(model), window=99) as cache, torch.no_grad():
        model(input_ids=_ids(1, 40), past_key_values=cache)
        layer = cache.layers[0]
        given, rooms = [], set()
        for at in range(40, 80):
            model(input_ids=_ids(1, 1, at), past_key_values=cache)
            given.append((layer.keys, layer.keys.clone()))
            rooms.add(layer.keys.untyped_storage().data_ptr())
        assert len(rooms) == 2  # 41 to 64 tokens, 65 to 96
        for _ in range(2):  # what follows a crop goes elsewhere
            cache.crop(-6)
            model(input_ids=_ids(1, 1, 99), past_key_values=cache)
        assert all(torch.equal(now, then) for now, then in given)
        held = layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
        assert layer.nbytes == held


def test_a_window_that_is_left_behind_is_freed(model: PreTrainedModel) -> None:
    """By encoding, a choice of rows, and a crop."""
    with CommVQCache(model, lossy_codecs(model), window=8) as cache, torch.no_grad():
        model(input_ids=_ids(2, 40), past_key_values=cache)
        layer, freed = cache.layers[0], []

        def step(at: int) -> weakref.ref[torch.Tensor]:
            model(input_ids=_ids(2, 1, at), past_key_values=cache)
            return weakref.ref(layer.keys)

        for at in range(31):
            window = step(at)
        step(31)  # the 32nd encodes
        freed.append(window)
        window = step(32)
        cache.reorder_cache(torch.tensor([1, 0]))
        freed.append(window)
        window = step(33)
        cache.crop(-1)
        freed.append(window)
        assert [ref() for ref in freed] == [None, None, None]
