"""A layer that keeps what its codes decode to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from commvq_core.cache.layer import CommVQLayer
from commvq_core.cache.store import CodeStore


class KeptLayer(CommVQLayer):
    """Decodes every code once, and holds the float32 numbers beside it.

    For evaluations of codecs without an operator for attention: else each new token would decode
    the whole context again, only to give the same numbers. It takes more memory than the codes
    save, which `nbytes` leaves out: it tells what a cache of these codes needs.
    """

    def _empty(self) -> None:
        super()._empty()
        self._kept_keys, self._kept_values = CodeStore(), CodeStore()

    def decode_keys(self, start: int, stop: int) -> Tensor:
        return _extended(self._kept_keys, super().decode_keys, stop).slice(start, stop)

    def decode_values(self, start: int, stop: int) -> Tensor:
        return _extended(self._kept_values, super().decode_values, stop).slice(start, stop)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        for store in (self._kept_keys, self._kept_values):
            store.crop(self.code_length)

    def _each_batch_tensor(self, change: Any) -> None:
        super()._each_batch_tensor(change)
        for store in (self._kept_keys, self._kept_values):
            store.apply(change)


def _extended(store: CodeStore, decode: Callable[[int, int], Tensor], stop: int) -> CodeStore:
    """`store`, holding what all codes before `stop` decode to."""
    if store.length < stop:
        store.append(decode(store.length, stop))
    return store
