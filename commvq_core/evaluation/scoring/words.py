"""What the words of an answer are, in English and in Chinese."""

from __future__ import annotations

import re
import string
from typing import Any

from commvq_core.errors import InputError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LATIN = re.compile(r"[a-z0-9]+")
# Chinese punctuation as both benchmarks remove it, first and last code points. Neither has the
# opening angle brackets, so neither are they here.
_CHINESE_RANGES = (
    *((0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003)),
    *((0x300B, 0x3011), (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F)),
    *((0xFF01, 0xFF0D), (0xFF0F, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64)),
)
_CHINESE_PUNCTUATION = {
    point: None for first, last in _CHINESE_RANGES for point in range(first, last + 1)
}


def normalized(text: str) -> str:
    """An English answer as SQuAD compares it (Rajpurkar et al. 2016).

    Lowered, ASCII punctuation and the articles a, an, the removed, white space made single blanks.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def latin_words(text: str) -> list[str]:
    """Runs of a-z and 0-9 of the lowered text."""
    return _LATIN.findall(text.lower())


def normalized_chinese(text: str) -> str:
    """A Chinese answer: lowered, without punctuation, Chinese and ASCII, and white space."""
    return "".join(text.lower().translate(_CHINESE_PUNCTUATION).translate(_PUNCTUATION).split())


def chinese_words(text: str) -> list[str]:
    """Words of a Chinese text as jieba cuts them (white space included, as it does).

    Raises InputError where jieba isn't installed.
    """
    return list(_jieba().cut(text, cut_all=False))


def check_chinese() -> None:
    """Raise InputError where `chinese_words` can't work: before a model runs, not after."""
    _jieba()


def _jieba() -> Any:
    import logging
    import warnings

    try:
        with warnings.catch_warnings():
            # Its sources have escapes that newer Pythons warn of.
            warnings.simplefilter("ignore")
            import jieba
    except ImportError:
        raise InputError(
            "scoring Chinese answers needs the package jieba", "pip install 'commvq[eval]'"
        ) from None
    jieba.setLogLevel(logging.WARNING)
    return jieba
