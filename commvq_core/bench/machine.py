"""What a machine can do at best: its read bandwidth, its matmul rate, and what it has to do so."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import torch

from commvq_core.bench.timing import Stopwatch

_CPUS = Path("/sys/devices/system/cpu")
_MEMORY = Path("/proc/meminfo")
_USUAL_CACHE = 64 << 20  # bytes, where the machine does not say
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache(device: torch.device, cpus: Path = _CPUS) -> int:
    """Bytes of the last cache before memory, all of its parts together."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found: dict[int, dict[str, int]] = {}  # level -> the CPUs that share a part -> its bytes
    for folder in cpus.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((folder / "level").read_text(encoding="ascii"))
            shared = (folder / "shared_cpu_list").read_text(encoding="ascii").strip()
            size = re.fullmatch(r"(\d+)([KMG]?)\s*", (folder / "size").read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if size is not None:
            found.setdefault(level, {})[shared] = int(size[1]) * _UNITS[size[2]]
    return sum(found[max(found)].values()) if found else _USUAL_CACHE


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on `device`; None where the machine does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not _MEMORY.exists():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMORY.read_text(encoding="ascii"))
    return None if found is None else int(found[1]) * 1024


class ReadBuffer:
    """A buffer much larger than any cache, and one reading of all of it: a sum, on all threads."""

    def __init__(self, size: int, device: torch.device) -> None:
        # Ones, since memory that was never written is one page of zeros that stays in the cache.
        self._data = torch.ones(max(1, size // 8), dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes that `read` reads."""
        return self._data.numel() * 8

    def read(self) -> torch.Tensor:
        """Read it all."""
        return self._data.sum()


def matmul_rate(
    rows: int, columns: int, inner: int, dtype: torch.dtype, device: torch.device, repeats: int = 5
) -> float:
    """Floating-point operations a second of [rows, inner] @ [columns, inner]^T, a linear layer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inner, generator=generator).to(device, dtype)
    weight = torch.randn(columns, inner, generator=generator).to(device, dtype)
    watch = Stopwatch(device)
    torch.nn.functional.linear(x, weight)
    times = [
        watch.seconds(lambda: torch.nn.functional.linear(x, weight)) for _ in range(max(1, repeats))
    ]
    return 2.0 * rows * columns * inner / statistics.median(times)
