"""Vectors and codebooks to encode, made from a seed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from commvq_core.ops import ATTEND_BLOCK, additive_step, packed_width


def gaussian(
    groups: int = 1,
    tokens: int = 20,
    subs: int = 1,
    stages: int = 3,
    codewords: int = 16,
    sub_dim: int = 8,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """x [groups, tokens, subs * sub_dim] and codebooks [groups, subs, stages, codewords, sub_dim]
    whose stages shrink as fitted ones do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, tokens, subs * sub_dim, generator=generator)
    books = torch.randn(groups, subs, stages, codewords, sub_dim, generator=generator)
    scale = 0.8 * 0.75 ** torch.arange(stages)
    return x, books * scale[:, None, None]


def integers(
    tokens: int = 40, codewords: int = 8, sub_dim: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Small integers: every score is exact in float32 and most of them are tied."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (2, tokens, 2 * sub_dim), generator=generator)
    books = torch.randint(-2, 3, (2, 2, 3, codewords, sub_dim), generator=generator)
    return x.float(), books.float()


def product(tokens: int, count: int, dim: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """(products, norms, table) of Gaussian vectors and two Gaussian codebooks, for an E-step."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, dim, generator=generator)
    books = torch.randn(2, count, dim, generator=generator)
    table = (books[0][:, None] + books[1][None]).square().sum(dim=-1)
    return x @ (-2 * books.flatten(0, 1)).T, x.square().sum(dim=1), table


def attention(
    batch: int = 2,
    heads: int = 2,
    queries: int = 3,
    dim: int = 16,
    tokens: int = 100,
    subs: int = 1,
    stages: int = 3,
    rotary: int = 16,
    rows: int = 1,
    group: int = 2,
    spread: float = 0.3,
) -> tuple[Any, ...]:
    """Arguments of ops.additive_attend but the last two; rows begin at different tokens."""
    generator = torch.Generator().manual_seed(11)

    def side(largest: int) -> tuple[Tensor, Tensor]:
        shape = (batch, heads, tokens, subs * stages)
        codes = torch.randint(256, shape, generator=generator).to(torch.uint8)
        shape = (heads, subs, stages, 256, dim // subs)
        books = torch.randint(-largest, largest + 1, shape, generator=generator)
        return codes, books.to(torch.int8)

    # Stages of a group share their gain, and their codewords add up within a byte.
    keys = side(127 // min(group, stages))
    gains = torch.randint(1, max(2, 160 // stages), (heads, subs, stages), generator=generator)
    gains = gains[..., torch.arange(stages) // group * group].byte()
    means = torch.randint(-2000, 2001, (heads, dim), generator=generator).short()
    values = side(127)
    scales = 0.02 * torch.rand((heads, subs, stages), generator=generator)
    query = spread / 3000 * torch.randn(batch, heads, queries, dim, generator=generator)
    first = torch.arange(batch) * 7
    return query, *keys, gains, means, group, *values, scales, *turns(tokens, rotary, rows), first


def exact(
    batch: int = 2,
    heads: int = 2,
    queries: int = 3,
    dim: int = 16,
    tokens: int = 40,
    sinks: int = 4,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Arguments of ops.exact_attend but the last."""
    generator = torch.Generator().manual_seed(12)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, heads, *shape, generator=generator)

    query = spread * random(queries, dim) * dim**-0.5
    parts = [random(count, dim).to(dtype) for count in (tokens, tokens, sinks, sinks)]
    total = 1 + 30 * random(queries).square()
    return query, *parts, random(queries, dim) * total[..., None], random(queries), total


def step(
    tokens: int = 100,
    window: int = 40,
    sinks: int = 4,
    groups: int = 3,
    interleaved: bool = False,
    turned: float = 1.0,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    **shape: Any,
) -> dict[str, Any]:
    """Arguments of ops.additive_step by name but `softcap`; `groups` query heads a KV head."""
    generator = torch.Generator().manual_seed(13)
    coded = attention(queries=1, tokens=tokens, spread=1.0, **shape)
    names = "key_codes key_books key_gains key_means key_group value_codes value_books value_scales"
    found: dict[str, Any] = dict(zip(names.split(), coded[1:9], strict=True))
    found |= dict(zip(("turns", "steps", "first"), coded[9:], strict=True))
    batch, heads, _, dim = coded[0].shape
    # In the space of codes a key's numbers are thousands, and a value's some tens.
    factors = 0.5 + torch.rand(heads, dim // 2, generator=generator)
    found["key_factors"] = factors.repeat_interleave(2, dim=1) / 3000
    shape_of = (heads, dim, dim)
    found["value_inverse"] = 0.1 * torch.randn(shape_of, generator=generator) * dim**-0.5
    for name, count in (("keys", window), ("values", window), ("sink_keys", sinks)):
        found[name] = torch.randn(batch, heads, count, dim, generator=generator).to(dtype)
    found["sink_values"] = torch.randn(batch, heads, sinks, dim, generator=generator).to(dtype)
    found["query"] = torch.randn(batch, groups * heads, 1, dim, generator=generator).to(dtype)
    found |= {"scaling": spread * dim**-0.5, "interleaved": interleaved, "turned": turned}
    return found | {"stop": tokens}


def one_step(softcap: float = 0.0, **case: Any) -> tuple[Any, ...]:
    """Arguments of ops.additive_step in their order."""
    given = step(**case) | {"softcap": softcap}
    return tuple(given[name] for name in inspect.signature(additive_step).parameters)


def turns(tokens: int, rotary: int, rows: int) -> tuple[Tensor, Tensor]:
    """How tokens turn, as attention takes it: at the starts of blocks, and within them."""
    frequencies = 100.0 ** -torch.linspace(0, 1, rotary // 2, dtype=torch.float64)
    shift = torch.arange(rows)[:, None] - 5  # positions may begin below zero, at padding
    starts = torch.arange(0, max(tokens, 1), ATTEND_BLOCK) + shift

    def turned(positions: Tensor) -> Tensor:
        angles = positions[..., None] * frequencies
        return torch.stack((angles.cos(), angles.sin()), dim=-2).float()

    return turned(starts), turned(torch.arange(ATTEND_BLOCK))


def published(
    batch: int = 2,
    heads: int = 2,
    queries: int = 3,
    dim: int = 16,
    tokens: int = 100,
    rounds: int = 3,
    groups: int = 10,
    rotary: int = 16,
    rows: int = 1,
    spread: float = 0.3,
) -> tuple[Any, ...]:
    """Arguments of ops.published_attend but the last two; rows begin at different tokens."""
    generator = torch.Generator().manual_seed(12)

    def side(count: int, bits: int) -> Tensor:
        shape = (batch, 1, tokens, packed_width(count, bits))
        codes = torch.randint(256, shape, generator=generator).to(torch.uint8)
        norms = (0.5 + torch.rand(*shape[:3], 1, generator=generator)).half()
        return torch.cat((norms.view(torch.uint8), codes), dim=-1)

    panels = -(-dim // 64)
    most = 23000 // (2 * rounds)
    shape = (heads, rounds, 64, panels, 2, 32)
    words = torch.randint(-most, most + 1, shape, generator=generator)
    pairs = torch.arange(panels * 32).view(panels, 1, 32)
    words = torch.where(pairs < dim // 2, words, 0).to(torch.int16)
    query = spread / 3000 * torch.randn(batch, heads, queries, dim, generator=generator)
    keys, values = side(heads * rounds * 2, 6), side(groups, 2)
    first = torch.arange(batch) * 7
    return query, keys, words, values, groups, *turns(tokens, rotary, rows), first


def rounds(
    heads: int, tokens: int, dim: int, count: int, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of ops.published_encode: x, theta and tables of `count` rounds."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(heads, tokens, dim, generator=generator)
    theta = torch.randn(heads, count, 64, dim, generator=generator)
    theta *= 0.6 ** torch.arange(1, count + 1)[:, None, None]
    if whole:
        x, theta = (3 * x).round(), (3 * theta).round()
    pairs = torch.view_as_complex(theta.unflatten(-1, (-1, 2)))
    centres = pairs[:, :, :, None] + 1j * pairs[:, :, None]
    return x, theta, (centres.real.square() + centres.imag.square()).sum(dim=-1)
