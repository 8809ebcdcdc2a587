"""The published quantizers again, from their papers' formulas: loops over single numbers, NumPy.

Only fp16 is taken over: what is stored in fp16 is rounded to it before it is used.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def asymmetric(group: Floats, bits: int, clip: float = 1.0) -> Floats:
    """A group of numbers after rounding to 2^bits evenly spaced ones between its ends."""
    low = float(np.float16(np.float32(group.min() * clip)))
    step = float(np.float16((group.max() * clip - low) / (2**bits - 1)))
    result = np.empty_like(group)
    for i, x in enumerate(group):
        code = min(max(round((x - low) / step), 0), 2**bits - 1)
        result[i] = code * step + low
    return result


def kivi_keys(keys: Floats, bits: int, group: int = 32) -> Floats:
    """Keys [tokens, channels] of one head: every channel over groups of tokens."""
    result = np.empty_like(keys)
    for channel in range(keys.shape[1]):
        for start in range(0, len(keys), group):
            part = slice(start, start + group)
            result[part, channel] = asymmetric(keys[part, channel], bits)
    return result


def kivi_values(values: Floats, bits: int, group: int) -> Floats:
    """Values [tokens, channels] of one head: every token over groups of channels."""
    result = np.empty_like(values)
    for token in range(len(values)):
        for start in range(0, values.shape[1], group):
            part = slice(start, start + group)
            result[token, part] = asymmetric(values[token, part], bits)
    return result


def walsh(size: int) -> Floats:
    """The Walsh-Hadamard matrix: entry (i, j) is -1 to the number of bits that i and j share."""
    return np.array([[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)])


def normal_cell(low: float, high: float) -> tuple[float, float]:
    """Mass and first moment of the standard normal density between two ends."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def mass(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    return mass(high) - mass(low), density(low) - density(high)


def normal_levels(count: int) -> list[float]:
    """The best levels for a standard normal variable (Max 1960), by Lloyd's iteration."""
    levels = [4.0 * (i + 0.5) / count - 2.0 for i in range(count)]
    for _ in range(1000):
        ends = [-40.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), 40.0]
        cells = [normal_cell(*pair) for pair in itertools.pairwise(ends)]
        levels = [moment / mass for mass, moment in cells]
    return levels


def nearest(x: float, levels: Floats) -> float:
    """The level nearest to a number."""
    return min((float(level) for level in levels), key=lambda level: abs(level - x))


def kvquant_keys(
    keys: Floats, levels: Floats, middle: Floats, half: Floats, kept: int, group: int
) -> Floats:
    """Keys [tokens, channels]: levels of each channel's range; a group's farthest `kept` exact."""
    result = np.empty_like(keys)
    for t, row in enumerate(keys):
        for c, x in enumerate(row):
            result[t, c] = nearest((x - middle[c]) / half[c], levels) * half[c] + middle[c]
    for start in range(0, len(keys), group):
        places = [(t, c) for t in range(start, start + group) for c in range(keys.shape[1])]
        places.sort(key=lambda at: half[at[1]] - abs(keys[at] - middle[at[1]]))
        for at in places[:kept]:
            result[at] = np.float16(keys[at])
    return result


def kvquant_values(values: Floats, levels: Floats, tail: int) -> Floats:
    """Values [tokens, channels]: the ends exact, levels of the range of the rest."""
    result = np.empty_like(values)
    for t, row in enumerate(values):
        order = sorted(range(len(row)), key=lambda c: row[c])
        outliers, rest = order[:tail] + order[-tail:], row[order[tail:-tail]]
        middle = float(np.float16((rest.max() + rest.min()) / 2))
        half = float(np.float16((rest.max() - rest.min()) / 2))
        for c, x in enumerate(row):
            result[t, c] = nearest((x - middle) / half, levels) * half + middle
        result[t, outliers] = row[outliers].astype(np.float16)
    return result
