"""Loads the compiled kernels, if there are any; a missing or broken file leaves the reference."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from commvq_core.ops.schema import CPU_OPS, NAMESPACE, OPS

DISABLE = "COMMVQ_NO_NATIVE"  # set to 1: never load compiled kernels
SIMD = "COMMVQ_SIMD"  # read by the kernels: the highest SIMD level they may use


@dataclass(frozen=True)
class NativeInfo:
    """What runs the operators in this process.

    `path` is the compiled file, `simd` the level its kernels chose on this machine ("avx512",
    "avx2" or "portable"), `backends` those with a kernel for every operator that attention over
    codes and the default preset call ("cpu", "cuda"), `missing` the operators without a kernel for
    CPUs: the file was built from older sources. When nothing was loaded, `reason` says why in one
    line and the rest is empty.
    """

    available: bool
    path: str | None = None
    simd: str | None = None
    backends: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def summary(self) -> str:
        """One line for people."""
        if not self.available:
            return f"PyTorch operators ({self.reason})"
        found = f"native operators for {', '.join(self.backends) or 'no backend'} ({self.simd})"
        return f"{found}, without {', '.join(self.missing)}" if self.missing else found


def load_native(folder: Path) -> NativeInfo:
    """Load `_C.*` from `folder`, whose kernels then take over from the reference."""
    if os.environ.get(DISABLE) == "1":
        return NativeInfo(False, reason=f"{DISABLE}=1")
    found = sorted(path for path in folder.glob("_C.*") if path.suffix in (".so", ".dylib", ".pyd"))
    if not found:
        return NativeInfo(False, reason="no compiled extension; install a C++ compiler and rebuild")
    path = str(found[0])
    try:
        torch.ops.load_library(path)
        level = ctypes.CDLL(path).commvq_simd_level
        level.restype = ctypes.c_char_p
        simd = level().decode()
    except (OSError, RuntimeError, AttributeError) as error:
        # Made for another torch or machine, or cut short: slower is better than not at all.
        cause = " ".join(str(error).split())
        return NativeInfo(False, reason=f"{path} does not load ({cause})")
    missing = tuple(name for name in OPS if not _has_kernel(name, "CPU"))
    return NativeInfo(True, path=path, simd=simd, backends=_backends(), missing=missing)


def _backends() -> tuple[str, ...]:
    return tuple(
        key.lower()
        for key in ("CPU", "CUDA")
        if all(_has_kernel(name, key) for name in OPS if name not in CPU_OPS)
    )


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
