"""Filters of single documents: their language, and the rules of Gopher's table A1 for what is running text.

The rules and their bounds are those of Rae et al. 2021 (arXiv 2112.11446, appendix A.1.1). Shares say nothing about a
few words, so they are asked of documents of some length alone.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import Field, field_validator

from tasks.common.settings import Settings

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})  # Gopher's eight
# What py3langid knows (a test compares them): named here, because its model takes half a second to load.
NAMED = (
    "ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr "
    "fuv fy ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko "
    "ku ky la lb lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru "
    "rw sa sdh se si sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo "
    "yue zh zu zxx"
)
LANGUAGES = frozenset(NAMED.split())
ELLIPSES = ("...", "…")
HEAD_CHARACTERS = 1000  # of a document are enough to tell its language
BULLET = re.compile(r"[•‣▪]|[-*](?:\s|$)")


class Language(Settings):
    """Which languages prose is in."""

    keep: list[str] = Field(description="ISO 639 codes of the languages to keep", min_length=1)
    characters: int = Field(description="Fewest characters that tell a language; shorter prose is kept", ge=1)
    probability: float = Field(description="How sure another language must be for prose to be refused", ge=0.5, le=1)

    @field_validator("keep")
    @classmethod
    def _known(cls, keep: list[str]) -> list[str]:
        """Refuse a code that no text could ever be found to be in."""
        odd = sorted(set(keep) - LANGUAGES)
        if odd:
            raise ValueError(f"no language is known as {', '.join(odd)}; there are {', '.join(sorted(LANGUAGES))}")
        return keep


class Quality(Settings):
    """Bounds of the rules on running text; the comments in `params.yaml` name the paper's."""

    words: list[int] = Field(description="Fewest and most words of a document", min_length=2, max_length=2)
    word_length: list[float] = Field(description="Least and greatest mean length of words", min_length=2, max_length=2)
    shares_from: int = Field(description="Words from which on a document is asked about shares", ge=1)
    symbols: float = Field(description="Most # or ellipses for each word", ge=0, le=1)
    bullets: float = Field(description="Largest share of lines that start with a bullet", ge=0, le=1)
    ellipses: float = Field(description="Largest share of lines that end with an ellipsis", ge=0, le=1)
    alphabetic: float = Field(description="Smallest share of words with a letter", ge=0, le=1)
    stop_words: int = Field(description="Fewest different English stop words, of Gopher's eight", ge=0, le=8)
    repeated_lines: float = Field(description="Largest share of lines that came before in the document", ge=0, le=1)
    repeated_pair: float = Field(description="Largest share of words in the most frequent pair of words", ge=0, le=1)

    @field_validator("words", "word_length")
    @classmethod
    def _rises(cls, bounds: list[Any]) -> list[Any]:
        if not 0 <= bounds[0] <= bounds[1]:
            raise ValueError(f"the two bounds must rise from 0 or more, unlike {bounds}")
        return bounds


@cache
def identifier() -> Any:
    """Return py3langid's identifier, whose model comes with the package; it takes half a second to load."""
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_DIR / langid.MODEL_FILE, norm_probs=True)


def language_objection(text: str, bounds: Language) -> str | None:
    """Return which other language a document is in, or None."""
    if len(text) < bounds.characters:
        return None
    found, probability = identifier().classify(text[: max(HEAD_CHARACTERS, bounds.characters)])
    if found in bounds.keep or probability < bounds.probability:
        return None
    return f"language: {found}, not {' or '.join(bounds.keep)}"


def quality_objection(text: str, words: Sequence[str], bounds: Quality) -> str | None:
    """Return the first rule that a document with these words breaks, or None."""
    fewest, most = bounds.words
    if len(words) < fewest:
        return f"quality: fewer than {fewest} words"
    if len(words) > most:
        return f"quality: more than {most} words"
    if len(words) < bounds.shares_from:
        return None
    return next(_broken(text, words, bounds), None)


def _broken(text: str, words: Sequence[str], bounds: Quality) -> Iterator[str]:
    """Yield the rules that a document of some length breaks."""
    least, greatest = bounds.word_length
    if not least <= sum(map(len, words)) / len(words) <= greatest:
        yield f"quality: the mean word has not {least:g} to {greatest:g} characters"
    if max(text.count("#"), len(re.findall(r"\.\.\.|…", text))) / len(words) > bounds.symbols:
        yield f"quality: more than {bounds.symbols:g} # or ellipses a word"
    # As the paper counts words here: "2.2*10^6" is one, not four. Marks between spaces are none.
    pieces = [piece for piece in text.split() if any(sign.isalnum() for sign in piece)]
    if sum(any(sign.isalpha() for sign in piece) for piece in pieces) / len(pieces) < bounds.alphabetic:
        yield f"quality: fewer than {bounds.alphabetic:.0%} of the words hold a letter"
    if len(STOP_WORDS.intersection(words)) < bounds.stop_words:
        yield f"quality: fewer than {bounds.stop_words} stop words"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    yield from _broken_by_lines(lines, bounds) if len(lines) > 1 else ()
    times = max(Counter(pairwise(words)).values(), default=0)
    if times > 1 and 2 * times / len(words) > bounds.repeated_pair:
        yield f"quality: one pair of words makes up more than {bounds.repeated_pair:.0%} of the words"


def _broken_by_lines(lines: Sequence[str], bounds: Quality) -> Iterator[str]:
    """Yield the rules on lines that a document of several breaks."""
    if sum(bool(BULLET.match(line)) for line in lines) / len(lines) > bounds.bullets:
        yield f"quality: more than {bounds.bullets:.0%} of the lines start with a bullet"
    if sum(line.endswith(ELLIPSES) for line in lines) / len(lines) > bounds.ellipses:
        yield f"quality: more than {bounds.ellipses:.0%} of the lines end with an ellipsis"
    if 1 - len(set(lines)) / len(lines) > bounds.repeated_lines:
        yield f"quality: more than {bounds.repeated_lines:.0%} of the lines came before"
