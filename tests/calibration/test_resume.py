"""An interrupted `calibrate` goes on to the same bytes, and only where it belongs."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commvq_core.calibration import store as store_module
from commvq_core.calibration.collect import CalibrationConfig, calibrate
from commvq_core.calibration.store import CalibrationStore
from commvq_core.errors import InputError
from commvq_core.models import LoadedModel, describe_model
from commvq_core.progress import Silent
from tests.calibration.models import build
from tests.calibration.stores import contents


def fail_after(
    monkeypatch: pytest.MonkeyPatch, writes: int, error: BaseException
) -> Callable[[], None]:
    """Make the write of the next tensor file after `writes` of them raise; returns the undoing."""
    write = store_module.write_tensors
    done: list[Path] = []

    def interrupted(path: Path, tensors: Any) -> None:
        if len(done) == writes:
            raise error
        done.append(path)
        write(path, tensors)

    monkeypatch.setattr(store_module, "write_tensors", interrupted)
    return lambda: monkeypatch.setattr(store_module, "write_tensors", write)


class Counted(Silent):
    """Progress that adds up what it is told."""

    def __init__(self) -> None:
        self.total = self.done = self.advanced = 0.0

    def task(self, description: str, total: float, unit: str = "it", done: float = 0.0) -> Any:
        self.total, self.done = total, done
        outer, task = self, super().task(description, total)

        class Task(type(task)):  # type: ignore[misc]
            def advance(self, amount: float = 1.0) -> None:
                outer.advanced += amount

        return Task()


def begun(
    out: Path, loaded: LoadedModel, config: CalibrationConfig, monkeypatch: pytest.MonkeyPatch
) -> dict[str, bytes]:
    """An interrupted run in `out`; returns its files."""
    undo = fail_after(monkeypatch, 5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        calibrate(loaded, out, config)
    undo()
    return contents(out)


# 5 chunks of 2 shards, then 2 files of statistics.
@pytest.mark.parametrize("writes", [0, 1, 2, 5, 9, 10, 11])
def test_a_run_killed_between_shards_resumes_to_the_same_bytes(
    tmp_path: Path,
    loaded: LoadedModel,
    config: CalibrationConfig,
    monkeypatch: pytest.MonkeyPatch,
    writes: int,
) -> None:
    config = replace(config, sample=0.5)
    calibrate(loaded, tmp_path / "straight", config)
    undo = fail_after(monkeypatch, writes, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        calibrate(loaded, tmp_path / "resumed", config)
    undo()
    with pytest.raises(InputError, match=r"not finished .*--resume"):
        CalibrationStore.open(tmp_path / "resumed")
    progress = Counted()
    calibrate(loaded, tmp_path / "resumed", config, resume=True, progress=progress)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")
    assert progress.done == min(300, 64 * (writes // 2))
    assert progress.advanced == progress.total - progress.done


def test_a_run_killed_while_writing_resumes_to_the_same_bytes(
    tmp_path: Path,
    loaded: LoadedModel,
    config: CalibrationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibrate(loaded, tmp_path / "straight", config)
    undo = fail_after(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        calibrate(loaded, tmp_path / "resumed", config)
    undo()
    # What a SIGKILL in the middle of a write leaves, since nothing could tidy up.
    (tmp_path / "resumed" / "layer_001" / ".chunk_00001.safetensors.x1.tmp").write_bytes(b"torn")
    calibrate(loaded, tmp_path / "resumed", config, resume=True)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")


def test_a_full_disk_is_one_clear_line_and_the_run_can_go_on(
    tmp_path: Path,
    loaded: LoadedModel,
    config: CalibrationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import safetensors.torch

    calibrate(loaded, tmp_path / "straight", config)
    save, calls = safetensors.torch.save_file, []

    def full(tensors: Any, path: Any, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 4:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        calibrate(loaded, tmp_path / "calib", config)
    monkeypatch.setattr(safetensors.torch, "save_file", save)
    straight = contents(tmp_path / "straight")
    for name, data in contents(tmp_path / "calib").items():
        assert name == "manifest.json" or straight[name] == data
    calibrate(loaded, tmp_path / "calib", config, resume=True)
    assert contents(tmp_path / "calib") == straight


def test_resume_begins_what_was_never_begun(
    tmp_path: Path, loaded: LoadedModel, config: CalibrationConfig
) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / ".manifest.json.x1.tmp").write_bytes(b"{")
    for out in (tmp_path / "new", torn):
        assert calibrate(loaded, out, config, resume=True).complete
    assert contents(tmp_path / "new") == contents(torn)


def test_resuming_a_finished_calibration_changes_nothing(
    tmp_path: Path,
    loaded: LoadedModel,
    config: CalibrationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = calibrate(loaded, tmp_path / "calib", config)
    fail_after(monkeypatch, 0, AssertionError("something was written"))
    assert calibrate(loaded, tmp_path / "calib", config, resume=True) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 200}, r"begun with another tokens \(300, now 200\)"),
        ({"sample": 0.5}, r"begun with another sample \(1.0, now 0.5\)"),
        ({"seq_len": 16}, r"begun with another seq_len \(32, now 16\)"),
        ({"seed": 1}, r"begun with another seed \(0, now 1\)"),
        ({"datasets": ("builtin",)}, "begun with another sources: repeat the options"),
    ],
)
def test_resuming_with_other_options_is_refused(
    tmp_path: Path,
    loaded: LoadedModel,
    config: CalibrationConfig,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    before = begun(tmp_path / "calib", loaded, config, monkeypatch)
    with pytest.raises(InputError, match=message):
        calibrate(loaded, tmp_path / "calib", replace(config, **change), resume=True)
    assert contents(tmp_path / "calib") == before


def test_resuming_on_text_that_changed_is_refused(
    tmp_path: Path,
    loaded: LoadedModel,
    config: CalibrationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words of a text. " * 200)
    config = replace(config, datasets=(str(text),))
    before = begun(tmp_path / "calib", loaded, config, monkeypatch)
    text.write_text("Some words of a text. " * 200)
    with pytest.raises(InputError, match="begun with another sources"):
        calibrate(loaded, tmp_path / "calib", config, resume=True)
    assert contents(tmp_path / "calib") == before


def test_resuming_with_another_model_is_refused(
    tmp_path: Path,
    loaded: LoadedModel,
    config: CalibrationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = begun(tmp_path / "calib", loaded, config, monkeypatch)
    model = build("llama", vocab_size=300)
    other = LoadedModel(model, loaded.tokenizer, describe_model(model), "other/model")
    with pytest.raises(InputError, match="is a calibration of another model"):
        calibrate(other, tmp_path / "calib", config, resume=True)
    tuned = replace(loaded, source="a/fine-tune")  # same shapes, other weights
    with pytest.raises(InputError, match=r"begun with another model \(.*now a/fine-tune\)"):
        calibrate(tuned, tmp_path / "calib", config, resume=True)
    assert contents(tmp_path / "calib") == before


def test_resuming_a_damaged_store_names_the_shard(
    tmp_path: Path,
    loaded: LoadedModel,
    config: CalibrationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun(tmp_path / "calib", loaded, config, monkeypatch)
    shard = tmp_path / "calib" / "layer_001" / "chunk_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"chunk_00000.safetensors is damaged .*--overwrite"):
        calibrate(loaded, tmp_path / "calib", config, resume=True)
