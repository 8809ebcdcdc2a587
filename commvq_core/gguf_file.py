"""Is a .gguf file whole? Answered from its header, in a tenth of a second.

transformers reads a header with slow, general code, several times over, and what it says about a
file that was cut short varies with where. So look first.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from commvq_core.errors import InputError

_MEND = "download the file again"
_STRING, _ARRAY = 8, 9
# Bytes of a metadata value by its type's number: u8 i8 u16 i16 u32 i32 f32 bool . . u64 i64 f64.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_INTEGERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}


def check_gguf(path: Path) -> None:
    """Raise InputError unless `path` is one whole .gguf file (format version 2 or 3)."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24 or file.read(4) != b"GGUF":
                raise InputError(f"{path} is not a .gguf file, or is cut short", _MEND)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                end = _Header(data, path).end
    except OSError as error:
        raise InputError(f"{path} can't be read ({error})", "check the file") from error
    except (struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is cut short or damaged, within its header", _MEND) from error
    if size < end:
        raise InputError(f"{path} is cut short: it has {size:,} of {end:,} bytes", _MEND)


class _Header:
    """Walks the header; `end` is where the file's last tensor ends.

    Raises struct.error when the header runs past the end of the file: what was skipped is always
    followed by something that is read.
    """

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path = data, path
        self._at, self._order = 4, "<"
        if self._peek("I") & 0xFFFF == 0:  # a small number with its bytes swapped
            self._order = ">"
        version = self._read("I")
        if version not in (2, 3):
            raise InputError(
                f"{path} has .gguf version {version}", "convert the model again with llama.cpp"
            )
        tensors, fields = self._read("Q"), self._read("Q")
        values = dict(self._field() for _ in range(fields))
        if (values.get("split.count") or 0) > 1:
            raise InputError(
                f"{path} is one of {values['split.count']} parts of a model",
                "merge them with llama-gguf-split --merge",
            )
        ends = [self._tensor_end() for _ in range(tensors)]
        if not ends:
            raise InputError(f"{path} holds no tensors", _MEND)
        alignment = values.get("general.alignment") or 32
        self.end = -(-self._at // alignment) * alignment + max(ends)

    def _peek(self, kind: str) -> int:
        (value,) = struct.unpack_from(self._order + kind, self._data, self._at)
        return int(value)

    def _read(self, kind: str) -> int:
        value = self._peek(kind)
        self._at += struct.calcsize(self._order + kind)
        return value

    def _string(self) -> str:
        length = self._read("Q")
        start = self._at
        self._at += length
        return self._data[start : self._at].decode("utf-8")

    def _field(self) -> tuple[str, int | None]:
        """A metadata entry: its name, and its value where that is an integer."""
        name, kind = self._string(), self._read("I")
        if kind in _INTEGERS:
            return name, self._read(_INTEGERS[kind])
        self._skip_value(kind)
        return name, None

    def _skip_value(self, kind: int) -> None:
        if kind == _STRING:
            length = self._read("Q")
            self._at += length
        elif kind == _ARRAY:
            inner, count = self._read("I"), self._read("Q")
            if inner in _SIZES:
                self._at += _SIZES[inner] * count
            else:
                for _ in range(count):
                    self._skip_value(inner)
        elif kind in _SIZES:
            self._at += _SIZES[kind]
        else:
            raise struct.error(f"no metadata has type {kind}")

    def _tensor_end(self) -> int:
        """Where a tensor ends, counted from the start of the tensors' data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string()
        elements = 1
        for _ in range(self._read("I")):
            elements *= self._read("Q")
        kind, offset = self._read("I"), self._read("Q")
        try:
            per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise InputError(
                f"{self._path}: tensor {name} has type {kind}, which the package gguf doesn't know",
                "pip install --upgrade gguf",
            ) from None
        return offset + elements // per_block * block_bytes
