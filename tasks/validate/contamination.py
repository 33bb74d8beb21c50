"""Decontamination: held-out questions with their answers, quoted in prose or asked again in the training split.

Only wordings count, never facts: "The capital of France is Paris." may be in the training text although the questions
about France are held out. `ngram` consecutive words of a question with its answer are a quotation (the rule of GPT-3:
Brown et al. 2020, appendix C, with 13 words). A shorter question, or a shorter question with its answer, counts as a
whole. A word of Chinese or Japanese has about two characters, and `words` gives characters, so both numbers double for
wordings in scripts without spaces.
"""

from collections import defaultdict
from collections.abc import Sequence

from pydantic import Field, model_validator

from tasks.common.settings import Settings
from tasks.common.text.words import mostly_unspaced, words

CHARACTERS_PER_WORD = 2  # in scripts without spaces
QUOTED_REASON = "evaluation: the wording of a held-out question"
REPEATED_PROMPT_REASON = "evaluation: the same prompt is in the held-out split"


class Evaluation(Settings):
    """How wordings of the evaluation are recognized in training text."""

    ngram: int = Field(
        default=13, description="Consecutive words that make a quotation of a longer wording", ge=2, le=64
    )
    min_words: int = Field(default=5, description="Words of the shortest wording that is searched for", ge=2, le=64)

    @model_validator(mode="after")
    def _check_lengths(self) -> "Evaluation":
        if self.min_words > self.ngram:
            raise ValueError(f"min_words ({self.min_words}) must not exceed ngram ({self.ngram})")
        return self


class HeldoutNgrams:
    """The n-grams of held-out conversations, of `min_words` to `ngram` words, searched for in one pass over a text."""

    def __init__(self, settings: Evaluation) -> None:
        self.settings = settings
        self._ngrams: set[str] = set()
        self._lengths: dict[str, set[int]] = defaultdict(set)  # by the first `min_words` words of an n-gram

    def add(self, question: str, answer: str) -> None:
        """Add a held-out question and its answer."""
        question_words = words(question)
        for wording in (question_words, [*question_words, *words(answer)]):
            characters = CHARACTERS_PER_WORD if mostly_unspaced(wording) else 1
            length = min(len(wording), self.settings.ngram * characters)
            if length >= self.settings.min_words * characters:
                for start in range(len(wording) - length + 1):
                    self._add_ngram(wording[start : start + length])

    def _add_ngram(self, ngram: Sequence[str]) -> None:
        self._ngrams.add(" ".join(ngram))
        self._lengths[" ".join(ngram[: self.settings.min_words])].add(len(ngram))

    def occur_in(self, text_words: Sequence[str]) -> bool:
        """Return whether one of the n-grams is among these words."""
        shortest = self.settings.min_words
        for start in range(len(text_words) - shortest + 1):
            for length in self._lengths.get(" ".join(text_words[start : start + shortest]), ()):
                if " ".join(text_words[start : start + length]) in self._ngrams:
                    return True
        return False
