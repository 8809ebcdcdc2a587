"""What the operators return, shapes and dtypes alone: for torch.compile and fake tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core.ops.schema import LIBRARY, NAMESPACE, packed_width


def additive_attend(
    query: Tensor,
    key_codes: Tensor,
    key_books: Tensor,
    key_gains: Tensor,
    key_means: Tensor,
    key_group: int,
    value_codes: Tensor,
    value_books: Tensor,
    value_scales: Tensor,
    turns: Tensor,
    steps: Tensor,
    first: Tensor,
    stop: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        query.new_empty(query.shape[:3]),
        query.new_empty(query.shape[:3]),
    )


def additive_encode(x: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    groups, tokens, _ = x.shape
    columns = codebooks.shape[1] * codebooks.shape[2]
    return x.new_empty((groups, tokens, columns), dtype=torch.uint8)


def additive_step(
    query: Tensor,
    scaling: float,
    interleaved: bool,
    turned: float,
    key_factors: Tensor,
    key_codes: Tensor,
    key_books: Tensor,
    key_gains: Tensor,
    key_means: Tensor,
    key_group: int,
    value_codes: Tensor,
    value_books: Tensor,
    value_scales: Tensor,
    value_inverse: Tensor,
    turns: Tensor,
    steps: Tensor,
    first: Tensor,
    stop: int,
    softcap: float,
    keys: Tensor,
    values: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
) -> Tensor:
    batch, heads, _, dim = query.shape
    return query.new_empty((batch, 1, heads, dim))


def exact_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
    weighted: Tensor,
    peak: Tensor,
    total: Tensor,
    softcap: float,
) -> Tensor:
    return query.new_empty(query.shape)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], packed_width(codes.shape[-1], bits)))


def product_estep(
    products: Tensor, norms: Tensor, table: Tensor, temperature: float, squared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = products.shape[0]
    return (
        table.new_empty(table.shape, dtype=torch.float64),
        torch.empty_like(products, memory_format=torch.contiguous_format),
        products.new_empty((rows,), dtype=torch.int32),
        products.new_empty((rows,)),
    )


def published_attend(
    query: Tensor,
    key_codes: Tensor,
    key_words: Tensor,
    value_codes: Tensor,
    groups: int,
    turns: Tensor,
    steps: Tensor,
    first: Tensor,
    stop: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty((*query.shape[:3], 2 * groups)),
        query.new_empty(query.shape[:3]),
        query.new_empty(query.shape[:3]),
    )


def published_encode(x: Tensor, theta: Tensor, tables: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], 2 * theta.shape[1]), dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], count))


for _function in (
    additive_attend,
    additive_encode,
    additive_step,
    exact_attend,
    pack_codes,
    product_estep,
    published_attend,
    published_encode,
    unpack_codes,
):
    torch.library.register_fake(f"{NAMESPACE}::{_function.__name__}", _function, lib=LIBRARY)
