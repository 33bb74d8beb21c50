"""Split texts into words: for the filters of `curation.py` and for the metrics of replies.

Thai, Japanese, Chinese and some other languages are written without spaces: each of their characters counts as a word.
"""

import re
from collections.abc import Sequence

import regex

UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    r"\u3040-\u30ff\uff66-\uff9f\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and ideographs
)
# `\w` of `re` leaves out combining marks: it would split हिन्दी into three words, and é in two code points into two.
WORD = regex.compile(rf"[{UNSPACED}]|[\w--[{UNSPACED}]]+", regex.V1)
UNSPACED_WORD = re.compile(rf"[{UNSPACED}]")
ASCII_WORD = re.compile(r"\w+", re.ASCII)  # the same words of an ASCII text, three times as fast
PIECE = re.compile(rf"[{UNSPACED}][^\w\s]*|[^\s{UNSPACED}]+")


def mostly_unspaced(found: Sequence[str]) -> bool:
    """Return whether more than half of these words are characters of a script without spaces."""
    return 2 * sum(bool(UNSPACED_WORD.fullmatch(word)) for word in found) > len(found)


def words(text: str) -> list[str]:
    """Return a text's words in order, in lower case and without punctuation."""
    found: list[str] = (ASCII_WORD if text.isascii() else WORD).findall(text.lower())
    return found


def split_words(text: str) -> list[str]:
    """Split like `str.split`, but each character of a script without spaces, with the marks after it, is a word."""
    return PIECE.findall(text)
