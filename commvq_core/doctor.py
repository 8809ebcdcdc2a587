"""What this machine offers, and what is missing: the facts behind `commvq doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from commvq_core import __version__

_PACKAGES = ("torch", "transformers", "safetensors", "datasets", "huggingface_hub", "numpy")
_FOR_GGUF = ("gguf", "accelerate")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `mend` says what to do where it is not ok."""

    name: str
    ok: bool
    found: str
    mend: str = ""


def diagnose() -> dict[str, Any]:
    """Look at Python, packages, native kernels, processor, GPU, memory and disk.

    Returns `ok` (everything that commvq can't do without is there), `versions`, and `checks`, each
    a Check as JSON. Never raises for what is missing: that is the answer.
    """
    versions = {name: _version(name) for name in (*_PACKAGES, *_FOR_GGUF)}
    needed = [_python(), *(_package(name, versions[name]) for name in _PACKAGES)]
    optional = [_gguf(versions)]
    if all(check.ok for check in needed):
        optional += [_native(), _processor(), _gpu()]
    optional += [_memory(), _disk()]
    return {
        "ok": all(check.ok for check in needed),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"commvq": __version__, **versions},
        "checks": [asdict(check) for check in (*needed, *optional)],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    return Check("python", sys.version_info >= (3, 10), found, "install Python 3.10 or newer")


def _package(name: str, version: str | None) -> Check:
    try:
        __import__(name)
    except Exception as error:  # a broken package can raise anything while it is imported
        reason = " ".join(str(error).split())
        return Check(name, False, f"{version}, does not import ({reason})", f"pip install {name}")
    return Check(name, True, str(version))


def _gguf(versions: dict[str, str | None]) -> Check:
    missing = [name for name in _FOR_GGUF if versions[name] is None]
    found = f"{', '.join(missing)} missing" if missing else "can be read"
    return Check(".gguf models", not missing, found, "pip install 'commvq[gguf]'")


def _native() -> Check:
    from commvq_core.ops import native_info

    info = native_info()
    mend = "encoding is slower without; install a C++ compiler and install commvq again"
    if info.missing:
        mend = "they were built from older sources; install commvq again"
    return Check("native kernels", info.available and not info.missing, info.summary, mend)


def _processor() -> Check:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return Check("processor", True, f"{os.cpu_count()} cores, {capability}, {platform.machine()}")


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", True, "none; everything runs on the CPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("gpu", True, ", ".join(names))


def _memory() -> Check:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return Check("memory", True, "unknown")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Check(
        "memory", total >= 4e9, f"{total / 1e9:.1f} GB", "even small models need some 4 GB"
    )


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    return Check(
        "disk here", free >= 2e9, f"{free / 1e9:.1f} GB free", "calibrations need some gigabytes"
    )
