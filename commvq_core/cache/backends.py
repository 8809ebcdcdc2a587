"""Libraries that transformers' own quantized caches need, and whether they are there."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from commvq_core.errors import InputError


@dataclass(frozen=True)
class Backend:
    """A library that transformers quantizes with, and the widths that it offers."""

    package: str
    widths: tuple[int, ...]

    @property
    def installed(self) -> bool:
        """Whether the package is there; does not import it."""
        try:
            importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return False
        return True


BACKENDS = {
    "quanto": Backend("optimum-quanto", (2, 4)),
    "hqq": Backend("hqq", (1, 2, 3, 4, 8)),
}


def check_backend(name: str) -> None:
    """Raise InputError when the library of a backend is not installed."""
    backend = BACKENDS[name]
    if not backend.installed:
        raise InputError(
            f"transformers' {name} cache needs {backend.package}", f"pip install {backend.package}"
        )
