"""make cu-check reads what ptxas says of every kernel, and refuses one that spills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOG = """
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '{symbol}' for 'sm_80'
ptxas info    : Function properties for {symbol}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 127 registers, used 1 barriers, 64 bytes smem, 512 bytes cmem[0]
ptxas info    : Compiling entry function '{symbol}' for 'sm_90'
ptxas info    : Function properties for {symbol}
    {stack} bytes stack frame, {stores} bytes spill stores, 4 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
"""
SYMBOL = (
    "_ZN6commvq3gpu57_GLOBAL__N__2a699e6f_18_additive_attend_cu_511de163_2704622"
    "additive_attend_scoresILi4ELi2EEEvNS0_15AttendArgumentsE"
)


def table(tmp_path: Path, log: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "log"
    path.write_text(log)
    return subprocess.run(
        [sys.executable, str(ROOT / "csrc" / "kernel_table.py"), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_spill_fails_and_is_named(tmp_path: Path) -> None:
    result = table(tmp_path, LOG.format(symbol=SYMBOL, stack=8, stores=8))
    assert result.returncode == 1
    assert "additive_attend_scores<4, 2> on sm_90 spills" in result.stderr
    assert "sm_80" not in result.stderr
    row = next(line for line in result.stdout.splitlines() if line.startswith("additive"))
    assert row.split()[-2:] == ["127/64/0", "128/0/12"]


def unspilled(stack: int) -> str:
    log = LOG.format(symbol=SYMBOL, stack=stack, stores=0)
    return log.replace("4 bytes spill loads", "0 bytes spill loads")


def test_kernels_that_keep_to_registers_pass(tmp_path: Path) -> None:
    assert table(tmp_path, unspilled(0)).returncode == 0


def test_arrays_that_do_not_fit_registers_fail(tmp_path: Path) -> None:
    result = table(tmp_path, unspilled(528))
    assert result.returncode == 1
    assert "additive_attend_scores<4, 2> on sm_90 keeps 528 bytes" in result.stderr


def test_a_log_without_kernels_fails(tmp_path: Path) -> None:
    result = table(tmp_path, "ptxas info    : 28 bytes gmem\n")
    assert result.returncode == 1
    assert "no kernel" in result.stderr
