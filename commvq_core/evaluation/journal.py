"""What an evaluation has done so far, on disk, so that --resume can go on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from commvq_core.errors import InputError
from commvq_core.files import read_json, sha256_of_text, write_json

Record = dict[str, Any]


class Journal:
    """Records by (codec, example), in the file ``.NAME.partial.json`` beside the result.

    `key` holds all that the records depend on; records made with another key are refused.
    """

    def __init__(self, out: Path, key: dict[str, Any], *, resume: bool) -> None:
        self.path = partial_path(out)
        self.key = key_sha256(key)
        self._records: dict[str, list[Record]] = {}
        if resume and self.path.exists():
            self._load()

    def _load(self) -> None:
        stored = read_json(self.path, "the unfinished evaluation")
        if stored.get("key") != self.key:
            raise InputError(
                f"{self.path} is of an evaluation with other settings",
                "give the same settings, or --overwrite to start again",
            )
        self._records = stored["records"]

    def records(self, codec: int) -> list[Record]:
        """The records of the `codec`-th codec, in the order of the examples."""
        return self._records.setdefault(str(codec), [])

    def add(self, codec: int, record: Record) -> None:
        """Append the next example's record and write everything to disk."""
        self.records(codec).append(record)
        write_json(self.path, {"key": self.key, "records": self._records})

    def remove(self) -> None:
        """Delete the file: the result itself is written."""
        self.path.unlink(missing_ok=True)


def partial_path(out: Path) -> Path:
    """Where the journal of the result `out` is kept."""
    return out.parent / f".{out.name}.partial.json"


def key_sha256(key: dict[str, Any]) -> str:
    """One hash for everything that a result depends on."""
    return sha256_of_text(json.dumps(key, sort_keys=True))
