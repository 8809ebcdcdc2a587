"""The position of every cached token, and the rotary tables of any stretch of them.

Positions are kept once a cache, not once a layer (4 bytes a token), since padding makes them differ
between the rows of a batch. Tables are made when asked for and kept for the length of one forward
pass, in which all layers that rotate alike ask for the same ones. How tokens turn for attention
over codes is kept for as long as the codes are the same, so that a decoding step computes and
checks nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from commvq_core.errors import InputError
from commvq_core.ops import ATTEND_BLOCK
from commvq_core.rope import Rotary


@dataclass(frozen=True)
class _Turns:
    """How tokens 0 to `stop` - 1 turn, for the layers that rotate by `rotary`."""

    rotary: Rotary
    stop: int
    tables: tuple[Tensor, Tensor]


class Positions:
    """int32 [rows, tokens], rows = 1 while all rows of the batch agree, else the batch.

    Single tokens that come with a position for every row are not asked whether they agree.

    `limit` is the first position that the model would rotate by other frequencies (longrope), if
    there is one.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._ids: Tensor | None = None
        self._tables: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._turns: list[_Turns] = []
        self._answers: list[tuple[Tensor, int, bool]] = []

    def __len__(self) -> int:
        return 0 if self._ids is None else self._ids.shape[1]

    @property
    def ids(self) -> Tensor | None:
        """The positions themselves, or None before the first forward pass."""
        return self._ids

    def restore(self, ids: Tensor | None) -> None:
        """Take over what `ids` was elsewhere."""
        self._ids = ids
        self._turns.clear()

    def begin_forward(self, length: int, ids: Tensor) -> None:
        """Append the positions `ids` [rows, n] behind the first `length` tokens.

        Raises InputError for a position past the limit: keys in the cache were rotated otherwise.
        """
        if self._limit is not None and int(ids.max()) >= self._limit:
            raise InputError(
                f"this model's longrope changes its frequencies past {self._limit:,} tokens",
                "keep compressed contexts shorter than that",
            )
        self.end_forward()
        ids = ids.to(torch.int32)
        if ids.shape[0] > 1 and ids.shape[1] > 1 and bool((ids == ids[:1]).all()):
            ids = ids[:1]
        if length < len(self):
            self._turns.clear()
        if self._ids is None or length == 0:
            self._ids = ids
            return
        old = self._ids[:, :length].to(ids.device)
        rows = max(old.shape[0], ids.shape[0])
        self._ids = torch.cat((old.expand(rows, -1), ids.expand(rows, -1)), dim=1)

    def tables(
        self, rotary: Rotary, start: int, stop: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """cos, sin [rows, 1, stop - start, rotary_dim/2] float32 of the tokens start..stop."""
        key = (id(rotary), start, stop)
        if key not in self._tables:
            assert self._ids is not None
            cos, sin = rotary.cos_sin(self._ids[:, start:stop], dtype)
            self._tables[key] = (cos[:, None], sin[:, None])
        return self._tables[key]

    def turns(
        self, rotary: Rotary, stop: int, first_valid: Tensor, *, settled: bool
    ) -> tuple[Tensor, Tensor] | None:
        """How tokens 0 to stop - 1 turn, block by block, as ops.additive_attend takes it.

        None unless each row's positions rise by one from its first real token [batch] on. When
        `settled`, so that `first_valid` will not change, it is computed once for all layers that
        rotate alike, until `stop` or the batch changes.
        """
        for known in self._turns:
            if known.rotary is rotary and known.stop == stop:
                return known.tables
        tables = self._compute_turns(rotary, stop, first_valid)
        if settled and tables is not None:
            self._turns = [known for known in self._turns if known.rotary is not rotary]
            self._turns.append(_Turns(rotary, stop, tables))
        return tables

    def once(self, mask: Tensor, stop: int, ask: Callable[[], bool]) -> bool:
        """What `ask` says of a mask and `stop`, asked once a forward pass."""
        for known, length, answer in self._answers:
            if known is mask and length == stop:
                return answer
        answer = ask()
        self._answers.append((mask, stop, answer))
        return answer

    def _compute_turns(
        self, rotary: Rotary, stop: int, first_valid: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        assert self._ids is not None
        slots = torch.arange(stop, device=self._ids.device)
        offsets = self._ids[:, :stop].long() - slots
        shift = offsets[:, -1:]
        if not bool(((offsets == shift) | (slots < first_valid[:, None])).all()):
            return None
        frequencies = rotary.inv_freq.to(shift.device).double()
        starts = torch.arange(0, stop, ATTEND_BLOCK, device=shift.device) + shift
        steps = torch.arange(ATTEND_BLOCK, device=shift.device)
        return _turned(starts, frequencies), _turned(steps, frequencies)

    def end_forward(self) -> None:
        """Drop what belongs to one pass."""
        self._tables.clear()
        self._answers.clear()

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self._turns.clear()
        if self._ids is not None:
            self._ids = self._ids[:, :length]

    def select(self, indices: Tensor) -> None:
        """Keep the given rows of the batch."""
        self._turns.clear()
        if self._ids is not None and self._ids.shape[0] > 1:
            self._ids = self._ids[indices.to(self._ids.device)]

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._turns.clear()
        if self._ids is not None and self._ids.shape[0] > 1:
            self._ids = self._ids.repeat_interleave(repeats, dim=0)

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        held = [] if self._ids is None else [self._ids]
        held += [table for known in self._turns for table in known.tables]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def padded_positions(mask: Tensor) -> Tensor:
    """Positions int64 [batch, tokens] of rows padded on the left, where `mask` (of that shape) is 0
    or False; padding has position 0."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def _turned(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines and sines, float32 [..., 2, rotary_dim / 2], at `positions` [...]."""
    angles = positions[..., None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-2).float()
