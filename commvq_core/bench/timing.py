"""Timing calls side by side, so that whatever else the machine does hits them all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

Call = Callable[[], object]

_LEAD = 1 << 30  # bytes


class Stopwatch:
    """Times one call, on a GPU by its own clock.

    There the call's work is queued behind the clearing of a large buffer, so that Python, which
    runs ahead meanwhile, is not what is timed as long as it is quicker than that.
    """

    def __init__(self, device: torch.device) -> None:
        self._lead: torch.Tensor | None = None
        if device.type == "cuda":
            self._device = device
            self._lead = torch.empty(_LEAD, dtype=torch.uint8, device=device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def seconds(self, call: Call) -> float:
        """How long `call` takes."""
        if self._lead is None:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        begin, end = self._events
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            self._lead.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1e3


def interleaved(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    seconds: float,
    least: int = 5,
    most: int = 200,
) -> dict[str, list[float]]:
    """Seconds of every repetition by name, after two that do not count.

    Each round calls every name once, in order; calls of one name, which differ by the inputs that
    they read, take turns. Rounds go on for about `seconds`, between `least` and `most` of them.
    """
    watch = Stopwatch(device)
    for turn in range(2):
        for own in calls.values():
            own[turn % len(own)]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - began > seconds:
            break
        for name, own in calls.items():
            times[name].append(watch.seconds(own[turn % len(own)]))
    return times


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Let torch use `count` threads (None: as many as it does); gives how many that is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
