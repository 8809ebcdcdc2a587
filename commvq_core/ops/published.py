"""The published preset's codes: how their rows look, attention over them, and encoding keys.

A token has one row of keys and one of values for all KV heads. A row begins with an fp16 norm;
codes follow, packed as `pack_codes` packs them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from commvq_core.ops.checks import check_int, check_tensor, check_turns
from commvq_core.ops.schema import MAX_QUERIES, packed_width

NORM_BYTES = 2
# Keys: a round has two codes, a and b, of the centre word[a] + i word[b] (paper section 4.1).
ROUND_CODEWORDS, ROUND_CODE_BITS = 64, 6
# Values: a group of two bits names a pattern of two 0/1 codes (paper section 4.2).
PATTERNS, PATTERN_BITS = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)), 2
PANEL = 32  # pairs whose real parts, then imaginary parts, lie together in the operator's codebooks


def split_norm(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [batch, tokens, bytes] -> (norms float32 [batch, tokens], the codes behind them)."""
    # A copy, since a row of odd length can't be looked at as fp16 where it lies, not even a single
    # one, which counts as contiguous whatever its strides.
    head = codes.new_empty((*codes.shape[:-1], NORM_BYTES)).copy_(codes[..., :NORM_BYTES])
    return head.view(torch.float16)[..., 0].float(), codes[..., NORM_BYTES:]


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
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a few queries over tokens in the published preset's codes.

    A token's key is its norm times the sum over rounds of word[a] + i word[b], rotated to its
    position as `additive_attend` says. Its value is its norm times a sum of codebook rows, those of
    its 0/1 codes that are 1; since that is linear, the operator adds up weights instead, and the
    caller multiplies the sums by the codebook, once.

    Words are whole numbers so that kernels may add them in int16: those of any codes add up within
    [-23000, 23000]. A caller who breaks this gets wrong numbers, nothing worse. Compiled kernels
    round a query to 13 bits or more of its norm and rotate in 16 bits.

    Args:
        query: float32 [batch, kv_heads, queries, head_dim], scaled and rotated, pairs as
            neighbours; the queries of all heads that share the KV head, at most 256.
        key_codes: uint8 [batch, 1, at least `stop`, bytes]: for each KV head and round a and b.
        key_words: int16 [kv_heads, rounds, 64, panels, 2, 32]: panel p holds the real parts of the
            pairs from 32 p on, then their imaginary parts, zeros behind the last pair.
        value_codes: uint8 [batch, 1, at least `stop`, bytes]. Both may be views, their last axis
            contiguous.
        groups: of two value codes each, one of `PATTERNS`.
        turns, steps, first, stop, softcap: as in `additive_attend`.

    Returns:
        (sums float32 [batch, kv_heads, queries, 2 * groups]: over tokens, of exp(score - peak)
        times the value's norm where that code is 1; peak and total float32 [batch, kv_heads,
        queries], the largest score and the sum of exp(score - peak)). Rows that see nothing get 0,
        -infinity and 0.

    Raises:
        TypeError: a tensor of another dtype, `groups` or `stop` not an int.
        ValueError: shapes that do not fit each other.
    """
    check_tensor("query", query, torch.float32)
    check_tensor("key_words", key_words, torch.int16)
    check_int("groups", groups)
    check_int("stop", stop)
    if query.dim() != 4 or not 1 <= query.shape[2] <= MAX_QUERIES or query.shape[3] % 2:
        raise ValueError(
            f"query must be [batch, kv_heads, 1 to {MAX_QUERIES} queries, an even head_dim], "
            f"not {list(query.shape)}"
        )
    batch, heads, _, dim = query.shape
    rounds = key_words.shape[1] if key_words.dim() == 6 else 0
    panels = -(-dim // (2 * PANEL))
    if rounds < 1 or list(key_words.shape) != [heads, rounds, ROUND_CODEWORDS, panels, 2, PANEL]:
        raise ValueError(
            f"key_words must be [{heads}, rounds, {ROUND_CODEWORDS}, {panels}, 2, {PANEL}], "
            f"not {list(key_words.shape)}"
        )
    if groups < 1:
        raise ValueError(f"groups must be at least 1, not {groups}")
    for side, codes, count, bits in (
        ("key", key_codes, heads * rounds * 2, ROUND_CODE_BITS),
        ("value", value_codes, groups, PATTERN_BITS),
    ):
        check_tensor(f"{side}_codes", codes, torch.uint8)
        row = NORM_BYTES + packed_width(count, bits)
        fits = codes.dim() == 4 and codes.shape[:2] == (batch, 1) and codes.shape[3] == row
        if not fits or not codes.shape[2] >= stop >= 0:
            raise ValueError(
                f"{side}_codes must be [{batch}, 1, at least {stop}, {row}], not "
                f"{list(codes.shape)}"
            )
    check_turns(query, turns, steps, first, stop)
    return torch.ops.commvq.published_attend(
        query,
        key_codes,
        key_words,
        value_codes,
        groups,
        turns,
        steps,
        first,
        stop,
        float(softcap),
    )


def published_encode(x: Tensor, theta: Tensor, tables: Tensor) -> Tensor:
    """Encode keys in residual rounds of product centres (paper section 4.1).

    In each round the centre theta[a] + i theta[b] that is nearest to what the rounds before left is
    chosen, the first of equally near ones in the order of a, then b. A vector that holds a NaN or
    an infinity gets codes that are valid but mean nothing.

    Args:
        x: float32 [heads, tokens, dim], canonical, pairs as neighbours.
        theta: float32 [heads, rounds, 64, dim].
        tables: float32 [heads, rounds, 64, 64], |theta[a] + i theta[b]|^2.

    Returns:
        uint8 [heads, tokens, 2 * rounds]: a and b of each round.

    Raises:
        TypeError: not float32 tensors.
        ValueError: shapes that do not fit each other.
    """
    for name, value in (("x", x), ("theta", theta), ("tables", tables)):
        check_tensor(name, value, torch.float32)
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(f"x must be [heads, tokens, an even dim], not {list(x.shape)}")
    heads, _, dim = x.shape
    rounds = theta.shape[1] if theta.dim() == 4 else 0
    count = ROUND_CODEWORDS
    if list(theta.shape) != [heads, rounds, count, dim]:
        raise ValueError(
            f"theta must be [{heads}, rounds, {count}, {dim}], not {list(theta.shape)}"
        )
    if list(tables.shape) != [heads, rounds, count, count]:
        raise ValueError(
            f"tables must be [{heads}, {rounds}, {count}, {count}], not {list(tables.shape)}"
        )
    return torch.ops.commvq.published_encode(x, theta, tables)
