"""Models by shape alone: random weights and random codebooks, for measuring memory and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from commvq_core.codecs.additive import AdditiveCodec, AdditiveConfig
from commvq_core.codecs.base import SideSpec
from commvq_core.codecs.digest import LayerCodecs
from commvq_core.errors import InputError
from commvq_core.models import AttentionSpec
from commvq_core.sides import side_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a Llama configuration needs to be of a model's size (the published configurations).
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
}


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a named shape. Raises InputError for a name that is not known."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if shape not in SHAPES:
        raise InputError(f"--shape {shape} is not known", f"give {' or '.join(SHAPES)}")
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype)
    return model.eval()


def random_codecs(spec: AttentionSpec, bits: float) -> LayerCodecs:
    """Codebooks of the default preset's geometry with random codewords, for every layer.

    Raises InputError for bits that the geometry doesn't allow.
    """
    generator = torch.Generator().manual_seed(0)

    def codec(side: SideSpec) -> AdditiveCodec:
        plan = AdditiveCodec.plan(side, bits)
        config = AdditiveConfig(**plan)
        subs = side.head_dim // config.sub_dim
        shape = (side.kv_heads, subs, config.stages, config.codewords, config.sub_dim)
        tail = (side.head_dim,) if side.side == "key" else (side.head_dim, side.head_dim)
        one = torch.ones(tail) if side.side == "key" else torch.eye(side.head_dim)
        return AdditiveCodec.from_tensors(
            side,
            plan,
            {
                "codebooks": torch.randint(-127, 128, shape, generator=generator).to(torch.int8),
                "scales": torch.full(shape[:3], 0.01),
                "inverse": one.expand(side.kv_heads, *tail).contiguous(),
            },
        )

    return {
        layer.index: (codec(side_spec(layer, "key")), codec(side_spec(layer, "value")))
        for layer in spec.compressible
    }
