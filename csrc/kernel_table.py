"""Reads what `nvcc -Xptxas -v` printed; prints a table of kernels, and fails if one spills.

An array that is indexed by what is not known when compiling lies in the same memory as what spills.

Usage: python csrc/kernel_table.py LOG
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def kernel_name(symbol: str) -> str:
    """`additive_attend_scores<4, 1>` of its mangled name."""
    names = re.findall(r"\d+([a-z]+(?:_[a-z]+)+?)(?=I[Li]|E)", symbol)
    numbers = re.findall(r"L[ib](\d+)E", symbol.partition("Ev")[0])
    name = names[-1] if names else symbol
    return f"{name}<{', '.join(numbers)}>" if numbers else name


def kernels(log: str) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel -> architecture -> registers, shared (static bytes), stack and spilled bytes."""
    found: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    now: dict[str, int] = {}
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            now = {"registers": 0, "shared": 0, "stack": 0, "spilled": 0}
            found[kernel_name(entry[1])][entry[2]] = now
        elif spills := SPILLS.search(line):
            now["stack"], now["spilled"] = int(spills[1]), int(spills[2]) + int(spills[3])
        elif used := USED.search(line):
            now["registers"] = int(used[1])
            shared = SHARED.search(line)
            now["shared"] = int(shared[1]) if shared else 0
    return dict(found)


def main(path: str) -> int:
    """Print the table; 1 when a kernel spills or none was found."""
    found = kernels(Path(path).read_text(encoding="utf-8"))
    architectures = sorted({name for rows in found.values() for name in rows})
    width = max((len(name) for name in found), default=0)
    print("registers / static shared bytes / spilled bytes a thread")
    print(" " * width, *(f"{name:>12}" for name in architectures))
    bad = []
    for name, rows in sorted(found.items()):
        cells = [
            f"{row['registers']}/{row['shared']}/{row['spilled']}" if (row := rows.get(a)) else "-"
            for a in architectures
        ]
        print(f"{name:<{width}}", *(f"{cell:>12}" for cell in cells))
        for a, row in sorted(rows.items()):
            if row["spilled"]:
                bad.append(f"{name} on {a} spills registers to memory")
            elif row["stack"]:
                bad.append(f"{name} on {a} keeps {row['stack']} bytes of a thread in memory")
    for kernel in bad:
        print(f"cu-check: {kernel}", file=sys.stderr)
    if not found:
        print("cu-check: ptxas named no kernel", file=sys.stderr)
    return int(bool(bad) or not found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
