"""Text that every CPython carries, so that the whole pipeline runs with no download.

A document is one topic of the language reference (``pydoc_data.topics``) or the docstrings of one
module of the standard library; made-up records (records.py) stand between those to learn from.
Real use names a dataset; this text is for trying the toolkit.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from commvq_core.calibration.records import records
from commvq_core.errors import InputError

Split = Literal["train", "heldout"]

HELDOUT_PERCENT = 15
"""Share of the names whose text is held out of training, in percent."""

_RECORDS_EVERY = 6000  # characters of documentation, then
_RECORDS = 800  # characters of records: a tenth of the text, a fifth of the tokens
_SHORTEST = 200  # characters; below this a module's docstrings are one-line boilerplate
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
)
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class _Entry:
    """A document not read yet: a topic, or the file of a module."""

    name: str
    topic: str | None = None
    module: Path | None = None

    @property
    def family(self) -> str:
        # Modules of a package repeat each other's docstrings, so a package stays on one side.
        return self.name.split(".")[0]


def split_of(name: str) -> Split:
    """Which side of the split the text called `name` belongs to; the same on every machine."""
    return "heldout" if _hash(f"split:{name}") % 100 < HELDOUT_PERCENT else "train"


def builtin_documents(split: Split = "train") -> Iterator[str]:
    """Yield the documents of one side of the split, in an order that mixes topics and modules.

    The order follows a hash of the names: it is the same in every run and never depends on the
    order in which a file system lists its files. Modules are parsed (never imported) as they are
    drawn, so taking a few documents is quick. Only training text has records in it: evaluations
    are on what people wrote. Raises InputError on a Python without this text.
    """
    entries = [entry for entry in _entries() if split_of(entry.family) == split]
    if not entries:
        raise InputError(
            "this Python carries no documentation text", "name a --dataset, for example a .txt file"
        )
    number = since = 0
    for entry in sorted(entries, key=lambda entry: _hash(f"order:{entry.name}")):
        text = entry.topic if entry.topic is not None else _docstrings(entry)
        if len(text) < _SHORTEST:
            continue
        yield text
        since += len(text)
        if split == "train" and since >= _RECORDS_EVERY:
            yield records(number, since * _RECORDS // _RECORDS_EVERY)
            number, since = number + 1, 0


def _entries() -> list[_Entry]:
    return [*_topics(), *_modules(Path(sysconfig.get_path("stdlib")))]


def _topics() -> list[_Entry]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it apart
        return []
    return [_Entry(name=f"topic {name}", topic=text) for name, text in topics.items()]


def _modules(root: Path) -> list[_Entry]:
    entries = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.isdisjoint(parts):
            entries.append(_Entry(name=".".join(parts), module=path))
    return entries


def _docstrings(entry: _Entry) -> str:
    """Every docstring of a module in source order, each under the name it documents."""
    assert entry.module is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the library's own source
            tree = ast.parse(entry.module.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ""  # templates that only look like modules
    name = entry.name.removesuffix(".__init__")
    sections = []
    if title := ast.get_docstring(tree):
        sections.append(f"{name}\n\n{title}\n")
    sections.extend(_sections(tree, name))
    return "\n".join(sections)


def _sections(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            name = f"{prefix}.{child.name}"
            if text := ast.get_docstring(child):
                yield f"{_signature(child, name)}\n\n{text}\n"
            yield from _sections(child, name)


def _signature(node: _Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {name}"
    return f"{name}({ast.unparse(node.args)})"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
