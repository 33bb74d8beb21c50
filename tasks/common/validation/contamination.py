"""Wordings of the evaluation in training text: held-out questions with their answers, quoted in prose or asked again.

Only wordings are looked for, never facts: "The capital of France is Paris." may be read in training although France is
held out of the questions. A run of `ngram` words from a question with its answer is a quotation (GPT-3's rule: Brown et
al. 2020, appendix C, with 13 words); a question, or a question with its answer, that is shorter counts as a whole.
"""

from collections import defaultdict
from collections.abc import Sequence

from pydantic import Field, model_validator

from tasks.common.settings import Settings
from tasks.common.validation.words import words

QUOTED = "evaluation: the wording of a held-out question"
ASKED_AGAIN = "evaluation: the same is asked on the held-out side"


class Evaluation(Settings):
    """How wordings of the evaluation are known again."""

    ngram: int = Field(description="Words in a row that make a quotation of a longer wording", ge=2, le=64)
    fewest_words: int = Field(description="Words of the shortest wording that is looked for", ge=2, le=64)

    @model_validator(mode="after")
    def _fits(self) -> "Evaluation":
        if self.fewest_words > self.ngram:
            raise ValueError(f"fewest_words ({self.fewest_words}) must not exceed ngram ({self.ngram})")
        return self


class Wordings:
    """What held-out conversations say, in pieces of `fewest_words` to `ngram` words, to be found in one pass."""

    def __init__(self, settings: Evaluation) -> None:
        self.settings = settings
        self._pieces: set[str] = set()
        self._lengths: dict[str, set[int]] = defaultdict(set)  # by a piece's first `fewest_words` words

    def add(self, question: str, answer: str) -> None:
        """Add a held-out question and its answer."""
        asked, replied = words(question), words(answer)
        for told in (asked, [*asked, *replied]):
            length = min(len(told), self.settings.ngram)
            if length >= self.settings.fewest_words:
                for start in range(len(told) - length + 1):
                    self._add(told[start : start + length])

    def _add(self, piece: Sequence[str]) -> None:
        self._pieces.add(" ".join(piece))
        self._lengths[" ".join(piece[: self.settings.fewest_words])].add(len(piece))

    def quoted_in(self, told: Sequence[str]) -> bool:
        """Say whether these words hold one of the wordings."""
        fewest = self.settings.fewest_words
        for start in range(len(told) - fewest + 1):
            for length in self._lengths.get(" ".join(told[start : start + fewest]), ()):
                if " ".join(told[start : start + length]) in self._pieces:
                    return True
        return False
