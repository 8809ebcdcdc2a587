"""Tiny random models of every family, and caches for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from commvq_core.cache.cache import CommVQCache
from commvq_core.codecs.base import Codec
from commvq_core.codecs.identity import IdentityCodec
from commvq_core.models import describe_model
from commvq_core.sides import side_spec

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 200,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **fields}}


_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-llama3": (
        "LlamaConfig",
        _rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": (
        "LlamaConfig",
        _rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=64),
    ),
    "llama-one-kv-head": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama-no-gqa": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-head-80": ("LlamaConfig", {"head_dim": 80}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "llama-head-64": ("LlamaConfig", {"head_dim": 64}),
    "llama-head-96": ("LlamaConfig", {"head_dim": 96}),
    "llama-head-128": ("LlamaConfig", {"head_dim": 128}),
    "llama-head-256": ("LlamaConfig", {"head_dim": 256}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", _MIXED),
    "phi3-partial": ("Phi3Config", {"partial_rotary_factor": 0.5}),
    "phi3-longrope": (
        "Phi3Config",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0 + 0.3 * i for i in range(8)],
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "qwen2-sliding": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "glm4": ("Glm4Config", {"partial_rotary_factor": 0.5}),
    "cohere2": ("Cohere2Config", _MIXED),
    "olmo2": ("Olmo2Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.2}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "sliding_window": 16}),
    "mixtral": ("MixtralConfig", {}),
    "qwen3-moe": ("Qwen3MoeConfig", {}),
    "gpt-neox": ("GPTNeoXConfig", {}),
}


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of the family, the same every time."""
    name, fields = FAMILIES[family]
    return build_from(getattr(transformers, name)(**{**_COMMON, **fields}), dtype)


def build_config(name: str, **fields: Any) -> Any:
    """A tiny config of transformers' class `name`."""
    return getattr(transformers, name)(**{**_COMMON, **fields})


def build_from(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a config. Weights are large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(3)
    return model.to(dtype)


def identity_codecs(model: PreTrainedModel) -> dict[int, tuple[Codec, Codec]]:
    """The oracle for every compressible layer."""
    return {
        layer.index: (
            IdentityCodec(side_spec(layer, "key")),
            IdentityCodec(side_spec(layer, "value")),
        )
        for layer in describe_model(model).compressible
    }


def oracle(model: PreTrainedModel, **options: Any) -> CommVQCache:
    """A cache that loses nothing, with a small window."""
    return CommVQCache(model, identity_codecs(model), **{"window": 8, "sinks": 2, **options})


def build_like(model: PreTrainedModel, noise: float) -> PreTrainedModel:
    """A copy whose weights are a little off."""
    config = copy.deepcopy(model.config)
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in twin.parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.add_(spread * parameter.std().nan_to_num(0.0) * noise)
    return twin
