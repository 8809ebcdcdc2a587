"""Memory of a context that grows with it: codes, mostly."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_GROWTH = 64  # slots are allocated in steps of this many tokens


class CodeStore:
    """A growing tensor [batch, rows, tokens, n] of any dtype, append-only but for `crop`."""

    def __init__(self) -> None:
        self._data: Tensor | None = None
        self.length = 0

    def append(self, codes: Tensor) -> None:
        """Add `codes` [batch, rows, count, n] behind what is there."""
        need = self.length + codes.shape[2]
        if self._data is None or need > self._data.shape[2]:
            # No larger than it must be: moving it every 64 tokens is little beside reading it.
            capacity = -(-need // _GROWTH) * _GROWTH
            data = codes.new_zeros(*codes.shape[:2], capacity, codes.shape[3])
            if self._data is not None:
                data[:, :, : self.length] = self._data[:, :, : self.length]
            self._data = data
        self._data[:, :, self.length : need] = codes
        self.length = need

    @property
    def data(self) -> Tensor:
        """All that is allocated: `length` tokens, and room behind them."""
        assert self._data is not None
        return self._data

    def slice(self, start: int, stop: int) -> Tensor:
        """Codes of the tokens start..stop, a view."""
        assert self._data is not None
        assert stop <= self.length
        return self._data[:, :, start:stop]

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.length = min(self.length, length)

    def apply(self, change: Any) -> None:
        """Replace the data by `change(data)`: batch selection, or a move to another device."""
        if self._data is not None:
            self._data = change(self._data)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._data is None else self._data.nbytes
