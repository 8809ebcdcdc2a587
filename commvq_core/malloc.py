"""Give freed memory back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import sys


def trim() -> None:
    """Return what was freed but is still held, where the C library can (glibc).

    Tensors of many sizes come and go in a long prompt; what the allocator keeps of them between its
    pieces would count as this process's memory, and be twice what is in use.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
