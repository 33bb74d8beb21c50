"""Filters of single documents: language identification, and Gopher's rules for running text (table A1).

The rules and their bounds are those of Rae et al. 2021 (arXiv 2112.11446, appendix A.1.1). Ratios are meaningless for
a few words, so they apply only to documents of at least `min_words_for_ratios` words.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import Field, field_validator, model_validator

from tasks.common.settings import Settings

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})  # Gopher's eight
# The languages of py3langid (a test compares them), listed here because its model takes half a second to load.
LANGUAGE_CODES = (
    "ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr "
    "fuv fy ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko "
    "ku ky la lb lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru "
    "rw sa sdh se si sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo "
    "yue zh zu zxx"
)
LANGUAGES = frozenset(LANGUAGE_CODES.split())
ELLIPSES = ("...", "…")
HEAD_CHARACTERS = 1000  # of a document are enough to identify its language
BULLET_PATTERN = re.compile(r"[•‣▪]|[-*](?:\s|$)")


class Language(Settings):
    """Languages of prose to keep."""

    keep: list[str] = Field(description="ISO 639 codes of the languages to keep", min_length=1)
    min_characters: int = Field(
        default=50, description="Minimum number of characters to identify the language; shorter prose is kept", ge=1
    )
    min_probability: float = Field(
        default=0.9, description="Minimum probability of another language for prose to be rejected", ge=0.5, le=1
    )

    @field_validator("keep")
    @classmethod
    def _validate_keep(cls, keep: list[str]) -> list[str]:
        """Raise ValueError for a code that language identification never returns."""
        unknown = sorted(set(keep) - LANGUAGES)
        if unknown:
            raise ValueError(f"unknown language {', '.join(unknown)}; expected one of {', '.join(sorted(LANGUAGES))}")
        return keep


class Quality(Settings):
    """Bounds of the rules for running text."""

    min_words: int = Field(default=50, description="Minimum number of words of a document", ge=0)
    max_words: int = Field(default=100_000, description="Maximum number of words of a document", ge=1)
    min_words_for_ratios: int = Field(
        default=100, description="Minimum number of words of a document that the rules below apply to", ge=1
    )
    min_mean_word_length: float = Field(
        default=3.0, description="Minimum mean length of a document's words, in characters", ge=0
    )
    max_mean_word_length: float = Field(
        default=10.0, description="Maximum mean length of a document's words, in characters", gt=0
    )
    max_symbol_word_ratio: float = Field(
        default=0.1, description="Maximum number of # or ellipses per word", ge=0, le=1
    )
    max_bullet_lines_ratio: float = Field(
        default=0.9, description="Maximum share of lines that start with a bullet", ge=0, le=1
    )
    max_ellipsis_lines_ratio: float = Field(
        default=0.3, description="Maximum share of lines that end with an ellipsis", ge=0, le=1
    )
    min_alphabetic_words_ratio: float = Field(
        default=0.8, description="Minimum share of words with a letter", ge=0, le=1
    )
    min_stop_words: int = Field(
        default=2, description="Minimum number of different English stop words, of Gopher's eight", ge=0, le=8
    )
    max_duplicate_lines_ratio: float = Field(
        default=0.3, description="Maximum share of lines that repeat an earlier one", ge=0, le=1
    )
    max_top_bigram_ratio: float = Field(
        default=0.2, description="Maximum share of words in the most frequent bigram", ge=0, le=1
    )

    @model_validator(mode="after")
    def _validate_bounds(self) -> "Quality":
        for least, most in (("min_words", "max_words"), ("min_mean_word_length", "max_mean_word_length")):
            if getattr(self, least) > getattr(self, most):
                raise ValueError(f"{least} ({getattr(self, least)}) must not exceed {most} ({getattr(self, most)})")
        return self


@cache
def language_identifier() -> Any:
    """Return py3langid's identifier with the model of the package, which takes half a second to load."""
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_DIR / langid.MODEL_FILE, norm_probs=True)


def language_rejection_reason(text: str, bounds: Language) -> str | None:
    """Return the rejection reason of a document in another language, or None."""
    if len(text) < bounds.min_characters:
        return None
    found, probability = language_identifier().classify(text[: max(HEAD_CHARACTERS, bounds.min_characters)])
    if found in bounds.keep or probability < bounds.min_probability:
        return None
    return f"language: {found}, not {' or '.join(bounds.keep)}"


def quality_rejection_reason(text: str, words: Sequence[str], bounds: Quality) -> str | None:
    """Return the rejection reason for the first rule that a document with these words breaks, or None."""
    if len(words) < bounds.min_words:
        return f"quality: fewer than {bounds.min_words} words"
    if len(words) > bounds.max_words:
        return f"quality: more than {bounds.max_words} words"
    if len(words) < bounds.min_words_for_ratios:
        return None
    return next(_broken_rules(text, words, bounds), None)


def _broken_rules(text: str, words: Sequence[str], bounds: Quality) -> Iterator[str]:
    """Yield a rejection reason for each rule with ratios that a document breaks."""
    shortest, longest = bounds.min_mean_word_length, bounds.max_mean_word_length
    if not shortest <= sum(map(len, words)) / len(words) <= longest:
        yield f"quality: the mean word length is not between {shortest:g} and {longest:g} characters"
    if max(text.count("#"), len(re.findall(r"\.\.\.|…", text))) / len(words) > bounds.max_symbol_word_ratio:
        yield f"quality: more than {bounds.max_symbol_word_ratio:g} # or ellipses a word"
    # The paper counts words by white space here: "2.2*10^6" is one word, not four. Punctuation between spaces is not.
    tokens = [token for token in text.split() if any(map(str.isalnum, token))]
    if sum(any(map(str.isalpha, token)) for token in tokens) / len(tokens) < bounds.min_alphabetic_words_ratio:
        yield f"quality: fewer than {bounds.min_alphabetic_words_ratio:.0%} of the words hold a letter"
    if len(STOP_WORDS.intersection(words)) < bounds.min_stop_words:
        yield f"quality: fewer than {bounds.min_stop_words} stop words"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    yield from _broken_line_rules(lines, bounds) if len(lines) > 1 else ()
    count = max(Counter(pairwise(words)).values(), default=0)
    if count > 1 and 2 * count / len(words) > bounds.max_top_bigram_ratio:
        yield f"quality: one pair of words makes up more than {bounds.max_top_bigram_ratio:.0%} of the words"


def _broken_line_rules(lines: Sequence[str], bounds: Quality) -> Iterator[str]:
    """Yield a rejection reason for each rule on lines that a document of two or more lines breaks."""
    if sum(bool(BULLET_PATTERN.match(line)) for line in lines) / len(lines) > bounds.max_bullet_lines_ratio:
        yield f"quality: more than {bounds.max_bullet_lines_ratio:.0%} of the lines start with a bullet"
    if sum(line.endswith(ELLIPSES) for line in lines) / len(lines) > bounds.max_ellipsis_lines_ratio:
        yield f"quality: more than {bounds.max_ellipsis_lines_ratio:.0%} of the lines end with an ellipsis"
    if 1 - len(set(lines)) / len(lines) > bounds.max_duplicate_lines_ratio:
        yield f"quality: more than {bounds.max_duplicate_lines_ratio:.0%} of the lines repeat an earlier line"
