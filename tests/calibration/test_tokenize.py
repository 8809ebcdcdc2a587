"""Documents become packed sequences of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from commvq_core.calibration import data
from commvq_core.calibration.data import tokenize_sequences
from commvq_core.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


class WithSpecials:
    """A tokenizer that adds special tokens itself, one token a character."""

    eos_token_id = 2

    def __init__(self, before: list[int], after: list[int]) -> None:
        self.before, self.after = before, after

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        ids = [ord(character) for character in text]
        if add_special_tokens:
            ids = [*self.before, *ids, *self.after]
        return {"input_ids": ids}


def joined(sequences: list[Any]) -> list[int]:
    return [int(token) for token in torch.cat(sequences)]


def test_documents_are_divided_by_eos_where_the_tokenizer_adds_nothing(tokenizer: Any) -> None:
    first, second = (tokenizer(text)["input_ids"] for text in ("alpha beta", "gamma"))
    expected = [*first, tokenizer.eos_token_id, *second, tokenizer.eos_token_id]
    got = tokenize_sequences(tokenizer, ["alpha beta", "gamma"], tokens=len(expected), seq_len=4)
    assert joined(got) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1], [], [1, 97, 98, 1, 99]),
        ([1], [3], [1, 97, 98, 3, 1, 99, 3]),
        ([], [3], [97, 98, 3, 99, 3]),
        ([], [], [97, 98, 2, 99, 2]),
    ],
)
def test_the_tokenizers_own_special_tokens_divide_documents(
    before: list[int], after: list[int], expected: list[int]
) -> None:
    tokenizer: Any = WithSpecials(before, after)
    got = tokenize_sequences(tokenizer, ["ab", "c"], tokens=len(expected), seq_len=100)
    assert joined(got) == expected


def test_sequences_have_the_asked_length_and_the_last_holds_the_rest(tokenizer: Any) -> None:
    got = tokenize_sequences(tokenizer, ["words and words " * 50], tokens=100, seq_len=32)
    assert [len(sequence) for sequence in got] == [32, 32, 32, 4]
    assert all(sequence.dtype == torch.long for sequence in got)


def test_no_document_is_drawn_beyond_those_needed(tokenizer: Any) -> None:
    def documents() -> Iterator[str]:
        yield "enough words for this one " * 10
        raise AssertionError("a second document was drawn")

    tokenize_sequences(tokenizer, documents(), tokens=16, seq_len=16)


def test_a_long_document_is_tokenized_in_blocks(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {row} of the text\n" for row in range(300))
    whole = tokenize_sequences(tokenizer, [text], tokens=2000, seq_len=500)
    monkeypatch.setattr(data, "_BLOCK", 64)
    blocks = tokenize_sequences(tokenizer, [text], tokens=2000, seq_len=500)
    assert tokenizer.decode(torch.cat(blocks)) in text
    assert joined(blocks) == joined(whole)


def test_too_little_text_says_how_much_there_is(tokenizer: Any) -> None:
    count = len(tokenizer("alpha beta")["input_ids"]) + 1
    with pytest.raises(InputError, match=f"the text has {count} tokens, fewer than the 4,096"):
        tokenize_sequences(tokenizer, ["alpha beta"], tokens=4096, seq_len=64)


@pytest.mark.parametrize(("tokens", "seq_len"), [(0, 8), (8, 0), (-1, 8)])
def test_counts_below_one_are_refused(tokenizer: Any, tokens: int, seq_len: int) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        tokenize_sequences(tokenizer, ["alpha"], tokens=tokens, seq_len=seq_len)
