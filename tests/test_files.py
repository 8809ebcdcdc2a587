"""Files: whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from commvq_core import files
from commvq_core.errors import InputError

Write = Callable[[Path], None]
WRITERS: dict[str, Write] = {
    "json": lambda path: files.write_json(path, {"new": [1, 2]}),
    "text": lambda path: files.write_text(path, "new"),
    "tensors": lambda path: files.write_tensors(path, {"new": torch.ones(3)}),
}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_written_and_replaced_and_nothing_else_is_left(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "deep" / "file"
    WRITERS[kind](path)
    first = path.read_bytes()
    path.write_bytes(b"old")
    WRITERS[kind](path)
    assert path.read_bytes() == first
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_whole(
    tmp_path: Path, kind: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device.*: free some"):
        WRITERS[kind](path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from commvq_core import files
from commvq_core.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
folder = Path(sys.argv[1])
for name, write in {
    "text": lambda: files.write_text(folder / "text", "x" * 10_000),
    "json": lambda: files.write_json(folder / "json", ["x" * 10_000]),
    "tensors": lambda: files.write_tensors(folder / "tensors", {"x": torch.zeros(10_000)}),
}.items():
    try:
        write()
    except InputError as error:
        print(name, error)
"""


def test_writes_that_the_system_stops_half_way_leave_the_old_files_whole(tmp_path: Path) -> None:
    """No monkey patches: the kernel refuses to let any file of this process pass 4 KiB."""
    for kind in WRITERS:
        (tmp_path / kind).write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    refused = done.stdout.splitlines()
    assert [line.split(" cannot write ")[0] for line in refused] == ["text", "json", "tensors"]
    assert all("File too large" in line for line in refused)
    assert names(tmp_path) == ["json", "tensors", "text"]
    assert all((tmp_path / kind).read_bytes() == b"old" for kind in WRITERS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_old_file_whole_and_is_handed_on(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        files.atomic_write(path, interrupted)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write .*taken/file") as refused:
        files.write_text(tmp_path / "taken" / "file", "new")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_and_folders_get_the_permissions_that_the_user_asked_for(
    tmp_path: Path, mask: int
) -> None:
    before = os.umask(mask)
    try:
        files.write_text(tmp_path / "file", "new")
        files.replace_output(tmp_path / "out", lambda _: None, "mark", "thing")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


def test_tensors_come_back_and_their_bytes_depend_on_names_and_values_alone(
    tmp_path: Path,
) -> None:
    first = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor([1, 2])}
    second = {"a": torch.tensor([1, 2]), "b": first["b"].contiguous()}
    files.write_tensors(tmp_path / "one", first, {"note": "x"})
    files.write_tensors(tmp_path / "two", second, {"note": "x"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    back = files.read_tensors(tmp_path / "one", "it")
    assert all(torch.equal(back[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_tensors_that_are_cut_short_are_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file({"x": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    message = r"file.safetensors is not a readable safetensors file .*: make the run again"
    with pytest.raises(InputError, match=message):
        files.read_tensors(path, "the run")


def test_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x does not exist: make the run again"):
        files.read_tensors(tmp_path / "x", "the run")
    with pytest.raises(InputError, match="x does not exist: give the folder of a run"):
        files.read_json(tmp_path / "x", "a run")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"not json", b"\xff\xfe\x00", b"\x00\x00", b"[" * 100_000],
    ids=["empty", "cut", "text", "binary", "zeros", "deep"],
)
def test_what_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match="x is not readable JSON") as refused:
        files.read_json(tmp_path / "x", "a run")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [[], 1, "x", None])
def test_json_that_is_no_object_is_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "x").write_text(json.dumps(value))
    with pytest.raises(InputError, match="x does not hold a JSON object"):
        files.read_json(tmp_path / "x", "a run")


def test_hashes_are_sha256(tmp_path: Path) -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert files.sha256_of_text("") == empty
    (tmp_path / "x").write_bytes(b"ab" * (1 << 20))
    assert files.sha256_of_file(tmp_path / "x") == files.sha256_of_text("ab" * (1 << 20))


def test_appended_lines_are_kept_whole(tmp_path: Path) -> None:
    for line in ("one", "zwei", "trois"):
        files.append_line(tmp_path / "log", line)
    assert (tmp_path / "log").read_text() == "one\nzwei\ntrois\n"


def test_a_line_that_finds_no_room_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = iter([3])

    def write(descriptor: int, data: bytes) -> int:
        try:
            return next(written)
        except StopIteration:
            raise OSError(errno.ENOSPC, "No space left on device") from None

    monkeypatch.setattr(files.os, "write", write)
    with pytest.raises(InputError, match="No space left"):
        files.append_line(tmp_path / "log", "a long line")


def torn(folder: Path) -> Path:
    """A folder with what a killed write leaves."""
    folder.mkdir()
    (folder / ".x.json.abc.tmp").write_bytes(b"half")
    return folder


def test_output_is_refused_only_where_something_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("gone", "empty"):
        files.check_output(tmp_path / name, overwrite=False)
    files.check_output(torn(tmp_path / "torn"), overwrite=False)
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".profile").touch()
    for name in ("file", "broken", "full"):
        with pytest.raises(InputError, match=f"{name} exists already"):
            files.check_output(tmp_path / name, overwrite=False)
        files.check_output(tmp_path / name, overwrite=True)
        files.check_output(tmp_path / name, overwrite=False, resume=True)
    with pytest.raises(InputError, match="contradict each other"):
        files.check_output(tmp_path / "gone", overwrite=True, resume=True)


def thing(folder: Path, content: str = "old") -> Path:
    folder.mkdir()
    (folder / "mark").write_text(content)
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text(content)
    return folder


def test_clearing_removes_a_folder_of_its_kind_and_no_other(tmp_path: Path) -> None:
    files.clear_output(tmp_path / "gone", "mark", "thing")
    files.clear_output(torn(tmp_path / "torn"), "mark", "thing")
    assert names(tmp_path / "torn") == []
    target = thing(tmp_path / "target")
    (tmp_path / "link").symlink_to(target)
    files.clear_output(tmp_path / "link", "mark", "thing")
    assert names(target) == ["deep", "mark"]
    files.clear_output(target, "mark", "thing")
    assert names(tmp_path) == ["torn"]
    other = thing(tmp_path / "other")
    (other / "mark").rename(other / "label")
    for path in (other, other / "label"):
        with pytest.raises(InputError, match="is no thing and will not be removed"):
            files.clear_output(path, "mark", "thing")
    assert names(other) == ["deep", "label"]


@pytest.mark.parametrize("old", ["gone", "torn", "thing"])
def test_an_output_folder_is_replaced_whole(tmp_path: Path, old: str) -> None:
    out = tmp_path / "out"
    if old != "gone":
        (torn if old == "torn" else thing)(out)
    files.replace_output(out, lambda folder: files.write_text(folder / "mark", "new"), "mark", "x")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["mark"]
    assert (out / "mark").read_text() == "new"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_an_output_folder_that_could_not_be_written_leaves_the_old_one(
    tmp_path: Path, error: BaseException
) -> None:
    out = thing(tmp_path / "out")

    def fail(folder: Path) -> None:
        files.write_text(folder / "mark", "new")
        raise error

    wanted = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        files.replace_output(out, fail, "mark", "thing")
    assert names(tmp_path) == ["out"]
    assert (out / "deep" / "file").read_text() == "old"


def test_an_output_folder_that_could_not_be_moved_into_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = thing(tmp_path / "out")
    replace, calls = Path.replace, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", second_fails)
    with pytest.raises(InputError, match=r"cannot write .*out .*Input/output error"):
        files.replace_output(out, lambda _: None, "mark", "thing")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["deep", "mark"]


def test_an_output_folder_never_replaces_what_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(InputError, match="is no thing and will not be removed"):
            files.replace_output(out, lambda _: None, "mark", "thing")
    with pytest.raises(InputError, match="cannot write"):
        files.replace_output(tmp_path / "thesis.txt" / "out", lambda _: None, "mark", "thing")
    assert names(tmp_path) == ["thesis.txt"]
