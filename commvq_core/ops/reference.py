"""The operators in PyTorch: what runs on any device for which nothing was compiled.

Registered as CompositeExplicitAutograd, the key that every backend falls back to, so a compiled
kernel for a backend takes precedence by being registered and callers never choose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from commvq_core.ops.published import (
    PATTERN_BITS,
    PATTERNS,
    ROUND_CODE_BITS,
    ROUND_CODEWORDS,
    split_norm,
)
from commvq_core.ops.schema import ATTEND_BLOCK, LIBRARY, packed_width
from commvq_core.rope import query_pairs

# Candidates (float32) held at once: 32 MB. Tokens are taken in chunks of as many as this allows.
CANDIDATES_AT_ONCE = 1 << 23
TOKENS_AT_ONCE = 512  # decoded at once in attention


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
    """See `commvq_core.ops.additive_attend`."""
    gains = key_gains.float()

    def decoded(part: slice) -> tuple[Tensor, Tensor]:
        keys = _decoded(key_codes[:, :, part], key_books, gains) + key_means[:, None].float()
        return keys, _decoded(value_codes[:, :, part], value_books, value_scales)

    return _attend(query, query.shape[3], decoded, turns, steps, first, stop, softcap)


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
    """See `commvq_core.ops.additive_step`."""
    batch, heads, _, dim = query.shape
    rows = (query.float() * scaling).reshape(batch, keys.shape[1], -1, dim)
    rotary_dim, layout = 2 * turns.shape[3], "interleaved" if interleaved else "half"
    pairs = query_pairs(rows, rotary_dim=rotary_dim, layout=layout, scale=turned)
    weighted, peak, total = additive_attend(
        pairs * key_factors[:, None],
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
        first + sink_keys.shape[2],
        stop,
        softcap,
    )
    weighted = weighted @ value_inverse
    found = exact_attend(rows, keys, values, sink_keys, sink_values, weighted, peak, total, softcap)
    return found.reshape(batch, 1, heads, dim).to(query.dtype)


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
    """See `commvq_core.ops.exact_attend`."""
    keys, values = torch.cat((keys, sink_keys), dim=2), torch.cat((values, sink_values), dim=2)
    scores = query @ keys.float().transpose(-1, -2)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    now = torch.cat((scores, peak[..., None]), dim=-1).amax(dim=-1)
    safe = torch.where(now == -torch.inf, torch.zeros_like(now), now)
    weights, old = torch.exp(scores - safe[..., None]), torch.exp(peak - safe)
    total = total * old + weights.sum(dim=-1)
    weighted = weighted * old[..., None] + weights @ values.float()
    return weighted / total.clamp_min(1e-30)[..., None]


def _attend(
    query: Tensor,
    width: int,
    decoded: Callable[[slice], tuple[Tensor, Tensor]],
    turns: Tensor,
    steps: Tensor,
    first: Tensor,
    stop: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over tokens that `decoded` decodes, some at a time: (weighted, peak, total).

    It gives keys [batch, heads, n, dim] before rotation and what is weighted, [batch, heads or 1,
    n, width].
    """
    rotary, device = 2 * turns.shape[3], query.device
    start_turn = torch.complex(turns[..., 0, :].contiguous(), turns[..., 1, :].contiguous())
    step_turn = torch.complex(steps[..., 0, :].contiguous(), steps[..., 1, :].contiguous())
    weighted = query.new_zeros((*query.shape[:3], width))
    peak = query.new_full(query.shape[:3], -torch.inf)
    total = torch.zeros_like(peak)
    for start in range(0, stop, TOKENS_AT_ONCE):
        tokens = torch.arange(start, min(stop, start + TOKENS_AT_ONCE), device=device)
        keys, values = decoded(slice(start, start + len(tokens)))
        turn = start_turn[:, tokens // ATTEND_BLOCK] * step_turn[tokens % ATTEND_BLOCK]
        pairs = torch.view_as_complex(keys[..., :rotary].unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * turn[:, None]).flatten(-2)
        keys = torch.cat((turned, keys[..., rotary:]), dim=-1)
        scores = query @ keys.transpose(-1, -2)
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = tokens[None, :] < first[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        now = torch.maximum(peak, scores.amax(dim=-1))
        safe = torch.where(now == -torch.inf, torch.zeros_like(now), now)
        weights = torch.exp(scores - safe[..., None])
        old = torch.exp(peak - safe)
        total = total * old + weights.sum(dim=-1)
        weighted = weighted * old[..., None] + weights @ values
        peak = now
    return weighted, peak, total


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
    """See `commvq_core.ops.published_attend`."""
    heads, rounds = key_words.shape[:2]
    pairs = query.shape[3] // 2
    # Real parts of all pairs, then imaginary ones; one row for every codeword of all heads.
    table = key_words.float().transpose(-3, -2).flatten(-2)[..., :pairs].flatten(-2).flatten(0, 2)
    books = torch.arange(heads * rounds, device=query.device) * ROUND_CODEWORDS
    patterns = torch.tensor(PATTERNS, device=query.device)

    def decoded(part: slice) -> tuple[Tensor, Tensor]:
        norm, packed = split_norm(key_codes[:, 0, part])
        codes = unpack_codes(packed, ROUND_CODE_BITS, 2 * heads * rounds).int()
        index = codes.unflatten(-1, (heads * rounds, 2)) + books.int()[:, None]
        rows = index.unflatten(2, (heads, rounds)).transpose(-1, -2)  # [batch, n, heads, 2, rounds]
        sums = torch.nn.functional.embedding_bag(rows.reshape(-1, rounds), table, mode="sum")
        a, b = sums.view(*rows.shape[:-1], 2, pairs).unbind(dim=3)
        re, im = a[..., 0, :] - b[..., 1, :], a[..., 1, :] + b[..., 0, :]  # of a + i b
        keys = torch.stack((re, im), dim=-1).flatten(-2) * norm[..., None, None]
        norm, packed = split_norm(value_codes[:, 0, part])
        ones = patterns[unpack_codes(packed, PATTERN_BITS, groups).int()].flatten(-2)
        return keys.transpose(1, 2), (ones * norm[..., None])[:, None]

    return _attend(query, 2 * groups, decoded, turns, steps, first, stop, softcap)


def _decoded(codes: Tensor, books: Tensor, scales: Tensor) -> Tensor:
    """uint8 [batch, heads, n, subs * stages] -> float32 [batch, heads, n, subs * sub_dim]."""
    heads, subs, stages, size, sub_dim = books.shape
    table = (books * scales[..., None, None]).view(heads * subs * stages * size, sub_dim)
    offsets = torch.arange(heads * subs * stages, device=codes.device) * size
    index = codes.int() + offsets.int().view(1, heads, 1, subs * stages)
    rows = index.unflatten(-1, (subs, stages)).flatten(0, -2).contiguous()
    summed = torch.nn.functional.embedding_bag(rows, table, mode="sum")
    return summed.view(*codes.shape[:3], subs * sub_dim)


def additive_encode(x: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """See `commvq_core.ops.additive_encode`."""
    groups, subs, stages, size, sub_dim = codebooks.shape
    tokens = x.shape[1]
    if beam < 1 or size > 256:
        raise ValueError("additive_encode: beam must be at least 1 and codewords at most 256")
    units = groups * subs  # every (group, sub-vector) is encoded on its own
    if units * tokens == 0:
        return torch.empty((groups, tokens, subs * stages), dtype=torch.uint8, device=x.device)
    vectors = x.reshape(groups, tokens, subs, sub_dim).transpose(1, 2)
    vectors = vectors.reshape(units, tokens, sub_dim)
    books = codebooks.reshape(units, stages, size, sub_dim)
    codes = torch.empty((units, tokens, stages), dtype=torch.uint8, device=x.device)
    chunk = max(1, CANDIDATES_AT_ONCE // max(1, units * beam * size))
    # Autocast would do the matrix products in half precision.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            codes[:, part] = _beam_search(vectors[:, part], books, beam)
    by_group = codes.view(groups, subs, tokens, stages).transpose(1, 2)
    return by_group.reshape(groups, tokens, subs * stages)


def _beam_search(x: Tensor, books: Tensor, beam: int) -> Tensor:
    """Codes uint8 [units, tokens, stages] of `x` [units, tokens, sub_dim] against
    `books` [units, stages, size, sub_dim].

    A candidate's score is |x - sum|^2 - |x|^2. With r = x - (sum so far), appending codeword c adds
    |c|^2 - 2 r.c, so that a step is one batched matrix product. (Tables of c.c' instead, as the C++
    kernel uses them, are no faster here, where selecting dominates, and cost n = 1 a millisecond.)
    """
    units, tokens, sub_dim = x.shape
    stages, size = books.shape[1], books.shape[2]
    residual = x.unsqueeze(2)
    score = x.new_zeros((units, tokens, 1))
    codes = torch.zeros((units, tokens, 1, 0), dtype=torch.uint8, device=x.device)
    for stage in range(stages):
        book = books[:, stage]
        norm = book.square().sum(dim=-1)
        candidates = torch.baddbmm(
            score.reshape(units, -1, 1) + norm.unsqueeze(1),
            residual.reshape(units, -1, sub_dim),
            book.transpose(1, 2),
            alpha=-2.0,
        )
        score, index = _smallest(candidates.view(units * tokens, -1), beam)
        score = score.view(units, tokens, -1)
        parent = (index // size).view(units, tokens, -1, 1)
        chosen = (index % size).view(units, tokens, -1, 1)
        codeword = torch.gather(
            book.unsqueeze(1).expand(-1, tokens, -1, -1), 2, chosen.expand(-1, -1, -1, sub_dim)
        )
        residual = residual.gather(2, parent.expand(-1, -1, -1, sub_dim)) - codeword
        codes = torch.cat(
            [codes.gather(2, parent.expand(-1, -1, -1, stage)), chosen.byte()], dim=-1
        )
    return codes[:, :, 0]


def _smallest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest of each row in rising order with their columns; equal ones keep the
    order of their columns."""
    if count == 1:
        values, index = scores.min(dim=-1, keepdim=True)  # documented to give the first
        return values, index
    if count >= scores.shape[-1]:
        return scores.sort(dim=-1, stable=True)
    # topk leaves the order of equals open, so rows that have any are sorted instead.
    values, index = scores.topk(count + 1, dim=-1, largest=False)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=-1)
    values, index = values[:, :count], index[:, :count]
    if bool(tied.any()):
        sorted_values, sorted_index = scores[tied].sort(dim=-1, stable=True)
        values[tied], index[tied] = sorted_values[:, :count], sorted_index[:, :count]
    return values, index


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """See `commvq_core.ops.pack_codes`."""
    if bits == 8:
        return codes.clone(memory_format=torch.contiguous_format)
    count = codes.shape[-1]
    width = packed_width(count, bits)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.unsqueeze(-1) >> shifts) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, width * 8 - count * bits))
    weights = torch.bitwise_left_shift(
        torch.ones(8, dtype=torch.uint8, device=codes.device),
        torch.arange(8, dtype=torch.uint8, device=codes.device),
    )
    return (stream.unflatten(-1, (width, 8)) * weights).sum(dim=-1, dtype=torch.uint8)


def product_estep(
    products: Tensor, norms: Tensor, table: Tensor, temperature: float, squared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `commvq_core.ops.product_estep`."""
    rows, count = products.shape[0], table.shape[0]
    if count < 1 or temperature <= 0:
        raise ValueError("product_estep: at least 1 codeword and a temperature above 0")
    weights = products.new_zeros((count, count), dtype=torch.float64)
    marginals = torch.empty_like(products, memory_format=torch.contiguous_format)
    best = products.new_empty((rows,), dtype=torch.int32)
    least = products.new_empty((rows,))
    for start in range(0, rows, max(1, CANDIDATES_AT_ONCE // (count * count))):
        part = slice(start, start + max(1, CANDIDATES_AT_ONCE // (count * count)))
        left, right = products[part].split(count, dim=1)
        distance = (norms[part, None] + left)[:, :, None] + (right[:, None, :] + table)
        lowest, place = distance.flatten(1).min(dim=1)
        cost = distance.clamp_min(0) if squared else distance.clamp_min(0).sqrt()
        share = (-(cost / temperature)).flatten(1).softmax(dim=1).view_as(distance)
        weights += share.sum(dim=0, dtype=torch.float64)
        marginals[part, :count] = share.sum(dim=2)
        marginals[part, count:] = share.sum(dim=1)
        best[part], least[part] = place.int(), lowest.clamp_min(0)
    return weights, marginals, best, least


def published_encode(x: Tensor, theta: Tensor, tables: Tensor) -> Tensor:
    """See `commvq_core.ops.published_encode`."""
    heads, tokens, dim = x.shape
    rounds, count = theta.shape[1:3]
    codes = torch.empty((heads, tokens, rounds, 2), dtype=torch.uint8, device=x.device)
    pairs = theta.unflatten(-1, (dim // 2, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)  # i theta
    chunk = max(1, CANDIDATES_AT_ONCE // max(1, heads * count * count))
    for start in range(0, tokens, chunk):
        residual = x[:, start : start + chunk]
        for r in range(rounds):
            plain = residual @ (2 * theta[:, r]).transpose(1, 2)
            other = residual @ (2 * turned[:, r]).transpose(1, 2)
            scores = (tables[:, r, None] - other[:, :, None, :]) - plain[..., None]
            best = scores.flatten(2).min(dim=2).indices  # documented to give the first
            a, b = best // count, best % count
            own = torch.arange(heads, device=x.device)[:, None]
            residual = residual - (theta[own, r, a] + turned[own, r, b])
            codes[:, start : start + chunk, r] = torch.stack((a, b), dim=-1).byte()
    return codes.flatten(2)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """See `commvq_core.ops.unpack_codes`."""
    if bits == 8:
        return packed[..., :count].clone(memory_format=torch.contiguous_format)
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> bit) & 1).flatten(-2)[..., : count * bits]
    shifts = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (stream.unflatten(-1, (count, bits)) << shifts).sum(dim=-1, dtype=torch.uint8)


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
    LIBRARY.impl(_function.__name__, _function, "CompositeExplicitAutograd")
