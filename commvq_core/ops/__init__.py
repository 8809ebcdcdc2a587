"""The toolkit's operators. Callers never ask which implementation runs.

Each is a torch operator (`torch.ops.commvq.*`) with a PyTorch reference for every device and, where
the extension was compiled, a C++ kernel. These wrappers check what they are given; the raw
operators trust their callers with everything but memory safety.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from commvq_core.ops import fake as _fake  # noqa: F401  (registers)
from commvq_core.ops import reference as _reference  # noqa: F401  (registers)
from commvq_core.ops.checks import (
    check_additive,
    check_bits,
    check_bytes,
    check_int,
    check_tensor,
    check_turns,
)
from commvq_core.ops.exact import exact_attend
from commvq_core.ops.load import NativeInfo, load_native
from commvq_core.ops.published import published_attend, published_encode
from commvq_core.ops.schema import ATTEND_BLOCK, MAX_CODEWORDS, MAX_QUERIES, packed_width
from commvq_core.ops.step import additive_step

__all__ = [
    "ATTEND_BLOCK",
    "MAX_QUERIES",
    "NativeInfo",
    "additive_attend",
    "additive_encode",
    "additive_step",
    "exact_attend",
    "most_rows",
    "native_available",
    "native_info",
    "pack_codes",
    "packed_width",
    "product_estep",
    "published_attend",
    "published_encode",
    "unpack_codes",
]

MAX_PRODUCT = 1024  # codewords of a product codebook
MANY_QUERIES = 1 << 20  # rows that share a KV head, where kernels are made for a prompt's

_NATIVE = load_native(Path(__file__).resolve().parent.parent)
_FOR_MANY = {"cpu", "cuda"} & set(_NATIVE.backends)


def native_available() -> bool:
    """Whether compiled kernels were loaded."""
    return _NATIVE.available


def native_info() -> NativeInfo:
    """What runs the operators here, and if not compiled kernels, why."""
    return _NATIVE


def most_rows(device: torch.device) -> int:
    """How many rows of queries that share a KV head one call of `additive_attend` takes there.

    For more of them, matrix products over decoded tokens are the way.
    """
    return MANY_QUERIES if device.type in _FOR_MANY else MAX_QUERIES


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
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a few queries over tokens whose keys and values are additive codes.

    A token's key is its mean plus the sum of its codewords, each times its stage's gain, rotated to
    its position; its value the sum of its codewords. Token t turns by turns[t // 32] times
    steps[t % 32], as complex numbers a pair: the start of its block and the rest, so that no table
    grows with the context. (design: rotation folded into the query, since sums of codewords commute
    with RoPE.)

    Keys are whole numbers so that kernels may add them in int8 and int16: every `key_group`
    neighbouring stages have one gain and codewords that add up within [-127, 127] for any codes;
    the mean plus all stages stays within [-23000, 23000]. A caller who breaks this gets wrong
    numbers, nothing worse. Compiled kernels round a query to 13 bits or more of its norm and
    rotate in 16 bits.

    Args:
        query: float32 [batch, kv_heads, queries, head_dim], scaled and rotated, pairs as
            neighbours; the queries of all heads that share the KV head, at most `most_rows`.
        key_codes, value_codes: uint8 [batch, kv_heads, at least `stop`, subs * stages]; may be a
            view, its last axis contiguous.
        key_books, value_books: int8 [kv_heads, subs, stages, 256, sub_dim]; sub_dim of keys even.
        key_gains: uint8 [kv_heads, subs, stages].
        key_means: int16 [kv_heads, head_dim].
        key_group: 1, 2 or 4.
        value_scales: float32 [kv_heads, subs, stages], what a unit of a book is worth.
        turns: float32 [1 or batch, blocks, 2, rotary_dim / 2]: cosines and sines of the pairs at
            the first token of every block of 32.
        steps: float32 [32, 2, rotary_dim / 2]: the same at 0 to 31 tokens on.
        first: int64 [batch], the first token that a row's queries see.
        stop: they see tokens first to stop - 1.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.

    Returns:
        (weighted float32, of query's shape: the sum over tokens of exp(score - peak) * value; peak
        and total float32 [batch, kv_heads, queries], the largest score and the sum of
        exp(score - peak)). Rows that see nothing get 0, -infinity and 0.

    Raises:
        TypeError: a tensor of another dtype, `stop` not an int.
        ValueError: shapes that do not fit each other.
    """
    check_tensor("query", query, torch.float32)
    most = most_rows(query.device)
    if query.dim() != 4 or not 1 <= query.shape[2] <= most:
        raise ValueError(
            f"query must be [batch, kv_heads, 1 to {most} queries, head_dim], "
            f"not {list(query.shape)}"
        )
    check_additive(
        query,
        key_codes,
        key_books,
        key_gains,
        key_means,
        key_group,
        value_codes,
        value_books,
        value_scales,
        stop,
    )
    check_turns(query, turns, steps, first, stop)
    return torch.ops.commvq.additive_attend(
        query,
        key_codes,
        key_books,
        key_gains,
        key_means,
        key_group,
        value_codes,
        value_books,
        value_scales,
        turns,
        steps,
        first,
        stop,
        float(softcap),
    )


def additive_encode(x: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """Encode vectors as sums of codewords, one from each stage, by beam search.

    Every sub-vector of every group is encoded on its own. Stage by stage, the `beam` partial sums
    nearest to it are kept (1 is greedy residual quantization); the nearest full sum wins. Of
    equally near ones the earlier wins: first by the beam it extends, then by its codeword. A
    sub-vector that holds a NaN or an infinity, or is longer than 1e19, gets codes that are valid
    but mean nothing. The CPU kernel rounds vectors and codewords to int16, by their lengths: of
    two sums that are nearly equally near, it may take the other.

    Args:
        x: float32 [groups, tokens, subs * sub_dim].
        codebooks: float32 [groups, subs, stages, codewords, sub_dim], at most 256 codewords, on the
            device of `x`.
        beam: partial sums kept, at least 1.

    Returns:
        uint8 [groups, tokens, subs * stages]: column `sub * stages + stage` is a codeword's index.

    Raises:
        TypeError: not a tensor, not float32, `beam` not an int.
        ValueError: shapes or devices that do not fit each other, `beam` below 1.
    """
    check_tensor("x", x, torch.float32)
    check_tensor("codebooks", codebooks, torch.float32)
    if x.dim() != 3:
        raise ValueError(f"x must be [groups, tokens, subs * sub_dim], not {list(x.shape)}")
    _check_codebooks(codebooks)
    groups, subs, _, _, sub_dim = codebooks.shape
    if x.shape[0] != groups:
        raise ValueError(f"x has {x.shape[0]} groups but codebooks has {groups}")
    if x.shape[2] != subs * sub_dim:
        raise ValueError(
            f"x is {x.shape[2]} wide but codebooks encodes {subs} sub-vectors of {sub_dim} dims"
        )
    if x.device != codebooks.device:
        raise ValueError(f"x is on {x.device} but codebooks is on {codebooks.device}")
    check_int("beam", beam)
    if beam < 1:
        raise ValueError(f"beam must be at least 1, not {beam}")
    return torch.ops.commvq.additive_encode(x, codebooks, beam)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of `bits` bits each without gaps, row by row.

    Bit order is little-endian within the row: code i takes bits [i * bits, (i + 1) * bits), where
    bit j is bit j % 8 of byte j // 8. Bits left over in the last byte are zero, and bits of a code
    above `bits` are dropped.

    Args:
        codes: uint8 [..., count], each below 2^bits.
        bits: 1 to 8.

    Returns:
        uint8 [..., ceil(count * bits / 8)], a new tensor even for 8 bits.

    Raises:
        TypeError: not a uint8 tensor, `bits` not an int.
        ValueError: `bits` outside 1 to 8, or a tensor without axes.
    """
    check_bytes("codes", codes)
    check_bits(bits)
    return torch.ops.commvq.pack_codes(codes, bits)


def product_estep(
    products: Tensor, norms: Tensor, table: Tensor, temperature: float, squared: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softly assign rows to the count * count centres that sums of two codewords make.

    The squared distance of row x to centre (a, b) is norms + products[a] + products[count + b] +
    table[a, b], so no centre and no dense matrix of distances is needed (paper section 4.1's
    E-step, in product form). Row shares are softmax(-distance / temperature) over all centres.

    Args:
        products: float32 [n, 2 * count], -2 times the inner products with the codewords: first of
            the one codebook, then of the other.
        norms: float32 [n], |x|^2.
        table: float32 [count, count], |first_a + second_b|^2.
        temperature: above 0, in units of the distance (of its square when `squared`).
        squared: whether shares follow the squared distance instead of the distance.

    Returns:
        (weights float64 [count, count], the sum of shares over the rows; marginals float32
        [n, 2 * count], each row's shares summed over b, then over a; best int32 [n], a * count + b
        of the nearest centre, the first of equal ones; least float32 [n], its squared distance).

    Raises:
        TypeError: not float32 tensors.
        ValueError: shapes that do not fit each other, no codeword, a temperature not above 0.
    """
    for name, value in (("products", products), ("norms", norms), ("table", table)):
        check_tensor(name, value, torch.float32)
    if products.dim() != 2 or norms.dim() != 1 or table.dim() != 2:
        raise ValueError("products must be [n, 2 * count], norms [n] and table [count, count]")
    count = table.shape[0]
    if table.shape[1] != count or products.shape[1] != 2 * count or len(norms) != len(products):
        raise ValueError(
            f"products {list(products.shape)}, norms {list(norms.shape)} and table "
            f"{list(table.shape)} do not fit each other"
        )
    if not 1 <= count <= MAX_PRODUCT:
        raise ValueError(f"table must have 1 to {MAX_PRODUCT} codewords, not {count}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    return torch.ops.commvq.product_estep(products, norms, table, float(temperature), squared)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row that `pack_codes` packed.

    Args:
        packed: uint8 [..., width], width at least ceil(count * bits / 8).
        bits: 1 to 8.
        count: codes a row.

    Returns:
        uint8 [..., count].

    Raises:
        TypeError: not a uint8 tensor, `bits` or `count` not an int.
        ValueError: `bits` outside 1 to 8, or rows too short for `count` codes.
    """
    check_bytes("packed", packed)
    check_bits(bits)
    check_int("count", count)
    if count < 0:
        raise ValueError(f"count must not be negative, not {count}")
    if packed.shape[-1] < packed_width(count, bits):
        raise ValueError(
            f"packed holds {packed.shape[-1]} bytes a row but {count} codes of {bits} bits take "
            f"{packed_width(count, bits)}"
        )
    return torch.ops.commvq.unpack_codes(packed, bits, count)


def _check_codebooks(codebooks: Tensor) -> None:
    if codebooks.dim() != 5:
        raise ValueError(
            "codebooks must be [groups, subs, stages, codewords, sub_dim], "
            f"not {list(codebooks.shape)}"
        )
    _, subs, stages, codewords, sub_dim = codebooks.shape
    if not 1 <= codewords <= MAX_CODEWORDS:
        raise ValueError(f"codebooks must have 1 to {MAX_CODEWORDS} codewords, not {codewords}")
    if min(subs, stages, sub_dim) < 1:
        raise ValueError(f"codebooks must have no empty axis, not {list(codebooks.shape)}")
