"""The words of a text: as the filters of `curation.py` compare them, and as replies are measured by.

Thai, kana, Chinese and others are written without spaces between words: each of their signs stands for a word.
"""

import re

UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    r"\u3040-\u30ff\uff66-\uff9f\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and ideographs
)
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
PIECE = re.compile(rf"[{UNSPACED}][^\w\s]*|[^\s{UNSPACED}]+")


def words(text: str) -> list[str]:
    """Return a text's words in order, so that case, punctuation and spacing make no difference."""
    return WORD.findall(text.lower())


def split_words(text: str) -> list[str]:
    """Return what `str.split` does, with each sign of a script without spaces apart, and what marks follow it."""
    return PIECE.findall(text)
