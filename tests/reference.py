"""Naive NumPy float64 versions, written from the definitions and equations, to test against.

Slow and plain on purpose. Append yours; share nothing with the code under test.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def additive_encode(
    x: NDArray[np.floating], codebooks: NDArray[np.floating], beam: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Beam search over sums of codewords, by the definition.

    Args:
        x: [groups, tokens, subs * sub_dim].
        codebooks: [groups, subs, stages, codewords, sub_dim].

    Returns:
        codes uint8 [groups, tokens, subs * stages], and margins float64 [groups, tokens, subs]: by
        how much |x - sum|^2 would have to change for any decision to fall otherwise (0 for a tie).
    """
    x = np.asarray(x, np.float64)
    codebooks = np.asarray(codebooks, np.float64)
    groups, subs, stages, _, sub_dim = codebooks.shape
    tokens = x.shape[1]
    codes = np.zeros((groups, tokens, subs * stages), np.uint8)
    margins = np.full((groups, tokens, subs), np.inf)
    for group, token, sub in np.ndindex(groups, tokens, subs):
        vector = x[group, token, sub * sub_dim : (sub + 1) * sub_dim]
        chosen, sums = np.zeros((1, 0), np.uint8), np.zeros((1, sub_dim))
        for stage in range(stages):
            book = codebooks[group, sub, stage]
            candidates = (sums[:, None, :] + book).reshape(-1, sub_dim)
            distances = ((vector - candidates) ** 2).sum(axis=1)
            order = np.argsort(distances, kind="stable")
            kept = 1 if stage == stages - 1 else beam
            if kept < len(order):
                gap = distances[order[kept]] - distances[order[kept - 1]]
                margins[group, token, sub] = min(margins[group, token, sub], gap)
            parents, codewords = np.divmod(order[:beam], len(book))
            chosen = np.column_stack([chosen[parents], codewords])
            sums = candidates[order[:beam]]
        codes[group, token, sub * stages : (sub + 1) * stages] = chosen[0]
    return codes, margins


def additive_decode(
    codes: NDArray[np.uint8], codebooks: NDArray[np.floating]
) -> NDArray[np.float64]:
    """The sums of the codewords that `codes` [groups, tokens, subs * stages] name:
    [groups, tokens, subs * sub_dim]."""
    codebooks = np.asarray(codebooks, np.float64)
    groups, subs, stages, _, sub_dim = codebooks.shape
    out = np.zeros((groups, codes.shape[1], subs * sub_dim))
    for group, token, sub, stage in np.ndindex(groups, codes.shape[1], subs, stages):
        codeword = codebooks[group, sub, stage, codes[group, token, sub * stages + stage]]
        out[group, token, sub * sub_dim : (sub + 1) * sub_dim] += codeword
    return out


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """One row of codes as one little-endian integer: code i shifted by i * bits."""
    number = sum((int(code) % 2**bits) << (i * bits) for i, code in enumerate(codes))
    return np.frombuffer(number.to_bytes((len(codes) * bits + 7) // 8, "little"), np.uint8)


def unpack_codes(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """One row of bytes as one little-endian integer: code i is its bits from i * bits on."""
    number = int.from_bytes(packed.tobytes(), "little")
    return np.array([number >> (i * bits) & (2**bits - 1) for i in range(count)])


def rotate(
    x: NDArray[np.floating],
    angles: NDArray[np.floating],
    *,
    rotary_dim: int,
    layout: str,
    scale: float = 1.0,
) -> NDArray[np.float64]:
    """RoPE by its definition: pair j as the complex number re + i im, times scale * exp(i angle).

    `x` [..., head_dim] in the model's order, `angles` [..., rotary_dim/2] (position times inverse
    frequency). Layout "half" has pair j at (j, j + rotary_dim/2), "interleaved" at (2j, 2j + 1).
    """
    x = np.asarray(x, np.float64)
    out = x.copy()
    for pair in range(rotary_dim // 2):
        if layout == "half":
            re, im = pair, pair + rotary_dim // 2
        else:
            re, im = 2 * pair, 2 * pair + 1
        turned = (x[..., re] + 1j * x[..., im]) * scale * np.exp(1j * angles[..., pair])
        out[..., re], out[..., im] = turned.real, turned.imag
    return out


def one_hot(codes: NDArray[np.integer], count: int) -> NDArray[np.float64]:
    """`codes` [n, stages] -> [n, stages * count], with a one where a stage's code is."""
    rows, stages = codes.shape
    out = np.zeros((rows, stages * count))
    for row, stage in np.ndindex(rows, stages):
        out[row, stage * count + codes[row, stage]] = 1.0
    return out


def joint_refit(
    codes: NDArray[np.integer], rows: NDArray[np.floating], count: int
) -> NDArray[np.float64]:
    """Least squares over all stages at once: the codebooks C [stages * count, d] of smallest norm
    among those that minimise |B C - rows|^2, where B is the one-hot matrix of the codes."""
    return np.linalg.lstsq(one_hot(codes, count), np.asarray(rows, np.float64), rcond=None)[0]


def softmax_attention(
    query: NDArray[np.floating],
    keys: NDArray[np.floating],
    values: NDArray[np.floating],
    scale: float,
) -> NDArray[np.float64]:
    """One query [d] over keys and values [n, d]: softmax(scale * K q)^T V."""
    scores = scale * np.asarray(keys, np.float64) @ np.asarray(query, np.float64)
    weights = np.exp(scores - scores.max())
    return weights @ np.asarray(values, np.float64) / weights.sum()


def complex_pairs(x: NDArray[np.floating]) -> NDArray[np.complex128]:
    """Canonical vectors [..., dim] as complex numbers [..., dim / 2]."""
    x = np.asarray(x, np.float64)
    return x[..., 0::2] + 1j * x[..., 1::2]


def product_centres(theta: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """theta [count, pairs] -> [count, count, pairs], c_ab = theta_a + i theta_b."""
    return theta[:, None, :] + 1j * theta[None, :, :]


def dense_estep(
    x: NDArray[np.complex128],
    theta: NDArray[np.complex128],
    temperature: float,
    squared: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares [n, count, count], softmax of -distance / temperature, and the distances squared."""
    gap = x[:, None, None, :] - product_centres(theta)[None]
    distance = (np.abs(gap) ** 2).sum(axis=-1)
    exponent = -(distance if squared else np.sqrt(distance)) / temperature
    exponent -= exponent.max(axis=(1, 2), keepdims=True)
    share = np.exp(exponent)
    return share / share.sum(axis=(1, 2), keepdims=True), distance


def dense_mstep(
    x: NDArray[np.complex128], share: NDArray[np.float64], count: int
) -> NDArray[np.complex128]:
    """The least-squares theta by a generic solver, one equation a row, a and b."""
    rows, targets = [], []
    for n, a, b in np.ndindex(share.shape):
        root = np.sqrt(share[n, a, b])
        line = np.zeros(count, np.complex128)
        line[a] += root
        line[b] += 1j * root
        rows.append(line)
        targets.append(root * x[n])
    return np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
