"""Rules for running text in any language: those of Gopher, and a rule on sentence ends.

The rules and their bounds are those of Rae et al. 2021 (arXiv 2112.11446, appendix A.1.1), which were made for English;
stop words and word length are those of the document's language (`languages.py`). Ratios are meaningless for a few
words, so they apply only to documents of at least `min_words_for_ratios` words. Where a script has no spaces, each
character is a word.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import regex
from pydantic import Field, model_validator

from tasks.common.settings import Settings
from tasks.common.text.words import mostly_unspaced, split_words
from tasks.common.text.words import words as words_of
from tasks.validate.languages import LanguageRules

MIN_LINES = 5  # of a document with few words in which repeated lines count
COLONS = (":", "\uff1a")
MIN_LEAD_IN_WORDS = 5  # of a line that ends with a colon, to count as a clause ("You should do so if:"), not as a label
MIN_LEAD_IN_CHARACTERS = 10  # the same in a script without spaces
ELLIPSES = ("...", "…")
ELLIPSIS_PATTERN = regex.compile(r"\.\.\.|…")
BULLET_PATTERN = regex.compile(r"[•‣▪·・◦●○■□►]|[-*](?:\s|$)")
# The end of a sentence (Unicode's property Sentence_Break) after a word: "1." of a list, "a.b" and "x != y" are none. A
# full stop of a script with spaces ends a sentence only before a space or the end; quotes and brackets may follow it.
SENTENCE_END_PATTERN = regex.compile(
    r"(?<!^\s*\d+)(?<=[\w\p{Close_Punctuation}\p{Quotation_Mark}%°*`]\s?)"
    r"(?:[.!?\uff0e]+[\p{Close_Punctuation}\p{Quotation_Mark}*_`]*(?=\s|$)"
    r"|[\p{Sentence_Break=STerm}--[!?]])",
    regex.V1 | regex.MULTILINE,
)


class Quality(Settings):
    """Bounds of the rules for running text."""

    min_words: int = Field(default=5, description="Minimum number of words of a document", ge=0)
    max_words: int | None = Field(
        default=None, description="Maximum number of words of a document; null sets no limit", ge=1
    )
    max_words_per_sentence: int | None = Field(
        default=150,
        description="Maximum number of words for each sentence end; menus, lists of links and tables have none. null "
        "asks for none. Not applied to languages without sentence ends",
        ge=1,
    )
    min_words_for_ratios: int = Field(
        default=100, description="Minimum number of words of a document that the rules below apply to", ge=1
    )
    min_mean_word_length: float | None = Field(
        default=None,
        description="Minimum mean length of a document's words, in characters; null: as usual in its language",
        ge=0,
    )
    max_mean_word_length: float | None = Field(
        default=None,
        description="Maximum mean length of a document's words, in characters; null: as usual in its language",
        gt=0,
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
        default=2, description="Minimum number of different stop words of the document's language", ge=0, le=8
    )
    max_duplicate_lines_ratio: float = Field(
        default=0.3, description="Maximum share of characters in lines that repeat an earlier one", ge=0, le=1
    )
    max_top_bigram_ratio: float = Field(
        default=0.2, description="Maximum share of words in the most frequent bigram", ge=0, le=1
    )

    @model_validator(mode="after")
    def _validate_bounds(self) -> "Quality":
        for least, most in (("min_words", "max_words"), ("min_mean_word_length", "max_mean_word_length")):
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                raise ValueError(f"{least} ({low}) must not exceed {most} ({high})")
        return self

    def word_length_bounds(self, rules: LanguageRules) -> tuple[float, float] | None:
        """Return the bounds of the mean word length in a language; None if nothing is known of it."""
        low, high = rules.mean_word_length or (0.0, float("inf"))
        own = self.min_mean_word_length, self.max_mean_word_length
        if rules.mean_word_length is None and own == (None, None):
            return None
        return low if own[0] is None else own[0], high if own[1] is None else own[1]


def quality_rejection_reason(text: str, words: Sequence[str], bounds: Quality, rules: LanguageRules) -> str | None:
    """Return the rejection reason for the first rule that a document with these words breaks, or None."""
    if len(words) < bounds.min_words:
        return f"quality: fewer than {bounds.min_words} words"
    if bounds.max_words is not None and len(words) > bounds.max_words:
        return f"quality: more than {bounds.max_words} words"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(words) >= bounds.min_words_for_ratios:
        broken = next(_broken_ratio_rules(text, lines, words, bounds, rules), None)
    else:
        broken = _broken_repetition_rule(lines, bounds) if len(lines) >= MIN_LINES else None
    return broken or _broken_sentence_rule(text, lines, words, bounds, rules)


def _broken_sentence_rule(
    text: str, lines: Sequence[str], words: Sequence[str], bounds: Quality, rules: LanguageRules
) -> str | None:
    limit = bounds.max_words_per_sentence
    if limit is None or not rules.punctuated:
        return None
    ends = sum(1 for _ in SENTENCE_END_PATTERN.finditer(text)) + sum(_is_lead_in(line, rules) for line in lines)
    if not ends:
        return "quality: no sentence end"
    return f"quality: more than {limit} words for each sentence end" if len(words) > limit * ends else None


def _is_lead_in(line: str, rules: LanguageRules) -> bool:
    """Return whether a line is a clause that a list or an example follows; labels and code hold no stop word."""
    if not line.endswith(COLONS):
        return False
    found = words_of(line)
    long_enough = len(found) >= (MIN_LEAD_IN_CHARACTERS if mostly_unspaced(found) else MIN_LEAD_IN_WORDS)
    return long_enough and not (rules.stop_words and rules.stop_words.isdisjoint(found))


def _broken_ratio_rules(
    text: str, lines: Sequence[str], words: Sequence[str], bounds: Quality, rules: LanguageRules
) -> Iterator[str]:
    """Yield a rejection reason for each rule with ratios that a document breaks."""
    length = bounds.word_length_bounds(rules)
    if length and not length[0] <= sum(map(len, words)) / len(words) <= length[1]:
        yield "quality: the mean word length is not between {:g} and {:g} characters".format(*length)
    if max(text.count("#"), len(ELLIPSIS_PATTERN.findall(text))) / len(words) > bounds.max_symbol_word_ratio:
        yield f"quality: more than {bounds.max_symbol_word_ratio:g} # or ellipses a word"
    # The paper counts words by white space here: "2.2*10^6" is one word, not four. Punctuation between spaces is not.
    tokens = [token for token in split_words(text) if any(map(str.isalnum, token))]
    if sum(any(map(str.isalpha, token)) for token in tokens) / len(tokens) < bounds.min_alphabetic_words_ratio:
        yield f"quality: fewer than {bounds.min_alphabetic_words_ratio:.0%} of the words hold a letter"
    if rules.stop_words and len(rules.stop_words.intersection(words)) < bounds.min_stop_words:
        yield f"quality: fewer than {bounds.min_stop_words} stop words"
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
    repeated = _broken_repetition_rule(lines, bounds)
    if repeated:
        yield repeated


def _broken_repetition_rule(lines: Sequence[str], bounds: Quality) -> str | None:
    # Characters, and not lines: the closing brackets of a page's code examples repeat, as do a few headings.
    if 1 - sum(map(len, set(lines))) / sum(map(len, lines)) > bounds.max_duplicate_lines_ratio:
        return f"quality: more than {bounds.max_duplicate_lines_ratio:.0%} of the text repeats earlier lines"
    return None
