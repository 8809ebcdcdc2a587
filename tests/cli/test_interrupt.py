"""Ctrl-C and a full disk: the status, one line, and everything that was done is kept."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from commvq_core.files import read_json
from tests.cli.helpers import only_line, start, succeed_json, tree, wait_for


def press_ctrl_c(process: subprocess.Popen[str]) -> str:
    """Interrupt the whole process group, as a terminal does; returns stderr."""
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    return stderr


def test_calibrate_stops_and_resumes(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "calib"
    command = ("calibrate", tiny_model_dir, "--tokens", 100_000, "--seq-len", 512, "--out", out)
    process = start(*command, "--quiet")
    wait_for(lambda: (out / "layer_000" / "chunk_00000.safetensors").exists(), process)
    assert "--resume" in only_line(press_ctrl_c(process))
    kept = tree(out)
    assert not read_json(out / "manifest.json", "a calibration")["complete"]
    assert succeed_json(*command, "--resume", "--quiet")["tokens"] == 100_000
    chunk = "layer_000/chunk_00000.safetensors"
    assert tree(out)[chunk] == kept[chunk]


@pytest.mark.parametrize("workers", [1, 2])
def test_train_codebook_stops_and_resumes(
    workers: int, tiny_calibration: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ("train-codebook", tiny_calibration, "--bits", "1", "--out", out)
    process = start(*command, "--workers", workers, "--quiet")
    wait_for(lambda: any(out.rglob("*.safetensors")), process)
    assert "--resume" in only_line(press_ctrl_c(process))
    kept = {name: content for name, content in tree(out).items() if name.endswith(".safetensors")}
    assert kept
    summary = succeed_json(*command, "--workers", 1, "--resume", "--quiet")
    assert summary["units"] == 8
    assert kept.items() <= tree(out).items()


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    """A result of `commvq eval` but for how long things took."""
    results = [
        {
            **{name: value for name, value in entry.items() if name != "seconds"},
            "examples": [
                {name: value for name, value in record.items() if name != "seconds"}
                for record in entry["examples"]
            ],
        }
        for entry in result["results"]
    ]
    return {**result, "results": results}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_eval_stops_and_resumes_to_the_same_result(
    how: signal.Signals,
    tiny_model_dir: Path,
    tiny_artifact: Path,
    tiny_text_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "result.json"
    command = ("eval", tiny_model_dir, "--codebook", tiny_artifact, "--dataset", tiny_text_file)
    command += ("--task", "niah", "--lengths", "400", "--limit", "4")
    process = start(*command, "--out", out, "--quiet")
    partial = tmp_path / ".result.json.partial.jsonl"
    wait_for(lambda: partial.exists() and partial.read_bytes().count(b"\n") > 2, process)
    if how == signal.SIGINT:
        assert "--resume" in only_line(press_ctrl_c(process))
    else:
        os.killpg(process.pid, how)
        process.communicate(timeout=60)
    lines = [json.loads(line) for line in partial.read_text().splitlines()[1:]]
    assert not out.exists()
    result = succeed_json(*command, "--out", out, "--resume", "--quiet")
    for index, entry in enumerate(result["results"]):
        kept = [record for line in lines if line["codec"] == index for record in line["records"]]
        assert kept
        assert entry["examples"][: len(kept)] == kept
    assert [len(entry["examples"]) for entry in result["results"]] == [20, 20]
    assert list(tmp_path.iterdir()) == [out]
    whole = succeed_json(*command, "--out", tmp_path / "other.json", "--quiet")
    assert without_times(whole) == without_times(result)


def small_files_only() -> None:
    # A file that may not grow behaves as on a full disk: the write fails half way.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


@pytest.mark.parametrize("command", ["calibrate", "train-codebook", "export", "eval"])
def test_a_full_disk_leaves_the_old_files_whole(
    command: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    tiny_text_file: Path,
    tiny_calibration: Path,
    tiny_run: Path,
    tiny_artifact: Path,
) -> None:
    out = tmp_path / "out"
    text = ("--dataset", tiny_text_file)
    arguments: dict[str, tuple[object, ...]] = {
        "calibrate": (tiny_model_dir, *text, "--tokens", 512, "--seq-len", 256),
        "train-codebook": (tiny_calibration, "--bits", "0.5", "--workers", 1),
        "export": (tiny_run, "--overwrite"),
        "eval": (tiny_model_dir, *text, "--task", "niah", "--lengths", 300, "--overwrite"),
    }
    if command == "export":
        shutil.copytree(tiny_artifact, out)
    if command == "eval":
        out.write_text("old")
    before = tree(out) if out.is_dir() else out.read_text() if out.exists() else None
    process = start(
        command, *arguments[command], "--out", out, "--quiet", preexec_fn=small_files_only
    )
    stdout, stderr = process.communicate()
    assert process.returncode == 2, stderr
    assert stdout == ""
    assert "cannot write" in only_line(stderr)
    if before is not None:
        assert (tree(out) if out.is_dir() else out.read_text()) == before
    assert not list(tmp_path.rglob("*.tmp"))
