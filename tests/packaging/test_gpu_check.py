"""recipes/gpu_check.sh without a GPU, and the report that it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_says_so_in_one_line_and_ends_well(tmp_path: Path) -> None:
    result = run(
        str(ROOT / "recipes" / "gpu_check.sh"),
        PYTHON=sys.executable,
        CUDA_VISIBLE_DEVICES="",
        COMMVQ_GPU_CHECK_OUT=str(tmp_path / "out"),
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert line.startswith("gpu_check skipped: there is no CUDA GPU here")
    assert not (tmp_path / "out").exists()


def test_without_torch_it_says_what_to_do() -> None:
    result = run(str(ROOT / "recipes" / "gpu_check.sh"), PYTHON="false")
    assert result.returncode == 2
    assert "has no torch" in result.stderr


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """What the steps of a run leave, one of which failed."""
    rows = [{"impl": "commvq-1bit", "context": 8192, "ms_median": 0.03125, "bytes_read": 9}]
    (tmp_path / "steps").write_text("build 1 3\nbuild 0 40\ntests 0 7\ndecode-1 0 9\nmemory 1 2\n")
    (tmp_path / "build.out").write_text("")
    (tmp_path / "tests.out").write_text(".....\n162 passed in 7.0s\n")
    (tmp_path / "decode-1.out").write_text(json.dumps({"rows": rows, "device": "cuda"}))
    (tmp_path / "memory.out").write_text("")
    return tmp_path


def test_the_report_keeps_every_figure_and_every_failure(finished: Path) -> None:
    result = run(sys.executable, str(ROOT / "recipes" / "gpu_report.py"), str(finished))
    assert result.returncode == 0, result.stderr
    report = json.loads((finished / "gpu_check.json").read_text())
    assert [step["status"] for step in report["steps"]] == [0, 0, 0, 1]
    assert report["steps"][1]["says"] == "162 passed in 7.0s"
    assert report["decode-1"]["rows"][0]["ms_median"] == 0.03125
    assert "memory" not in report
    assert "torch" in report["machine"]
    page = (finished / "gpu_check.md").read_text()
    assert "| commvq-1bit | 8192 | 0.03125 | 9 |" in page
    assert "| memory | 1 | 2 |  |" in page
