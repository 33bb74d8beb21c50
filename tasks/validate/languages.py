"""Languages of documents: how they are identified, and what is usual in each of them.

A language is declared for a source, or identified by py3langid from five passages of a document. Rules that depend on
the language (stop words, word length) apply only where the language is known and listed here; sentence ends are those
of Unicode for all scripts. Languages of one macrolanguage of ISO 639-3 count as one: a page in standard Chinese may be
taken for Wu.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import Field, field_validator

from tasks.common.settings import Settings

# The languages of py3langid (a test compares them), listed here because its model takes half a second to load.
LANGUAGE_CODES = (
    "ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr "
    "fuv fy ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko "
    "ku ky la lb lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru "
    "rw sa sdh se si sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo "
    "yue zh zu zxx"
)
LANGUAGES = frozenset(LANGUAGE_CODES.split())
UNDETERMINED = "und"  # ISO 639-2
# The languages above that ISO 639-3 puts into one macrolanguage; the first of each stands for all.
MACROLANGUAGES = ("ar ary arz", "hr bs sr", "id ms", "ku sdh", "lv ltg", "no nn", "uz uzs", "zh yue wuu")
MACROLANGUAGE = {code: group.split()[0] for group in MACROLANGUAGES for code in group.split()}
MIN_CHARACTERS, MIN_PROBABILITY = 50, 0.9  # with which a language counts as identified
PASSAGES, PASSAGE_CHARACTERS = 5, 200  # of a document: its beginning alone may be a licence, a heading or code

# Function words from the stop lists of Snowball (snowballstem.org; da de en es fi fr hu id it nl no pt ru sv) and of
# stopwords-iso (github.com/stopwords-iso; all others, Ukrainian from spaCy). Those of English are Gopher's eight.
STOP_WORDS = {
    "ar": "في من على إلى أن عن هذا هذه التي الذي ما لا كان مع أو و",
    "bg": "и на в за от се да са не с по като",
    "ca": "de la el i que a en per els un amb les",
    "cs": "a se v na je že o s z do i to pro za by",
    "da": "og i at det en den til er som på de med for af ikke et",
    "de": "der die das und in den von zu mit ist im nicht sich des dem ein eine auf für als",
    "el": "και το να του η της με που την από για στο",
    "en": "the be to of and that have with",
    "es": "de la que el en y a los se del las un por con no una su para es",
    "fa": "و در به از که این را با است برای آن یک",
    "fi": "ja on ei että se hän oli ovat joka mutta kun tai kuin niin",
    "fr": "de la le et les des en un du une que est pour qui dans par sur au ne pas",
    "he": "של את על לא זה עם הוא כי גם או אל כל היא",
    "hi": "के का की में है और को से पर यह ने कि एक हैं नहीं",
    "hu": "a az és hogy nem is egy ez volt meg de csak",
    "id": "yang dan di dengan untuk dari ini dalam tidak pada adalah itu ke",
    "it": "di e che la il un a per in è non una con si del della le",
    "ja": "の に は を た が で て と し れ さ も",
    "nl": "de en van ik het een in dat is te op die niet met voor zijn aan",
    "no": "og i det på er en til som av for med at den ikke de et",
    "pl": "w i na z do się nie że to o jest od po przez jak",
    "pt": "de a o que e do em um para com não uma os no se na por",
    "ro": "de în la a cu pe nu o să din care pentru ce mai",
    "ru": "и в не на что с по как к он за из это но от то все о для",
    "sk": "a v na sa je že o s z do i to pre za by",
    "sl": "in je v na se da za so ki z pri kot ne",
    "sv": "och i att det en som på är av för med den till inte de ett om",
    "tr": "ve bir bu için ile de da olarak çok daha gibi ama olan",
    "uk": "і в не на що з у як до це та від за для по",
    "vi": "và của là có không các trong được cho một với những để này",
    "zh": "的 是 在 了 和 有 不 一 与 为 这 以 也 他 我 及 等 之 或 对 从 到 可 将 其 于 但 被",
}
UNSPACED = frozenset({"ja", "km", "lo", "my", "th", "zh"})  # a word is a character there, so its length says nothing
UNPUNCTUATED = frozenset({"lo", "th"})  # sentences end with a space there
GOPHER_WORD_LENGTH = (3.0, 10.0)
# Mean word length, in characters, where Gopher's bounds do not fit: Hangul and vowel signs take less room, Vietnamese
# writes syllables, and agglutinative words are long.
WORD_LENGTHS = {
    "ar": (2.5, 10.0), "fa": (2.0, 10.0), "he": (2.0, 10.0), "hi": (2.0, 10.0), "ko": (1.5, 8.0), "vi": (2.0, 8.0),
    "fi": (3.0, 14.0), "hu": (3.0, 14.0), "tr": (3.0, 14.0),
}  # fmt: skip


@dataclass(frozen=True)
class LanguageRules:
    """What is usual in a language; None and an empty set for what is not known of it."""

    stop_words: frozenset[str] = frozenset()
    mean_word_length: tuple[float, float] | None = None
    punctuated: bool = True

    def describe(self) -> str:
        """Return the rules as a phrase for the report."""
        parts = [f"{len(self.stop_words)} stop words"] if self.stop_words else []
        if self.mean_word_length:
            parts.append("mean word length {:g} to {:g}".format(*self.mean_word_length))
        parts += ["sentence ends"] if self.punctuated else []
        return ", ".join(parts) or "only rules that fit every script"


NEUTRAL_RULES = LanguageRules()


@cache
def rules_of(language: str) -> LanguageRules:
    """Return the rules of a language; of one without rules of its own, those that fit every script."""
    language = MACROLANGUAGE.get(language, language)
    punctuated = language not in UNPUNCTUATED
    if language not in STOP_WORDS and language not in WORD_LENGTHS:
        return LanguageRules(punctuated=punctuated)
    length = None if language in UNSPACED else WORD_LENGTHS.get(language, GOPHER_WORD_LENGTH)
    return LanguageRules(frozenset(STOP_WORDS.get(language, "").split()), length, punctuated)


def check_codes(codes: Collection[str]) -> None:
    """Raise ValueError for a code that language identification never returns."""
    unknown = sorted(set(codes) - LANGUAGES)
    if unknown:
        raise ValueError(f"unknown language {', '.join(unknown)}; expected one of {', '.join(sorted(LANGUAGES))}")


class Language(Settings):
    """Languages of prose to keep."""

    keep: list[str] = Field(description="ISO 639 codes of the languages to keep", min_length=1)
    min_characters: int = Field(
        default=MIN_CHARACTERS,
        description="Minimum number of characters to identify the language; shorter prose is kept",
        ge=1,
    )
    min_probability: float = Field(
        default=MIN_PROBABILITY,
        description="Minimum probability of another language for prose to be rejected",
        ge=0.5,
        le=1,
    )

    @field_validator("keep")
    @classmethod
    def _validate_keep(cls, keep: list[str]) -> list[str]:
        check_codes(keep)
        return keep


@cache
def language_identifier() -> Any:
    """Return py3langid's identifier with the model of the package, which takes half a second to load."""
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_DIR / langid.MODEL_FILE, norm_probs=True)


def sample_passages(text: str) -> str:
    """Return up to five passages of a text, from its beginning to its end at equal distances."""
    room = len(text) - PASSAGE_CHARACTERS
    if len(text) <= PASSAGES * PASSAGE_CHARACTERS:
        return text
    starts = (room * number // (PASSAGES - 1) for number in range(PASSAGES))
    return "\n".join(text[start : start + PASSAGE_CHARACTERS] for start in starts)


def is_same(language: str, other: str) -> bool:
    """Return whether two codes are of one language or macrolanguage."""
    return MACROLANGUAGE.get(language, language) == MACROLANGUAGE.get(other, other)


def find_language(text: str, declared: str | None, bounds: Language | None) -> tuple[str | None, str | None]:
    """Return the language of a document (None if it is not known), and its rejection reason or None.

    A declared language is believed. Prose that may be in a language to be kept counts as that language.
    """
    if declared is not None:
        found, probability = declared, 1.0
    elif len(text) < (bounds.min_characters if bounds else MIN_CHARACTERS):
        found, probability = None, 0.0
    else:
        found, probability = language_identifier().classify(sample_passages(text))
    if bounds is None:
        return (found if probability >= MIN_PROBABILITY else None), None
    kept = [code for code in bounds.keep if found and is_same(code, found)]
    if kept:
        return kept[0], None
    if found and probability >= bounds.min_probability:
        return found, f"language: {found}, not {' or '.join(bounds.keep)}"
    return (bounds.keep[0] if len(bounds.keep) == 1 else None), None
