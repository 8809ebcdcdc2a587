"""Models by shape alone: random weights and random codebooks, for measuring memory and speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from commvq_core.codecs.additive import AdditiveCodec, AdditiveConfig
from commvq_core.codecs.base import SideSpec
from commvq_core.codecs.digest import LayerCodecs
from commvq_core.codecs.key_books import KeyBooks
from commvq_core.codecs.value_books import ValueBooks
from commvq_core.errors import InputError
from commvq_core.models import AttentionSpec
from commvq_core.rope import Rotary
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


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer: its name, heads, and the base of its rotary frequencies."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    theta: float = 10_000.0

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1 or self.heads % self.kv_heads:
            raise InputError(
                f"{self.heads} heads can't share {self.kv_heads} KV heads of {self.head_dim} dims",
                "give --heads as a multiple of --kv-heads",
            )
        if self.head_dim % 2:
            raise InputError(
                f"--head-dim {self.head_dim} does not split into pairs", "give an even number"
            )

    def side(self, side: str) -> SideSpec:
        """What a codec must know of its "key" or "value" side."""
        rotary_dim = self.head_dim if side == "key" else 0
        return SideSpec(side, self.kv_heads, self.head_dim, rotary_dim)

    def rotary(self, device: torch.device) -> Rotary:
        """How its keys are rotated: all dims, in the layout of Llama."""
        exponents = torch.arange(0, self.head_dim, 2, device=device) / self.head_dim
        return Rotary(self.head_dim, "half", self.theta**-exponents)


def shape_config(name: str) -> dict[str, Any]:
    """The configuration of a named shape. Raises InputError for a name that is not known."""
    if name not in SHAPES:
        raise InputError(f"--shape {name} is not known", f"give {' or '.join(SHAPES)}")
    return SHAPES[name]


def attention_shape(
    name: str | None, heads: int | None, kv_heads: int | None, head_dim: int | None
) -> AttentionShape:
    """The shape of that name (Llama-3.1-8B's without one), or the one that three numbers give.

    Raises InputError for an unknown name, or numbers that are no shape.
    """
    if heads is None and kv_heads is None and head_dim is None:
        name = name or "llama-3.1-8b"
        config = shape_config(name)
        return AttentionShape(
            name,
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
            config["rope_parameters"]["rope_theta"],
        )
    if name is not None:
        raise InputError("--shape says how many heads there are", "leave out --heads and the like")
    if heads is None or kv_heads is None or head_dim is None:
        raise InputError("a shape needs three numbers", "give --heads, --kv-heads and --head-dim")
    return AttentionShape(f"{heads}x{kv_heads}x{head_dim}", heads, kv_heads, head_dim)


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a named shape. Raises InputError for a name that is not known."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**shape_config(shape))
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def random_codec(
    spec: SideSpec, bits: float, generator: torch.Generator, *, shrink: float = 1.0
) -> AdditiveCodec:
    """A codec of the default preset's geometry at `bits`, with random codewords.

    Those of a stage are `shrink` times as large as the stage's before. Raises
    InputError for bits that the geometry doesn't allow.
    """
    plan = AdditiveCodec.plan(spec, bits)
    config = AdditiveConfig(**plan)
    subs = spec.head_dim // config.sub_dim
    shape = (spec.kv_heads, subs, config.stages, config.codewords, config.sub_dim)
    codebooks = 0.7 * torch.randn(shape, generator=generator)
    codebooks *= shrink ** torch.arange(config.stages)[:, None, None]
    dim = spec.head_dim
    units = [
        KeyBooks.from_codebooks(own, torch.ones(dim)).tensors()
        if spec.side == "key"
        else ValueBooks.from_codebooks(own, torch.eye(dim)).tensors()
        for own in codebooks
    ]
    return AdditiveCodec.join(spec, plan, units)


def random_codecs(spec: AttentionSpec, bits: float) -> LayerCodecs:
    """Random codecs for every layer. Raises InputError as `random_codec` does."""
    generator = torch.Generator().manual_seed(0)
    return {
        layer.index: (
            random_codec(side_spec(layer, "key"), bits, generator),
            random_codec(side_spec(layer, "value"), bits, generator),
        )
        for layer in spec.compressible
    }
