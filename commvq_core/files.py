"""Writing files so that nobody ever sees half of one.

Every file the toolkit writes goes through here: to a temporary name in the same folder, fsync,
then rename. A full disk or a kill therefore leaves the old file whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commvq_core.errors import InputError

if TYPE_CHECKING:
    import torch


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and rename the temporary file to `path`.

    Raises InputError when the disk is full or the folder is not writable; `path` is then as it was.
    """
    descriptor, name = -1, ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException as error:
        if name:
            Path(name).unlink(missing_ok=True)
        # safetensors reports the operating system's errors as its own class, by text alone.
        if isinstance(error, OSError) or re.search("I/O error|IoError", str(error)):
            raise InputError(
                f"cannot write {path} ({error})",
                "free some space or choose another --out; files written before are whole",
            ) from error
        raise


def _umask() -> int:
    umask = os.umask(0)  # the only way to read it
    os.umask(umask)
    return umask


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()

    atomic_write(path, write)


def append_line(path: Path, line: str) -> None:
    """Append a line of UTF-8 text in one write, so that the lines of several writers don't mix.

    Raises InputError when it can't be written; half of the line may then be there.
    """
    left = f"{line}\n".encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            # A second time only where a disk is nearly full, to learn of it.
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error})", "free some space") from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; `what` names the file in the InputError raised when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", f"give the folder of {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error})", f"make {what} again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object", f"make {what} again")
    return value


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically. The bytes depend on names and values alone."""
    from safetensors.torch import save_file

    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    atomic_write(path, lambda temporary: save_file(ordered, temporary, dict(metadata or {})))


def read_tensors(path: Path, what: str) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file. Raises InputError when it is missing or cut short."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"{path} does not exist", f"make {what} again")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a readable safetensors file ({error})", f"make {what} again"
        ) from error


def sha256_of_text(text: str) -> str:
    """Hex SHA-256 of UTF-8 text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_output(path: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Refuse to write over something that exists unless told to. Touches nothing.

    Raises InputError. What `is_blank` says is blank counts as not existing.
    """
    if overwrite and resume:
        raise InputError("--overwrite and --resume contradict each other", "give one of the two")
    if is_blank(path):
        return
    if overwrite or resume:
        return
    raise InputError(
        f"{path} exists already",
        "choose another --out, or add --overwrite (or --resume, for an unfinished run)",
    )


def is_blank(path: Path) -> bool:
    """Whether nothing is at `path`, or a folder without anyone's files.

    A process that was killed as it wrote its first file leaves a temporary one behind.
    """
    if path.is_dir():
        return all(is_temporary(entry) for entry in path.iterdir())
    return not path.exists() and not path.is_symlink()


def is_temporary(path: Path) -> bool:
    """Whether `path` is what a killed `atomic_write` leaves behind.

    safetensors writes the temporary file by way of another one of its own, `.tmp` and 6 letters.
    """
    return re.fullmatch(r"\..*\.tmp|\.tmp\w{6}", path.name) is not None and path.is_file()


def remove_temporary(folder: Path) -> None:
    """Remove what killed `atomic_write`s left in a folder, if there is one."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(entry):
            entry.unlink(missing_ok=True)


def check_replaceable(path: Path, mark: str, kind: str) -> None:
    """Raise InputError unless `path` is blank or a folder of a `kind` that holds the file `mark`.

    A mistyped --out must not cost anybody their files.
    """
    if not is_blank(path) and not (path / mark).is_file():
        raise InputError(f"{path} is no {kind} and will not be removed", "choose another --out")


def clear_output(path: Path, mark: str, kind: str) -> None:
    """Remove an output folder that the user agreed to overwrite, after `check_replaceable`.

    It is renamed before it is deleted, so that a kill leaves the whole of it or nothing.
    """
    check_replaceable(path, mark, kind)
    try:
        if is_blank(path):
            remove_temporary(path)
        else:
            shutil.rmtree(_move_aside(path))
    except OSError as error:
        raise InputError(f"cannot remove {path} ({error})", "choose another --out") from error


def replace_output(path: Path, write: Callable[[Path], None], mark: str, kind: str) -> None:
    """Call `write(folder)` on a new folder and put it at `path`, in place of the old one.

    `path` is as it was when `write` fails. Raises InputError as `clear_output` does, and when
    nothing can be written beside `path`.
    """
    check_replaceable(path, mark, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = _temporary_folder(path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error})", "choose another --out") from error
    try:
        write(staging)
        staging.chmod(0o777 & ~_umask())
        aside = _move_aside(path) if path.exists() or path.is_symlink() else None
        try:
            staging.replace(path)
        except OSError:
            if aside is not None:
                (aside / path.name).replace(path)
                aside.rmdir()
            raise
        if aside is not None:
            shutil.rmtree(aside)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error})", "choose another --out") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _temporary_folder(path: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))


def _move_aside(path: Path) -> Path:
    """Rename `path`, into a new folder beside it; returns that folder."""
    aside = _temporary_folder(path)
    path.replace(aside / path.name)
    return aside
