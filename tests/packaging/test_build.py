"""COMMVQ_BUILD: what is built, what is left out with a warning, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NO_COMPILER = {"CXX": "no-such-compiler"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, with one small kernel."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for package in ("commvq_core", "cli"):
        (tmp_path / package).mkdir()
        shutil.copy(REPOSITORY / package / "__init__.py", tmp_path / package)
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "small.cpp").write_text("int small() { return 1; }\n")
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def built(tree: Path) -> bool:
    return (tree / "commvq_core" / "_C.abi3.so").is_file()


def warnings(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("commvq: warning:")]


@pytest.mark.parametrize("setting", ["auto", "cpu"])
def test_a_compiler_builds_one_binary_for_every_python(tree: Path, setting: str) -> None:
    result = build(tree, COMMVQ_BUILD=setting)
    assert result.returncode == 0, result.stderr
    assert built(tree)
    assert warnings(result) == []
    assert "march=native" not in result.stdout


def test_off_builds_nothing(tree: Path) -> None:
    assert build(tree, COMMVQ_BUILD="off").returncode == 0
    assert not built(tree)


def test_auto_without_a_compiler_warns_in_one_line_and_goes_on(tree: Path) -> None:
    result = build(tree, COMMVQ_BUILD="auto", **NO_COMPILER)
    assert result.returncode == 0
    assert not built(tree)
    (line,) = warnings(result)
    assert "there is no C++ compiler (no-such-compiler not found)" in line
    assert "PyTorch operators serve" in line


def test_auto_survives_code_that_does_not_compile(tree: Path) -> None:
    (tree / "csrc" / "cpu" / "small.cpp").write_text("this is not C++\n")
    result = build(tree, COMMVQ_BUILD="auto")
    assert result.returncode == 0
    assert not built(tree)
    (line,) = warnings(result)
    assert "compiling failed" in line
    assert build(tree, COMMVQ_BUILD="cpu").returncode != 0


@pytest.mark.parametrize(
    ("setting", "environment", "says"),
    [
        ("cpu", NO_COMPILER, "there is no C++ compiler"),
        ("cpu", {"CXX": "false"}, "does not compile C++20"),
        ("cuda", {}, "cannot build commvq with COMMVQ_BUILD=cuda: "),
        ("gpu", {}, "error: COMMVQ_BUILD=gpu: use one of auto, cpu, cuda, off"),
    ],
)
def test_what_was_demanded_and_cannot_be_had_is_an_error(
    tree: Path, setting: str, environment: dict[str, str], says: str
) -> None:
    result = build(tree, COMMVQ_BUILD=setting, **environment)
    assert result.returncode != 0
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not built(tree)


def test_without_torch_the_message_says_how_to_install(tree: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden')\n")
    result = build(tree, COMMVQ_BUILD="auto", PYTHONPATH=str(hidden))
    assert result.returncode != 0
    assert "torch is not installed" in result.stderr
    assert "--no-build-isolation" in result.stderr
    assert "Traceback" not in result.stderr
    assert build(tree, COMMVQ_BUILD="off", PYTHONPATH=str(hidden)).returncode == 0
