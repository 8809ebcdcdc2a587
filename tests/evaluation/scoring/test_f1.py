"""F1 of shared words, in English and Chinese, worked by hand."""

from __future__ import annotations

import sys

import pytest

from commvq_core.errors import InputError
from commvq_core.evaluation.scoring.f1 import f1, f1_characters, f1_chinese, word_f1
from commvq_core.evaluation.scoring.words import (
    check_chinese,
    chinese_words,
    normalized,
    normalized_chinese,
)


def test_articles_punctuation_and_case_do_not_matter() -> None:
    assert normalized("The U.S.  Navy's\tan apple!") == "us navys apple"
    assert normalized("theatre a.") == "theatre"
    assert f1("The Eiffel Tower.", "eiffel tower") == 1


def test_words_count_as_often_as_both_have_them() -> None:
    # Shared: red, red, fish. Precision 3/4, recall 3/5.
    assert f1("red red fish fish", "red red red fish blue") == pytest.approx(2 / 3)
    assert word_f1(["x"], ["y"]) == 0
    assert f1("", "x") == f1("x", "") == f1("the", "a") == 0


def test_chinese_is_compared_by_words() -> None:
    assert chinese_words("我来到北京清华大学") == ["我", "来到", "北京", "清华大学"]
    # Shared: 我, 来到, 北京 of four and of four words.
    assert f1_chinese("我来到北京清华大学。", "我来到北京，公园") == pytest.approx(3 / 4)
    assert f1_chinese("。，！", "北京") == 0


def test_chinese_may_be_compared_by_characters() -> None:
    # Shared: 北, 京 of two and of four characters.
    assert f1_characters("“北京”", "北京大学") == pytest.approx(2 / 3)
    assert f1_characters("上海", "北京") == 0


def test_chinese_punctuation_goes_and_letters_stay() -> None:
    assert normalized_chinese(" Ａb，“北 京”！？（x）。…—~") == "ａb北京x"
    # The opening angle brackets are not on the benchmarks' list, and digits are no signs.
    assert normalized_chinese("《书》１") == "《书１"


def test_chinese_without_jieba_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_chinese()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(InputError, match=r"needs the package jieba: pip install 'commvq\[eval\]'"):
        check_chinese()
