"""Long prompts in pieces: the same shapes and answers, and never all exact keys at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from commvq_core.cache.cache import CommVQCache
from commvq_core.cache.layer import CommVQLayer
from commvq_core.cache.prefill import PREFILL_CHUNK, split_prompt
from commvq_core.cache.tile import Tile
from commvq_core.errors import InputError
from tests.cache.families import build, identity_codecs, oracle
from tests.cache.lossy import lossy_codecs
from tests.cache.ways import prompt
from tests.reference import softmax_attention


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.mark.parametrize("size", [1, 7, 29, 30, 64])
def test_pieces_of_any_size_give_all_the_logits(model: PreTrainedModel, size: int) -> None:
    ids = prompt(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0  # longer than the first piece of 7
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad(), oracle(model, prefill_chunk=size) as cache:
        got = model(**inputs, past_key_values=cache).logits
        want = model(**inputs, past_key_values=DynamicCache(config=model.config)).logits
        assert cache.get_seq_length() == 30
    assert got.shape == want.shape
    assert (got - want)[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("family", ["gemma3", "glm4", "smollm3", "gpt-oss"])
def test_generating_from_a_long_prompt(family: str) -> None:
    model = build(family)
    ids = prompt(2, 45)
    options = {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(ids, **options, past_key_values=DynamicCache(config=model.config))
    with oracle(model, prefill_chunk=8) as cache:
        assert torch.equal(want, model.generate(ids, **options, past_key_values=cache))


def test_no_piece_leaves_more_exact_keys_than_the_window(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    update = CommVQLayer.update

    def watch(layer: CommVQLayer, *args: object, **kwargs: object) -> object:
        result = update(layer, *args, **kwargs)  # type: ignore[arg-type]
        held.append(layer.keys.shape[2])  # type: ignore[union-attr]
        return result

    monkeypatch.setattr(CommVQLayer, "update", watch)
    with (
        torch.no_grad(),
        CommVQCache(model, lossy_codecs(model), window=8, sinks=2, prefill_chunk=16) as cache,
    ):
        model(input_ids=prompt(1, 200), past_key_values=cache)
    assert max(held) == 8 + 16


def test_padding_that_fills_a_whole_piece_is_no_sink(model: PreTrainedModel) -> None:
    ids = prompt(1, 20)
    padded = torch.cat((torch.zeros(1, 25, dtype=torch.long), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 25, dtype=torch.long), torch.ones_like(ids)), dim=1)
    with torch.no_grad(), oracle(model, prefill_chunk=10) as cache:
        model.generate(padded, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
        for layer in cache.compressed_layers:
            assert layer.first_valid is not None
            assert layer.first_valid.tolist() == [25]
            assert layer.all_begun


def test_a_strict_prompt_in_pieces_equals_the_prompt_whole(model: PreTrainedModel) -> None:
    """Also with codes that lose something."""
    ids = prompt(1, 40)
    logits = []
    for size in (9, PREFILL_CHUNK):
        options = {"window": 8, "sinks": 2, "strict": True, "prefill_chunk": size}
        with torch.no_grad(), CommVQCache(model, lossy_codecs(model), **options) as cache:
            logits.append(model(input_ids=ids, past_key_values=cache).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_what_cannot_be_cut_runs_whole() -> None:
    ids = prompt(1, 9)
    assert split_prompt({"input_ids": ids}, 0, 9) is None
    assert split_prompt({"input_ids": ids, "output_attentions": True}, 0, 4) is None
    assert split_prompt({"input_ids": ids, "attention_mask": torch.ones(1, 1, 9, 9)}, 0, 4) is None
    assert split_prompt({"input_ids": ids, "attention_mask": {"full": ids}}, 0, 4) is None
    assert split_prompt({"input_ids": ids, "position_ids": torch.ones(3, 1, 9)}, 0, 4) is None
    assert split_prompt({"input_ids": ids, "token_type_ids": ids}, 0, 4) is None
    pieces = split_prompt({"input_ids": ids, "attention_mask": torch.ones(1, 14)}, 5, 4)
    assert pieces is not None
    assert [piece["input_ids"].shape[1] for piece in pieces] == [4, 4, 1]
    assert [piece["attention_mask"].shape[1] for piece in pieces] == [9, 13, 14]


def test_hidden_states_on_request_come_whole(model: PreTrainedModel) -> None:
    with torch.no_grad(), oracle(model, prefill_chunk=4) as cache:
        output = model(input_ids=prompt(1, 9), past_key_values=cache, output_hidden_states=True)
    assert output.hidden_states[0].shape[1] == 9


def test_an_exception_in_a_piece_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    ids = prompt(1, 9)
    ids[0, 6] = 10_000
    implementation = model.config._attn_implementation
    with oracle(model, prefill_chunk=4) as cache:
        with pytest.raises(IndexError), torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
        assert model.config._attn_implementation == implementation
        cache.reset()
        with torch.no_grad():
            got = model(input_ids=ids[:, :6], past_key_values=cache).logits
            assert (got - model(input_ids=ids[:, :6]).logits).abs().max() < 1e-4


def test_a_chunk_of_nothing_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="prefill_chunk 0"):
        CommVQCache(model, identity_codecs(model), prefill_chunk=0)


@pytest.mark.parametrize("length", [2, 30])
def test_tokens_that_all_queries_see_count_like_any_others(length: int) -> None:
    """torch's fused attention is merged with the parts before and after it."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, length, 24, generator=generator)
    keys, values = torch.randn(2, 2, 2, 300, 24, generator=generator).unbind()
    tile = Tile(query, 2, 300, None, 0.3, None)
    for start, stop in ((0, 5), (5, 200), (200, 300)):
        part, columns = slice(start, stop), range(start, stop)
        tile.add(tile.query, keys[:, :, part], values[:, :, part], columns, None)
    output = tile.output().numpy()
    for row, head, q in np.ndindex(2, 6, length):
        want = softmax_attention(
            query[row, head, q].numpy(),
            keys[row, head // 3].numpy(),
            values[row, head // 3].numpy(),
            0.3,
        )
        assert np.abs(output[row, q, head] - want).max() < 1e-5
