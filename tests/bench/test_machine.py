"""What the benchmarks know of a machine, and how they time calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from commvq_core.bench.machine import ReadBuffer, free_memory, last_level_cache, matmul_rate
from commvq_core.bench.timing import interleaved, threads

CPU = torch.device("cpu")


def describe(cpus: Path, cpu: int, index: int, level: int, size: str, shared: str) -> None:
    """One cache of one CPU, as Linux shows it."""
    folder = cpus / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(f"{text}\n")


def test_the_last_level_counts_every_part_once(tmp_path: Path) -> None:
    for cpu in range(4):
        describe(tmp_path, cpu, 0, 1, "32K", str(cpu))
        describe(tmp_path, cpu, 2, 2, "1024K", str(cpu))
        describe(tmp_path, cpu, 3, 3, "16M", "0-1" if cpu < 2 else "2-3")
    assert last_level_cache(CPU, tmp_path) == 2 * 16 * 1024**2


def test_a_machine_that_does_not_say_gets_a_usual_cache(tmp_path: Path) -> None:
    assert last_level_cache(CPU, tmp_path) == 64 << 20
    describe(tmp_path, 0, 0, 1, "unknown", "0")
    assert last_level_cache(CPU, tmp_path) == 64 << 20
    assert last_level_cache(CPU) > 0


def test_free_memory_is_below_what_there_is() -> None:
    free = free_memory(CPU)
    if Path("/proc/meminfo").exists():
        assert free is not None
        total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
        assert 0 < free <= total


def test_reading_reads_everything() -> None:
    buffer = ReadBuffer(1000, CPU)
    assert buffer.nbytes == 1000
    assert int(buffer.read()) == 125


def test_the_matmul_rate_counts_two_operations_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from commvq_core.bench import machine

    monkeypatch.setattr(machine.Stopwatch, "seconds", lambda self, call: 0.5)
    assert matmul_rate(3, 5, 7, torch.float32, CPU) == 2 * 3 * 5 * 7 / 0.5


def test_rounds_call_every_name_once_and_inputs_take_turns() -> None:
    seen: list[str] = []
    calls = {
        "a": [lambda: seen.append("a0"), lambda: seen.append("a1"), lambda: seen.append("a2")],
        "b": [lambda: seen.append("b0")],
    }
    times = interleaved(calls, CPU, seconds=0.0, least=4)
    assert {name: len(own) for name, own in times.items()} == {"a": 4, "b": 4}
    assert seen[:4] == ["a0", "b0", "a1", "b0"]  # these do not count
    assert seen[4:] == ["a0", "b0", "a1", "b0", "a2", "b0", "a0", "b0"]
    assert min(times["a"]) >= 0
    assert len(interleaved(calls, CPU, seconds=60.0, most=7)["b"]) == 7


def test_threads_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    with threads(3) as count:
        assert count == torch.get_num_threads() == 3
    with threads(None) as count:
        assert count == before
    assert torch.get_num_threads() == before
