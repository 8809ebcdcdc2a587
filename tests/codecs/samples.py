"""Additive codecs with codebooks of our own making."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from commvq_core.codecs.additive import AdditiveCodec, AdditiveConfig
from commvq_core.codecs.base import SideSpec
from commvq_core.codecs.key_books import KeyBooks
from commvq_core.codecs.value_books import ValueBooks


def additive_tensors(spec: SideSpec, config: AdditiveConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random codebooks, each stage a fifth as large as the one before, and a random transform."""
    generator = torch.Generator().manual_seed(seed)
    heads, dim = spec.kv_heads, spec.head_dim
    subs = dim // config.sub_dim
    codebooks = torch.randn(
        heads, subs, config.stages, config.codewords, config.sub_dim, generator=generator
    )
    codebooks *= 0.2 ** torch.arange(config.stages).view(-1, 1, 1)
    if spec.side == "key":
        factors = 0.5 + torch.rand(heads, dim // 2, generator=generator)
        forward = factors.repeat_interleave(2, dim=1)
        pairs = zip(codebooks, forward, strict=True)
        units = [KeyBooks.from_codebooks(*pair).tensors() for pair in pairs]
    else:
        noise = torch.randn(heads, dim, dim, generator=generator)
        inverse = torch.eye(dim) + 0.3 * noise @ noise.transpose(1, 2) / dim
        pairs = zip(codebooks, inverse, strict=True)
        units = [ValueBooks.from_codebooks(*pair).tensors() for pair in pairs]
    return {name: torch.cat([unit[name] for unit in units]) for name in units[0]}


def additive_codec(side: str = "key", *, heads: int = 2, head_dim: int = 16, **config: Any) -> Any:
    """An AdditiveCodec of small geometry; `config` as AdditiveConfig, 8 dims and 3 stages unless
    told otherwise."""
    spec = SideSpec(side, heads, head_dim, head_dim if side == "key" else 0)
    full = AdditiveConfig(**{"sub_dim": 8, "stages": 3, "code_bits": 4, **config})
    return AdditiveCodec.from_tensors(spec, vars(full), additive_tensors(spec, full))


def exact_sums(codec: AdditiveCodec, tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Vectors [1, kv_heads, tokens, head_dim] float64 that are sums of the codec's codewords, and
    the codes [kv_heads, tokens, subs * stages] that name them."""
    heads, subs, stages, count, _ = codec.books.words.shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(count, (heads, tokens, subs * stages), generator=generator)
    return decoded_by_hand(codec, codes)[None], codes.to(torch.uint8)


def decoded_by_hand(codec: AdditiveCodec, codes: Tensor) -> Tensor:
    """What codes [kv_heads, tokens, subs * stages] stand for, float64 [kv_heads, tokens, dim], by
    the formula of docs/format.md."""
    tensors = {name: tensor.double() for name, tensor in codec.tensors().items()}
    heads, subs, stages, _, _ = tensors["codebooks"].shape
    step = tensors["gains" if codec.spec.side == "key" else "scales"]
    rows = torch.empty(*codes.shape[:2], codec.spec.head_dim, dtype=torch.float64)
    for head in range(heads):
        parts = [
            sum(
                tensors["codebooks"][head, sub, stage, codes[head, :, sub * stages + stage].long()]
                * step[head, sub, stage]
                for stage in range(stages)
            )
            for sub in range(subs)
        ]
        whole = torch.cat(parts, dim=1)
        if codec.spec.side == "key":
            rows[head] = (whole + tensors["means"][head]) * tensors["inverse"][head]
        else:
            rows[head] = whole @ tensors["inverse"][head]
    return rows
