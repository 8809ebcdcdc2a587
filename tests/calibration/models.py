"""Tiny random models of many architectures, and naive readings of what their attention computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name -> (config class, what it adds to COMMON)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True}),
    "qwen3-k-norm": ("Qwen3Config", {}),
    "gemma2-softcap": (
        "Gemma2Config",
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
    ),
    "gemma3-sliding": (
        "Gemma3TextConfig",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    ),
    "phi3-fused": ("Phi3Config", {}),
    "phi3-partial": ("Phi3Config", {"partial_rotary_factor": 0.5}),
    "glm-interleaved": ("GlmConfig", {"partial_rotary_factor": 0.5}),
    "stablelm-partial": ("StableLmConfig", {"partial_rotary_factor": 0.25, "head_dim": 8}),
    "smollm3-nope": ("SmolLM3Config", {"no_rope_layers": [0, 1]}),
    "cohere2-nope": (
        "Cohere2Config",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
         "num_hidden_layers": 2},
    ),
    "olmo2-wide-norm": ("Olmo2Config", {"head_dim": 8}),
    "gpt-oss-eager": (
        "GptOssConfig",
        {"layer_types": ["full_attention", "full_attention"], "num_local_experts": 2,
         "num_experts_per_tok": 1},
    ),
}  # fmt: skip


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, in evaluation mode."""
    import transformers

    config_class, added = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**{**COMMON, **added, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start at trivial values
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


class Projections:
    """The outputs of a layer's projections, split into heads, read with plain forward hooks.

    Norms of keys and queries count as part of the projection. Run it on more tokens than heads.
    After a forward pass `query`, `key`, `value` are [tokens, heads, head_dim] before RoPE.
    """

    def __init__(self, attention: nn.Module, heads: int, kv_heads: int, head_dim: int) -> None:
        self.head_dim = head_dim
        self.parts: dict[str, Tensor] = {}
        names = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "qkv_proj")
        self.handles = [
            child.register_forward_hook(self._keep(name))
            for name, child in attention.named_children()
            if name in names
        ]
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.parts[name] = output.detach()[0]

        return hook

    def _heads(self, norm: str, projection: str, part: int) -> Tensor:
        if "qkv_proj" in self.parts:
            x = self.parts["qkv_proj"].split(self.sizes, dim=-1)[part]
        else:
            x = self.parts.get(norm, self.parts[projection])
        if x.dim() == 2:
            x = x.unflatten(-1, (-1, self.head_dim))
        elif x.shape[0] * self.head_dim == self.sizes[part]:
            x = x.transpose(0, 1)  # a norm that sees [heads, tokens, head_dim]
        return x.float()

    @property
    def query(self) -> Tensor:
        return self._heads("q_norm", "q_proj", 0)

    @property
    def key(self) -> Tensor:
        return self._heads("k_norm", "k_proj", 1)

    @property
    def value(self) -> Tensor:
        return self._heads("v_norm", "v_proj", 2)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
