"""The operators' schemas: defined in Python, so that they exist whether or not C++ was compiled."""

from __future__ import annotations

import torch

NAMESPACE = "commvq"
MAX_QUERIES = 256  # rows that share a KV head, in attention over codes on any device
MAX_CODEWORDS = 256  # a code is one byte
ATTEND_BLOCK = 32  # tokens that share one turn of the query, in attention over codes

SCHEMAS = (
    "additive_attend(Tensor query, Tensor key_codes, Tensor key_books, Tensor key_gains, "
    "Tensor key_means, int key_group, "
    "Tensor value_codes, Tensor value_books, Tensor value_scales, Tensor turns, Tensor steps, "
    "Tensor first, int stop, float softcap) -> (Tensor, Tensor, Tensor)",
    "additive_step(Tensor query, float scaling, bool interleaved, float turned, "
    "Tensor key_factors, Tensor key_codes, Tensor key_books, Tensor key_gains, Tensor key_means, "
    "int key_group, Tensor value_codes, Tensor value_books, Tensor value_scales, "
    "Tensor value_inverse, Tensor turns, Tensor steps, Tensor first, int stop, float softcap, "
    "Tensor keys, Tensor values, Tensor sink_keys, Tensor sink_values) -> Tensor",
    "additive_encode(Tensor x, Tensor codebooks, int beam) -> Tensor",
    "exact_attend(Tensor query, Tensor keys, Tensor values, Tensor sink_keys, Tensor sink_values, "
    "Tensor weighted, Tensor peak, Tensor total, float softcap) -> Tensor",
    "pack_codes(Tensor codes, int bits) -> Tensor",
    "product_estep(Tensor products, Tensor norms, Tensor table, float temperature, bool squared) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "published_attend(Tensor query, Tensor key_codes, Tensor key_words, Tensor value_codes, "
    "int groups, Tensor turns, Tensor steps, Tensor first, int stop, float softcap) "
    "-> (Tensor, Tensor, Tensor)",
    "published_encode(Tensor x, Tensor theta, Tensor tables) -> Tensor",
    "unpack_codes(Tensor packed, int bits, int count) -> Tensor",
)
OPS = tuple(schema.partition("(")[0] for schema in SCHEMAS)
# What is called on CPUs alone, or by fitting and the published preset's encoding: on a GPU the
# PyTorch reference serves.
CPU_OPS = ("additive_step", "exact_attend", "product_estep", "published_encode")

# Kept for as long as the process lives: dropping it would unregister the operators.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
for _schema in SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take in one row."""
    return (count * bits + 7) // 8
