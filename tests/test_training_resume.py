"""A trainer that was killed goes on to the same bytes, and only where it belongs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from commvq_core.artifact import export_run
from commvq_core.errors import InputError
from commvq_core.progress import Silent
from commvq_core.run import Run, Unit
from commvq_core.training import train_codebooks
from tests import runs
from tests.calibration import stores


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.calibration(tmp_path_factory.mktemp("calib") / "calib")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, calib: Path) -> Path:
    return runs.train(calib, tmp_path_factory.mktemp("run") / "run")


TRAIN = """
import sys
from pathlib import Path
from commvq_core.training import TrainConfig, train_codebooks
config = TrainConfig(key_bits=1.0, value_bits=1.0, workers=int(sys.argv[3]))
train_codebooks(Path(sys.argv[1]), Path(sys.argv[2]), config)
"""


def start_training(calib: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(calib), str(out), str(workers)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def state_and_parent(process: int) -> tuple[str, int]:
    """A process's state letter and its parent, from /proc; ("Z", 0), a dead one, if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "Z", 0
    return fields[0], int(fields[1])


def children(process: int) -> list[int]:
    """The processes that a process started and that still run."""
    found = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
    return [pid for pid in found if state_and_parent(pid)[1] == process]


def kill_training(calib: Path, out: Path, workers: int, *, files: int, delay: float) -> int:
    """Start training, wait until `out` holds `files` files and `delay` seconds more, and kill it
    as nothing can prevent. Returns how many units were done."""
    process = start_training(calib, out, workers)
    deadline = time.monotonic() + 60
    while not out.is_dir() or len(os.listdir(out)) < files:
        assert process.poll() is None, "see stderr"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay)
    left = children(process.pid)
    process.kill()
    process.wait()
    assert bool(left) == (workers > 1)
    deadline = time.monotonic() + 20
    while alive := [pid for pid in left if state_and_parent(pid)[0] != "Z"]:
        if time.monotonic() > deadline:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            pytest.fail("workers outlived the trainer")
        time.sleep(0.02)
    return len(list(out.glob("*.safetensors")))


@pytest.mark.parametrize(
    ("files", "delay", "workers"), [(1, 0.0, 1), (2, 0.005, 1), (6, 0.015, 1), (4, 0.01, 2)]
)
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(
    tmp_path: Path, calib: Path, straight: Path, files: int, delay: float, workers: int
) -> None:
    for attempt in range(5):  # a busy machine may let us sleep until the run is over
        out = tmp_path / f"run{attempt}"
        if kill_training(calib, out, workers, files=files, delay=delay) < len(runs.UNITS):
            break
    else:
        pytest.fail("the run was always over before it was killed")
    train_codebooks(calib, out, runs.config(), resume=True)
    assert runs.codebooks(out) == runs.codebooks(straight)
    export_run(out, tmp_path / "artifact")
    export_run(straight, tmp_path / "other")
    assert stores.contents(tmp_path / "artifact") == stores.contents(tmp_path / "other")


class Counted(Silent):
    """Progress that remembers what it was told of the work done before."""

    total = done = 0.0

    def task(self, description: str, total: float, unit: str = "it", done: float = 0.0) -> Any:
        self.total, self.done = total, done
        return super().task(description, total)


@pytest.mark.parametrize("units", [0, 1, 4, 7, 8])
def test_a_run_stopped_after_any_unit_goes_on_with_the_next(
    tmp_path: Path, calib: Path, straight: Path, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written, write = tmp_path / "run", [], Run.write_unit

    def stop(run: Run, unit: Unit, tensors: Mapping[str, Tensor], stats: Any) -> None:
        if len(written) == units:
            raise KeyboardInterrupt
        written.append(unit)
        write(run, unit, tensors, stats)

    monkeypatch.setattr(Run, "write_unit", stop)
    if units < 8:
        with pytest.raises(KeyboardInterrupt):
            train_codebooks(calib, out, runs.config())
    else:
        train_codebooks(calib, out, runs.config())
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(kept) == units
    monkeypatch.setattr(Run, "write_unit", write)
    progress = Counted()
    train_codebooks(calib, out, runs.config(), resume=True, progress=progress)
    assert (progress.total, progress.done) == (8, units)
    assert runs.codebooks(out) == runs.codebooks(straight)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


def test_what_a_kill_left_half_written_is_tidied_up(
    tmp_path: Path, calib: Path, straight: Path
) -> None:
    out = tmp_path / "run"
    train_codebooks(calib, out, runs.config(layers=(0,)))
    (out / f".{runs.UNITS[5]}.x1.tmp").write_bytes(b"torn")
    (out / ".run.json.x2.tmp").write_bytes(b"{")
    (out / ".tmpcL1FbC").write_bytes(b"")  # by safetensors' own save_file
    train_codebooks(calib, out, runs.config(), resume=True)
    assert runs.codebooks(out) == runs.codebooks(straight)


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_killed_in_its_first_write_can_begin_again(
    tmp_path: Path, calib: Path, straight: Path, resume: bool
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".run.json.x2.tmp").write_bytes(b"{")
    train_codebooks(calib, out, runs.config(), resume=resume)
    assert runs.codebooks(out) == runs.codebooks(straight)


def test_resuming_what_was_never_begun_begins_it(
    tmp_path: Path, calib: Path, straight: Path
) -> None:
    train_codebooks(calib, tmp_path / "run", runs.config(), resume=True)
    assert runs.codebooks(tmp_path / "run") == runs.codebooks(straight)


def test_a_folder_that_is_no_run_is_not_resumed(tmp_path: Path, calib: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no run to resume: choose another --out"):
        train_codebooks(calib, tmp_path, runs.config(), resume=True)
    assert stores.contents(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    ("change", "field"),
    [({"seed": 1}, "seed"), ({"key_bits": 2.0}, "bits"), ({"value_bits": 3.0}, "bits")],
)
def test_resuming_with_other_settings_is_refused(
    tmp_path: Path, calib: Path, change: dict[str, Any], field: str
) -> None:
    out = tmp_path / "run"
    train_codebooks(calib, out, runs.config(layers=(0,)))
    before = stores.contents(out)
    with pytest.raises(InputError, match=rf"begun with other settings \({field} differs\)"):
        train_codebooks(calib, out, runs.config(**change), resume=True)
    assert stores.contents(out) == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"model": "someone/else"}, "model"), ({"seed": 4}, "calibration")],
)
def test_resuming_from_another_calibration_is_refused(
    tmp_path: Path, calib: Path, changes: dict[str, Any], field: str
) -> None:
    out = tmp_path / "run"
    train_codebooks(calib, out, runs.config(layers=(0,)))
    other = runs.calibration(tmp_path / "other", **changes)
    with pytest.raises(InputError, match=rf"begun with other settings \({field} differs\)"):
        train_codebooks(other, out, runs.config(), resume=True)
