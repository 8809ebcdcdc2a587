"""Held-out text for tasks: token windows, and a long haystack."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commvq_core.calibration.data import Split, iter_documents, pack_tokens
from commvq_core.calibration.sources import has_splits
from commvq_core.errors import InputError
from commvq_core.evaluation.options import EvalOptions

if TYPE_CHECKING:
    from commvq_core.models import LoadedModel

_SPLIT: Split = "heldout"


def text_windows(
    loaded: LoadedModel, options: EvalOptions, *, length: int, limit: int, at_least: int
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Up to `limit` windows of `length` tokens that don't overlap, and the sources they are from.

    Windows are int64 [length]. Raises InputError when there are fewer than `at_least`.
    """
    documents = iter_documents(options.texts, split=_SPLIT, text_column=options.text_column)
    ids = pack_tokens(loaded.tokenizer, documents, limit * length)
    count = len(ids) // length
    if count < at_least:
        raise InputError(
            f"the text has {len(ids):,} tokens, fewer than the {at_least * length:,} of "
            f"{at_least} windows of {length:,}",
            "give a smaller --limit or --max-length, or a longer --dataset",
        )
    packed = torch.tensor(ids[: count * length], dtype=torch.long)
    return list(packed.split(length)), [asdict(source) for source in documents.used()]


def haystack_ids(
    loaded: LoadedModel, options: EvalOptions, *, tokens: int
) -> tuple[list[int], list[dict[str, Any]]]:
    """Token ids of one running text, `tokens` of them or what there is, and its sources.

    Unlike packed windows it holds no end-of-text tokens, since it goes into a prompt.
    """
    documents = iter_documents(options.texts, split=_SPLIT, text_column=options.text_column)
    ids: list[int] = []
    for text in documents:
        piece = text.strip() + "\n\n"
        ids.extend(loaded.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) >= tokens:
            break
    return ids[:tokens], [asdict(source) for source in documents.used()]


def text_split(options: EvalOptions) -> str:
    """Which part of the text an evaluation reads: "heldout", of files the "whole", or "mixed"."""
    kinds = {_SPLIT if has_splits(source) else "whole" for source in options.texts}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def sha256_of_ids(sequences: Iterable[Iterable[int]]) -> str:
    """SHA-256 over token ids: two evaluations with the same one saw the same examples."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update((" ".join(str(int(token)) for token in sequence) + "\n").encode())
    return digest.hexdigest()
