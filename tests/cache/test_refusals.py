"""What a compressed cache can't do is refused in one clear line, never answered with garbage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, pipeline

from commvq_core.cache.cache import CommVQCache
from commvq_core.errors import InputError
from commvq_core.models import describe_model
from tests.cache.families import build, build_config, build_from, oracle
from tests.cache.ways import prompt


def test_longrope_past_its_original_length_is_refused() -> None:
    """There the model would rotate by other frequencies than the keys that are cached."""
    model = build("phi3-longrope")
    ids = prompt(1, 256)
    with torch.no_grad(), oracle(model) as cache:
        got = model(input_ids=ids, past_key_values=cache).logits
        want = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
        with pytest.raises(InputError, match="changes its frequencies past 256 tokens"):
            model(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("name", "fields", "line"),
    [
        ("MistralConfig", {"sliding_window": 16}, "no attention layer of MistralForCausalLM keeps"),
        ("MambaConfig", {}, "no attention layers"),
        ("GPT2Config", {"n_embd": 64, "n_head": 4, "n_layer": 2}, "rotary"),
    ],
)
def test_models_without_a_growing_rotated_cache(
    name: str, fields: dict[str, object], line: str
) -> None:
    with pytest.raises(InputError, match=line):
        describe_model(build_from(build_config(name, **fields)))


def test_layers_of_linear_attention_keep_their_own_state() -> None:
    config = build_config(
        "Qwen3NextConfig",
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        decoder_sparse_step=1,
    )
    model = build_from(config)
    assert [layer.index for layer in describe_model(model).compressible] == [1]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ids = prompt(1, 24)
    want = model.generate(ids, **options, past_key_values=DynamicCache(config=model.config))
    with oracle(model) as cache:
        assert torch.equal(want, model.generate(ids, **options, past_key_values=cache))
        with pytest.raises(InputError, match="layer 0 keeps a state that can't be saved"):
            cache.save(Path("never.safetensors"))
    assert not Path("never.safetensors").exists()


def test_generate_does_not_compile_a_growing_cache() -> None:
    """docs/cache.md says so: codes grow, and graphs of a fixed size can't."""
    model = build("llama")
    ids = prompt(1, 20)
    options = {"max_new_tokens": 4, "do_sample": False}
    want = model.generate(ids, **options)
    with oracle(model) as cache:
        assert not cache.is_compileable
        assert torch.equal(want, model.generate(ids, **options, past_key_values=cache))


def test_layers_can_wait_on_the_cpu_between_steps() -> None:
    """What transformers' offloading calls; on a machine without a GPU both places are one."""
    model = build("glm4")
    ids = prompt(2, 30)
    with torch.no_grad(), oracle(model) as cache:
        model(input_ids=ids[:, :25], past_key_values=cache)
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        got = model(input_ids=ids[:, 25:], past_key_values=cache).logits
    assert (got - model(input_ids=ids).logits[:, 25:]).abs().max() < 1e-4


def test_a_pipeline_generates_on_a_cache(tiny_model_dir: Path) -> None:
    pipe = pipeline("text-generation", model=str(tiny_model_dir), device="cpu")
    options = {"max_new_tokens": 8, "do_sample": False}
    want = pipe("the words of it", **options)
    with oracle(pipe.model) as cache:
        assert isinstance(cache, CommVQCache)
        assert pipe("the words of it", past_key_values=cache, **options) == want
        assert cache.get_seq_length() > 0
