"""Text for calibration and evaluation: documents from many kinds of source, packed into sequences.

Importing this file loads neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from commvq_core.calibration.builtin import Split
from commvq_core.calibration.sources import open_source
from commvq_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DocumentStream",
    "Split",
    "TextSource",
    "iter_documents",
    "pack_tokens",
    "tokenize_sequences",
]

_PASSAGE = 32_768  # characters, some eight thousand tokens: several sequences of the usual length
_BLOCK = 1_000_000  # characters tokenized at once, to bound memory on a text of many megabytes


@dataclass(frozen=True)
class TextSource:
    """What was read of one source: enough to tell later whether the text is still the same.

    `sha256` covers the documents that were drawn, in order; it is None when none was.
    """

    name: str
    sha256: str | None
    documents: int
    characters: int


def iter_documents(
    sources: Sequence[str], *, split: Split = "train", text_column: str = "text"
) -> DocumentStream:
    """Read documents lazily from one or more sources.

    A source is ``builtin`` (text of this Python's own documentation), a .txt file (one document,
    its line ends kept), a .jsonl or .parquet file (a document a row, in `text_column`), or a hub
    data set that is streamed: ``id``, ``id:configuration`` or a folder. `split` divides ``builtin``
    and hub data sets into training and held-out text that never overlap; files are read whole.

    Several sources are mixed evenly: the next document is taken from the source that has given the
    fewest characters, and documents beyond some 32,000 characters are cut at a line end, so that
    one long file can't crowd out the rest. The order is the same in every run.

    Raises InputError for a source that is missing, empty, binary, of an unknown kind, lacks the
    column, or can't be reached; for .jsonl the message names file and line.
    """
    return DocumentStream(sources, split=split, text_column=text_column)


class DocumentStream(Iterator[str]):
    """The documents of `iter_documents`; `used()` tells what was drawn from each source so far."""

    def __init__(self, sources: Sequence[str], *, split: Split, text_column: str) -> None:
        if not sources:
            raise InputError("no text was named", "give at least one --dataset")
        if split not in ("train", "heldout"):
            raise InputError(f"there is no split {split!r}", "give train or heldout")
        several = len(sources) > 1
        self._readers = [
            _Reader(source, open_source(source, split, text_column), several) for source in sources
        ]

    def __next__(self) -> str:
        while open_readers := [reader for reader in self._readers if not reader.finished]:
            reader = min(open_readers, key=lambda reader: reader.characters)
            if (text := reader.draw()) is not None:
                return text
        raise StopIteration

    def used(self) -> list[TextSource]:
        """One TextSource a source, in the order given."""
        return [reader.used() for reader in self._readers]


class _Reader:
    """One source: draws documents, passes over blank ones, and hashes what it hands out."""

    def __init__(self, name: str, documents: Iterator[str], cut: bool) -> None:
        self.name = name
        self.characters = 0
        self.finished = False
        self._documents = _passages(documents) if cut else documents
        self._count = 0
        self._digest = hashlib.sha256()

    def draw(self) -> str | None:
        for text in self._documents:
            if not text.strip():
                continue
            self._count += 1
            self.characters += len(text)
            self._digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
            return text
        self.finished = True
        if self._count == 0:
            raise InputError(f"{self.name} is empty", "give a source with text in it")
        return None

    def used(self) -> TextSource:
        digest = self._digest.hexdigest() if self._count else None
        return TextSource(self.name, digest, self._count, self.characters)


def _passages(documents: Iterator[str]) -> Iterator[str]:
    for text in documents:
        yield from _cut(text, _PASSAGE)


def _cut(text: str, length: int) -> Iterator[str]:
    """Pieces of at most `length` characters that join to `text`, cut after a line end if any."""
    start = 0
    while len(text) - start > length:
        newline = text.rfind("\n", start, start + length)
        end = newline + 1 if newline >= start else start + length
        yield text[start:end]
        start = end
    yield text[start:]


def tokenize_sequences(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], *, tokens: int, seq_len: int
) -> list[Tensor]:
    """Tokenize documents, join them, and cut the first `tokens` tokens into sequences.

    Documents are divided by whatever special tokens the tokenizer adds of its own accord (Llama's
    bos), else by its eos token, as in pretraining. Returns int64 tensors [seq_len]; the last one is
    shorter when `tokens` is no multiple of `seq_len`. No document is drawn beyond those needed.
    Raises InputError when `tokens` or `seq_len` is not positive, or the text has fewer tokens.
    """
    import torch

    if tokens < 1 or seq_len < 1:
        raise InputError(
            f"{tokens} tokens in sequences of {seq_len}", "both numbers must be at least 1"
        )
    ids = pack_tokens(tokenizer, documents, tokens)
    if len(ids) < tokens:
        raise InputError(
            f"the text has {len(ids):,} tokens, fewer than the {tokens:,} asked for",
            f"ask for at most {len(ids):,} --tokens, or add another --dataset",
        )
    packed = torch.tensor(ids, dtype=torch.long)
    return list(packed.split(seq_len))


def pack_tokens(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], tokens: int
) -> list[int]:
    """The first `tokens` token ids of the joined documents; fewer when there are no more."""
    ids: list[int] = []
    for text in documents:
        ids.extend(_document_ids(tokenizer, text, tokens - len(ids)))
        if len(ids) >= tokens:
            break
    return ids[:tokens]


def _document_ids(tokenizer: Any, text: str, wanted: int) -> list[int]:
    """Token ids of one document, at least `wanted` of them if it is that long, and its divider."""
    prefix, suffix = _special_ids(tokenizer)
    ids = list(prefix)
    for piece in _cut(text, _BLOCK):
        # verbose=False: a document longer than the model's context is no cause for a warning here.
        ids.extend(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) >= wanted:
            return ids
    return ids + suffix


def _special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What goes before and after a document."""
    probe = "a"
    plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain and len(full) > len(plain):
            return list(full[:start]), list(full[start + len(plain) :])
    end = tokenizer.eos_token_id
    return [], [] if end is None else [int(end)]
