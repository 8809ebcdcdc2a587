"""The last step of gpu_check.sh: gpu_check.json, and gpu_check.md with the same in tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commvq_core.files import write_json, write_text

BENCHES = ("decode-1", "decode-8", "encode", "memory")


def machine() -> dict[str, Any]:
    """The GPU and what drives it."""
    import torch
    import transformers

    found = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = gpu.name
        found["capability"] = f"{gpu.major}.{gpu.minor}"
        found["processors"] = gpu.multi_processor_count
        found["memory_bytes"] = gpu.total_memory
    return found


def collect(folder: Path) -> dict[str, Any]:
    """{"machine", "steps": [{"name", "status", "seconds", "says"}], and a bench's JSON by name}."""
    # Of a step that ran several times, the last counts.
    ran = (folder / "steps").read_text(encoding="utf-8").splitlines()
    steps = []
    for name, (status, seconds) in {line.split()[0]: line.split()[1:] for line in ran}.items():
        lines = (folder / f"{name}.out").read_text(encoding="utf-8").splitlines()
        says = lines[-1].strip("= ") if lines and name not in BENCHES else ""
        steps.append({"name": name, "status": int(status), "seconds": int(seconds), "says": says})
    passed = {step["name"] for step in steps if step["status"] == 0}
    benches = {
        name: json.loads((folder / f"{name}.out").read_text(encoding="utf-8"))
        for name in BENCHES
        if name in passed
    }
    return {"machine": machine(), "steps": steps, **benches}


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [names, ["---"] * len(names), *([_shown(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def page(result: dict[str, Any]) -> str:
    """gpu_check.md."""
    parts = [
        "# GPU check\n",
        ", ".join(f"{name} {value}" for name, value in result["machine"].items()) + "\n",
        table(
            ("step", "status", "seconds", "says"),
            [(s["name"], s["status"], s["seconds"], s["says"]) for s in result["steps"]],
        ),
    ]
    for name in BENCHES:
        rows = result.get(name, {}).get("rows", [])
        if rows:
            columns = [key for key, value in rows[0].items() if not isinstance(value, dict | list)]
            parts += [
                f"## {name}\n",
                table(columns, [[row.get(column) for column in columns] for row in rows]),
            ]
    return "\n".join(parts)


def main(folder: Path) -> None:
    """Write both files."""
    result = collect(folder)
    write_json(folder / "gpu_check.json", result)
    write_text(folder / "gpu_check.md", page(result))
    print(f"gpu_check: {folder / 'gpu_check.json'} and {folder / 'gpu_check.md'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
