"""Writing files so that nobody ever sees half of one.

Every file the toolkit writes goes through here: to a temporary name in the same folder, fsync,
then rename. A full disk or a kill therefore leaves the old file whole.
"""

from __future__ import annotations

import hashlib
import json
import os
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
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException as error:
        if name:
            Path(name).unlink(missing_ok=True)
        # safetensors reports the operating system's errors as its own class, by text alone.
        if isinstance(error, OSError) or "I/O error" in str(error):
            raise InputError(
                f"cannot write {path} ({error})",
                "free some space or choose another --out; files written before are whole",
            ) from error
        raise


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


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; `what` names the file in the InputError raised when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", f"give the folder of {what}") from None
    except (OSError, ValueError) as error:
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

    Raises InputError. An empty folder counts as not existing.
    """
    if overwrite and resume:
        raise InputError("--overwrite and --resume contradict each other", "give one of the two")
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if overwrite or resume:
        return
    raise InputError(
        f"{path} exists already",
        "choose another --out, or add --overwrite (or --resume, for an unfinished run)",
    )


def clear_output(path: Path) -> None:
    """Remove an output folder or file that the user agreed to overwrite."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
