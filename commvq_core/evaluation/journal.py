"""What an evaluation has done so far, on disk, so that --resume can go on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commvq_core.errors import InputError
from commvq_core.files import append_line, sha256_of_text, write_text

Record = dict[str, Any]


class Journal:
    """Records by (codec, example), in the file ``.NAME.partial.jsonl`` beside the result.

    A line an example (or a batch of them), appended as it is done; the first line is `key`'s hash,
    which covers all that the records depend on. Records made with another key are refused, and the
    half of a line that a kill or a full disk left at the end is dropped: that example runs again.
    """

    def __init__(self, out: Path, key: dict[str, Any], *, resume: bool) -> None:
        self.path = partial_path(out)
        self.key = key_sha256(key)
        self._records: dict[int, list[Record]] = {}
        self._begun = resume and self.path.exists()
        if self._begun:
            self._load()

    def _load(self) -> None:
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        first, *lines = raw[:whole].splitlines() or [b""]
        try:
            key = json.loads(first)["key"]
            entries = [json.loads(line) for line in lines]
            for entry in entries:
                self.records(entry["codec"]).extend(map(dict, entry["records"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path} is damaged ({error})", "add --overwrite to start again"
            ) from None
        if key != self.key:
            raise InputError(
                f"{self.path} is of an evaluation with other settings",
                "give the same settings, or --overwrite to start again",
            )
        if whole < len(raw):
            os.truncate(self.path, whole)

    def records(self, codec: int) -> list[Record]:
        """The records of the `codec`-th codec, in the order of the examples."""
        return self._records.setdefault(codec, [])

    def add(self, codec: int, records: Sequence[Record]) -> None:
        """Append the records of the next example or batch, on disk as well."""
        if not self._begun:
            write_text(self.path, json.dumps({"key": self.key}) + "\n")
            self._begun = True
        line = {"codec": codec, "records": list(records)}
        append_line(self.path, json.dumps(line, allow_nan=False))
        self.records(codec).extend(records)

    def remove(self) -> None:
        """Delete the file: the result itself is written."""
        self.path.unlink(missing_ok=True)


def partial_path(out: Path) -> Path:
    """Where the journal of the result `out` is kept."""
    return out.parent / f".{out.name}.partial.jsonl"


def key_sha256(key: dict[str, Any]) -> str:
    """One hash for everything that a result depends on."""
    return sha256_of_text(json.dumps(key, sort_keys=True))
