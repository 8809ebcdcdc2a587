"""Uniform quantization between two ends, the step and the lower end stored in fp16.

The arithmetic of KIVI (section 3) and QuaRot (section 4): with b bits, step = (high - low) /
(2^b - 1), code = round((x - low) / step), x^ = code * step + low.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENDS_BYTES = 4  # of a group's step and lower end
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of fp16; constant groups divide by the first


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is not above `most`.

    >>> largest_divisor(80, 32)
    20
    """
    return next(part for part in range(min(number, most), 0, -1) if number % part == 0)


def quantize(groups: Tensor, width: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Float32 `groups` [..., n] -> (codes uint8 [..., n], ends fp16 [..., 2]: step, lower end).

    `clip` pulls both ends towards zero before the codes are chosen. Codes are those of the step and
    end as stored, so that rounding them to fp16 costs no more than it must.
    """
    low, high = groups.amin(dim=-1) * clip, groups.amax(dim=-1) * clip
    low = low.clamp(-_LARGEST, _LARGEST).half()
    step = ((high - low.float()) / (2**width - 1)).clamp(_SMALLEST, _LARGEST).half()
    levels = ((groups - low.float()[..., None]) / step.float()[..., None]).round()
    return levels.clamp(0, 2**width - 1).to(torch.uint8), torch.stack((step, low), dim=-1)


def dequantize(codes: Tensor, ends: Tensor) -> Tensor:
    """Undo `quantize`: float32 of the codes' shape."""
    step, low = ends.float()[..., None].unbind(-2)
    return codes.float() * step + low


def as_bytes(numbers: Tensor) -> Tensor:
    """fp16 [..., n] -> uint8 [..., 2 n]."""
    return numbers.contiguous().view(torch.uint8)


def from_bytes(data: Tensor) -> Tensor:
    """Undo `as_bytes`, wherever the bytes lie."""
    # A copy: bytes inside a longer row can't be looked at as fp16 where they are.
    return data.clone(memory_format=torch.contiguous_format).view(torch.float16)
