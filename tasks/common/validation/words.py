"""The words of a text as the filters of `curation.py` compare them: lower case, without marks and spaces."""

import re

# Thai, kana and Chinese are written without spaces between words: each of their signs stands for a word.
WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+")


def words(text: str) -> list[str]:
    """Return a text's words in order, so that case, punctuation and spacing make no difference."""
    return WORD.findall(text.lower())
