"""Text that users bring: decoded, and as JSON lines, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from commvq_core.errors import InputError


def decode_text(raw: bytes, place: str) -> str:
    """UTF-8 bytes as text, a byte order mark left out; `place` names them in the InputError."""
    mend = "give plain UTF-8 text"
    if b"\0" in raw:
        raise InputError(f"{place} is binary, not text", mend)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8 text (byte {error.start})", mend) from None


def json_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place ("FILE:LINE") and the object of each line of a .jsonl file called `name`.

    Blank lines are passed over. Raises InputError, as it reads, for a line that is no JSON object.
    """
    for number, line in enumerate(lines, start=1):
        place = f"{name}:{number}"
        text = decode_text(line, place)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place} is not JSON ({error})", "mend or remove that line") from None
        if not isinstance(record, dict):
            raise InputError(f"{place} is not a JSON object", 'write each line as {"name": value}')
        yield place, record
