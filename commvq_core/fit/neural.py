"""Train the paper's value encoder (section 4.2): straight-through Gumbel softmax and AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class NeuralTraining:
    """The paper's optimizer; it trains 100,000 steps on far more text than a calibration has."""

    steps: int = 2000
    batch: int = 512
    rate: float = 1e-3
    decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


def scaled(values: Tensor, scale: Tensor) -> Tensor:
    """Values [..., dim] over the mean magnitude of each channel."""
    return values / (scale + 1e-6)


def logits(unit: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """`unit` [..., dim] -> [..., 4 * groups]: LayerNorm, Linear, GELU, Linear."""
    x = F.layer_norm(unit, unit.shape[-1:], weights["norm.weight"], weights["norm.bias"])
    x = F.gelu(F.linear(x, weights["enc1.weight"], weights["enc1.bias"]))
    return F.linear(x, weights["out.weight"], weights["out.bias"])


def fit_network(
    values: Tensor,
    *,
    groups: int,
    hidden: int,
    patterns: Tensor,
    training: NeuralTraining,
    seed: int,
) -> dict[str, Tensor]:
    """`values` float32 [n, dim] -> the encoder's weights and the codebook (`embedding`).

    `patterns` [4, 2] are the codes that each logit of a group stands for. The loss is the mean
    squared error of the value over its norm's square. Deterministic in (values, seed).
    """
    dim, generator = values.shape[1], torch.Generator().manual_seed(seed)
    scale = values.abs().mean(dim=0)
    unit = scaled(values, scale)
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    weights = {
        "norm.weight": torch.ones(dim),
        "norm.bias": torch.zeros(dim),
        "enc1.weight": _linear(hidden, dim, generator),
        "enc1.bias": torch.zeros(hidden),
        "out.weight": _linear(4 * groups, hidden, generator),
        "out.bias": torch.zeros(4 * groups),
        "embedding": torch.randn(2 * groups, dim, generator=generator) / math.sqrt(groups * dim),
    }
    for tensor in weights.values():
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        list(weights.values()),
        lr=training.rate,
        betas=training.betas,
        weight_decay=training.decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    # The error of a value is that of its unit vector times the scale of each channel.
    weight = scale.square() / scale.square().mean().clamp_min(1e-30)
    half = partial(torch.autocast, "cpu", torch.bfloat16, enabled=_fast_bfloat16())
    with torch.enable_grad():
        for _ in range(training.steps):
            rows = torch.randint(len(unit), (min(training.batch, len(unit)),), generator=generator)
            batch = unit[rows]
            noise = _gumbel((len(batch), 4, groups), generator)
            with half():
                scores = logits(batch, weights)
            # Patterns come first while training, so that softmax runs along whole rows.
            soft = (scores.float().view(-1, 4, groups) + noise).softmax(dim=1)
            hard = (soft == soft.amax(dim=1, keepdim=True)).to(soft.dtype)
            bits = patterns.T @ ((hard - soft).detach() + soft)
            with half():
                decoded = bits.flatten(1) @ weights["embedding"]
            loss = ((decoded.float() - batch).square() * weight).sum(dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    result = {name: tensor.detach() for name, tensor in weights.items()}
    for name, rows_of_group in (("out.weight", 4), ("out.bias", 4), ("embedding", 2)):
        by_pattern = result[name].unflatten(0, (rows_of_group, groups))
        result[name] = by_pattern.transpose(0, 1).flatten(0, 1).contiguous()
    return {"scale": scale, **result}


def _gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator)
    return uniform.add_(1e-10).log_().neg_().add_(1e-10).log_().neg_()


def _fast_bfloat16() -> bool:
    """Whether products in bfloat16 are this processor's own: twice as fast, at the same error."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def _linear(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(columns)
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * bound
