"""How much memory this process holds, and the most it has held since asked to forget."""

from __future__ import annotations

import gc
import re
import resource
import sys
from pathlib import Path

import torch

from commvq_core.malloc import trim

_STATUS = Path("/proc/self/status")


def peak_bytes(*, forget: bool = False) -> int:
    """The most memory this process has held; with `forget`, the count begins anew here (Linux)."""
    if _STATUS.exists():
        if forget:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        found = _field("VmHWM")
        if found is not None:
            return found
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def held_bytes() -> int:
    """What this process holds now, after giving back what it can."""
    gc.collect()
    trim()
    found = _field("VmRSS") if _STATUS.exists() else None
    return peak_bytes() if found is None else found


def device_peak(device: torch.device, *, forget: bool = False) -> int:
    """The most memory held on `device`: the process's own on a CPU, torch's on a GPU."""
    if device.type != "cuda":
        return peak_bytes(forget=forget)
    if forget:
        torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.max_memory_allocated(device))


def device_held(device: torch.device) -> int:
    """What is held on `device` now."""
    if device.type != "cuda":
        return held_bytes()
    gc.collect()
    return int(torch.cuda.memory_allocated(device))


def _field(name: str) -> int | None:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    return None if found is None else int(found[1]) * 1024
