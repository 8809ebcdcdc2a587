"""CommVQ: long contexts with a 1- or 2-bit key-value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from commvq_core.cache.cache import CommVQCache as CommVQCache

__all__ = ["CommVQCache", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can read the version without importing torch.
    if name == "CommVQCache":
        from commvq_core.cache.cache import CommVQCache

        return CommVQCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
