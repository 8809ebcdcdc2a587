"""Codebooks of keys in whole numbers, so that attention can add codewords in single bytes.

Every stage's codewords are int8; the sum of `group` neighbouring stages stays within int8 for any
codes, counts `gain` times, and all of them with the mean stay within int16. A factor for each pair
of dims evens out how far codewords spread, which takes most of the rounding's harm away: rounding
an 8-stage codebook in groups of 2 adds 1.2 % to its error (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from commvq_core.codecs.base import SideSpec, require_tensor

_LIMIT = 23_000.0  # of a key's numbers: one that RoPE turns still fits int16
_BYTE = 127.0
_NOISE = 0.04  # of a fit's error: what rounding for groups of two stages may come to


@dataclass(frozen=True)
class KeyBooks:
    """One layer's. A key is `n * inverse`, with n = `means` + the sum of `gains` times codewords.

    `words` int8 [kv_heads, subs, stages, codewords, sub_dim]; `gains` uint8 [kv_heads, subs,
    stages]; `means` int16 [kv_heads, head_dim]; `spread` and `inverse` float32 [kv_heads,
    head_dim], equal within a pair: `n * spread` is the key in the space of the metric. `group`
    neighbouring stages (4, 2 or 1: the most that is true) have one gain and codewords that add up
    within int8.
    """

    words: Tensor
    gains: Tensor
    means: Tensor
    spread: Tensor
    inverse: Tensor
    group: int

    @property
    def codebooks(self) -> Tensor:
        """The codewords in the space of the metric, float32, shaped as `words`; made anew."""
        heads, subs, _, _, sub_dim = self.words.shape
        spread = self.spread.view(heads, subs, 1, 1, sub_dim)
        return self.words * (self.gains[..., None, None].float() * spread)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """All that stays in memory."""
        return self.words, self.gains, self.means, self.spread, self.inverse

    def transformed(self, rows: Tensor) -> Tensor:
        """Keys [..., kv_heads, n, head_dim] less their mean, in the space of the metric."""
        numbers = rows / self.inverse[:, None] - self.means[:, None].float()
        return numbers * self.spread[:, None]

    def restored(self, rows: Tensor) -> Tensor:
        """The inverse of `transformed`."""
        numbers = rows / self.spread[:, None] + self.means[:, None].float()
        return numbers * self.inverse[:, None]

    def to(self, device: torch.device | str) -> KeyBooks:
        words, gains, means, spread, inverse = (tensor.to(device) for tensor in self.held)
        return KeyBooks(words, gains, means, spread, inverse, self.group)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "codebooks": self.words,
            "gains": self.gains,
            "means": self.means,
            "spread": self.spread,
            "inverse": self.inverse,
        }

    @classmethod
    def from_tensors(
        cls, spec: SideSpec, shape: tuple[int, ...], tensors: Mapping[str, Tensor]
    ) -> KeyBooks:
        """`shape` is that of the codebooks. Raises ValueError naming the tensor that is wrong."""
        vectors = (spec.kv_heads, spec.head_dim)
        words = require_tensor(tensors, "codebooks", shape, torch.int8)
        gains = require_tensor(tensors, "gains", shape[:3], torch.uint8)
        books = cls(
            words,
            gains,
            require_tensor(tensors, "means", vectors, torch.int16),
            require_tensor(tensors, "spread", vectors, torch.float32),
            require_tensor(tensors, "inverse", vectors, torch.float32),
            _largest_group(words, gains),
        )
        books._check(spec)
        return books

    @classmethod
    def from_codebooks(
        cls, codebooks: Tensor, forward: Tensor, error: float | None = None
    ) -> KeyBooks:
        """One head's, rounded from float32 [subs, stages, codewords, sub_dim].

        Codewords are of keys times `forward` [head_dim], which is equal within a pair. Two stages
        share a byte, for speed, unless rounding them so is more than a few hundredths of `error`,
        the mean squared error of a key's vector; then each has its own. (Encoding with rounded
        codebooks makes up for most of it.)
        """
        books = cls._rounded(codebooks, forward, 2)
        if error is None or books._noise() <= _NOISE * error:
            return books
        return cls._rounded(codebooks, forward, 1)

    @classmethod
    def _rounded(cls, codebooks: Tensor, forward: Tensor, group: int) -> KeyBooks:
        stages = codebooks.shape[1]
        # Not half way between the ends: a stage centred on its mean tells the beam search nothing
        # wrong about the stages to come.
        middle = codebooks.mean(dim=2)
        centred = codebooks - middle[:, :, None]
        reach = centred.abs().amax(dim=2)  # [subs, stages, sub_dim]
        spread = reach.sum(dim=1).unflatten(-1, (-1, 2)).amax(dim=-1).repeat_interleave(2, dim=-1)
        spread = spread.clamp_min(1e-4 * float(spread.max()) + 1e-30)  # [subs, sub_dim]
        means = middle.sum(dim=1) / spread
        starts = range(0, stages, group)
        parts = [reach[:, s : s + group].sum(dim=1) / spread for s in starts]
        # Each codeword of a group rounds by at most a half.
        sizes = torch.tensor([min(group, stages - s) for s in starts])
        steps = torch.stack(parts, dim=1).amax(dim=-1) / (_BYTE - sizes / 2)  # [subs, groups]
        rounding = (steps * sizes / 2).sum(dim=-1)
        most = (means.abs() + 1.0).amax(dim=-1) + rounding
        unit = most / (_LIMIT - float((_BYTE + sizes / 2).sum()) - 1)
        gains = (steps / unit[:, None]).ceil().clamp(1, 255).repeat_interleave(group, dim=1)
        gains = gains[:, :stages]
        scale = (gains * unit[:, None])[..., None, None] * spread[:, None, None]
        return cls(
            (centred / scale).round().to(torch.int8)[None],
            gains.to(torch.uint8)[None],
            (means / unit[:, None]).round().to(torch.int16).view(1, -1),
            (spread * unit[:, None]).view(1, -1),
            (spread * unit[:, None]).view(1, -1) / forward,
            group,
        )

    def _noise(self) -> float:
        """The mean square that rounding adds to a key's vector, all numbers off by up to a half."""
        heads, subs, _ = self.gains.shape
        units = self.gains.float().square().sum(dim=2)
        return float((units * self.spread.view(heads, subs, -1).square().sum(dim=2)).sum()) / 12

    def _check(self, spec: SideSpec) -> None:
        """Raise ValueError unless attention may add these numbers and they commute with RoPE."""
        for name, factor in (("inverse", self.inverse), ("spread", self.spread)):
            if not bool((factor > 0).all()):
                raise ValueError(f"tensor {name} holds a factor that is not positive")
        turned = self.inverse[:, : spec.rotary_dim]
        if not torch.equal(turned[:, 0::2], turned[:, 1::2]):
            raise ValueError(
                "tensor inverse differs within a pair, which does not commute with RoPE"
            )
        total = self.means.int().abs() + _reach(self.words, self.gains).sum(dim=2).flatten(1)
        if bool((total > _LIMIT).any()):
            raise ValueError(f"tensors codebooks, gains and means add up past {_LIMIT:.0f}")


def _reach(words: Tensor, gains: Tensor) -> Tensor:
    """How far a stage's codewords go from 0 times its gain, [kv_heads, subs, stages, sub_dim]."""
    most = torch.maximum(words.amax(dim=3).int(), -words.amin(dim=3).int())
    return most * gains[..., None].int()


def _largest_group(words: Tensor, gains: Tensor) -> int:
    """4, 2 or 1: how many neighbouring stages always add up within a byte and have one gain."""
    reach, stages = _reach(words, torch.ones_like(gains)), gains.shape[2]
    for group in (4, 2):
        parts = [slice(start, start + group) for start in range(0, stages, group)]
        if all(
            bool((reach[:, :, part].sum(dim=2) <= _BYTE).all())
            and torch.equal(
                gains[:, :, part], gains[:, :, part][..., :1].expand_as(gains[:, :, part])
            )
            for part in parts
        ):
            return group
    return 1
