"""What masked pretraining hides: tokens, whole words or spans of a text, and whole names.

Devlin et al. 2019, section 3.1: a share of the tokens is asked for; of those 80 % become the mask, 10 % a random token
and 10 % stay. Words and spans are chosen whole. Spans follow Joshi et al. 2020, "SpanBERT", section 3.1: their lengths,
in words, are geometric with p = 0.2, at most 10, and one span shares one fate.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tasks.common.settings import Settings
from tasks.common.stage import StageError
from tasks.common.text.shards import Ids
from tasks.common.training.losses import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LONGEST_SPAN, SPAN_END = 10, 0.2
Flags = npt.NDArray[np.bool_]


class Masking(Settings):
    """What is hidden of a text outside its names."""

    unit: Literal["token", "word", "span"] = Field(description="What is chosen as a whole")
    share: float = Field(description="Share of the tokens outside names to predict", gt=0, lt=1)
    names: float = Field(description="Share of the texts with names that hide one of them, whole", ge=0, lt=1)


@dataclass(frozen=True)
class Vocabulary:
    """What masking asks of a tokenizer."""

    mask: int
    ordinary: Ids  # the ids that are no special tokens
    special: Flags  # (V,)
    begins: Flags  # (V,) whether a token begins a word, or is a mark of its own

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast") -> "Vocabulary":
        """Read a tokenizer that writes the space before a word into its first token, or `##` into the later ones.

        Raises StageError where it has nothing to put in a hidden token's place.
        """
        if tokenizer.mask_token_id is None:
            raise StageError(
                "masked pretraining hides tokens behind a mask token, which the tokenizer has not (a decoder's own "
                "seldom has one): learn a tokenizer (tokenize.tokenizer.name: train), or do without the encoder and "
                "what is made from it; the decoder's way goes on up to `dvc repro evaluate@int8`."
            )
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        special = np.zeros(len(tokens), dtype=bool)
        special[tokenizer.all_special_ids] = True
        special[list(tokenizer.added_tokens_decoder)] = True
        if any(token.startswith("##") for token in tokens):
            begins = [not token.startswith("##") for token in tokens]
        else:
            begins = [token[:1] in "Ġ▁Ċĉ" or not any(map(str.isalnum, token)) for token in tokens]
        mask: Any = tokenizer.mask_token_id
        return cls(mask, np.flatnonzero(~special), special, np.array(begins) | special)


class Masker:
    """Chooses what a batch hides, by a generator that is given."""

    def __init__(self, masking: Masking, vocabulary: Vocabulary) -> None:
        self.masking, self.vocabulary = masking, vocabulary
        lengths = np.arange(1, LONGEST_SPAN + 1)
        odds = (1 - SPAN_END) ** (lengths - 1) * SPAN_END
        self.lengths, self.odds = lengths, odds / odds.sum()
        self.start = _start_rate(masking.share, 1 - np.cumsum(self.odds) + self.odds)

    def hide(self, ids: Ids, names: list[tuple[int, int, int]], random: np.random.Generator) -> tuple[Ids, Ids]:
        """Return ids with some of them hidden, and targets (IGNORED where nothing is asked), both (B, T).

        `names` holds (row, start, end) of every name. One whole name of a text is hidden, each token by one mask, in
        the share of texts that the settings say; no other token of a name ever is.
        """
        named = np.zeros(ids.shape, dtype=bool)
        by_row: dict[int, list[tuple[int, int]]] = {}
        for row, start, end in names:
            named[row, start:end] = True
            by_row.setdefault(row, []).append((start, end))
        chosen, fate = self._choose(ids, random)
        chosen &= ~self.vocabulary.special[ids] & ~named
        hidden = np.where(chosen & (fate < 0.8), self.vocabulary.mask, ids)
        ordinary = self.vocabulary.ordinary
        substitutes = ordinary[random.integers(len(ordinary), size=ids.shape)]
        hidden = np.where(chosen & (fate >= 0.9), substitutes, hidden)
        for (row, spans), lot in zip(by_row.items(), random.random((len(by_row), 2)), strict=True):
            if lot[0] < self.masking.names:
                start, end = spans[int(lot[1] * len(spans))]
                hidden[row, start:end] = self.vocabulary.mask
                chosen[row, start:end] = True
        chosen[0, 0] |= not chosen.any()  # a step always asks something, so that its loss is a number
        return hidden, np.where(chosen, ids, IGNORED)

    def _choose(self, ids: Ids, random: np.random.Generator) -> tuple[Flags, npt.NDArray[np.float64]]:
        """Return what is asked for, and the lot that decides what becomes of it, both (B, T)."""
        if self.masking.unit == "token":
            chosen = random.random(ids.shape) < self.masking.share
            return chosen, random.random(ids.shape)
        words = self.vocabulary.begins[ids].cumsum(1)  # (B, T) number of the word that a token belongs to
        shape = (len(ids), int(words.max()) + 1)
        if self.masking.unit == "word":
            asked = random.random(shape) < self.masking.share
            return np.take_along_axis(asked, words, 1), random.random(ids.shape)
        before = LONGEST_SPAN - 1  # words in front of a text, where spans may begin that reach into it
        words, shape = words + before, (shape[0], shape[1] + before)
        begun, lots = random.random(shape) < self.start, random.random(shape)
        lengths = random.choice(self.lengths, shape, p=self.odds)
        inside, fate = np.zeros(shape, dtype=bool), np.zeros(shape)
        for back in reversed(range(LONGEST_SPAN)):  # the span that began last has the last word
            reached = (begun & (lengths > back))[:, : shape[1] - back]
            inside[:, back:] |= reached
            fate[:, back:] = np.where(reached, lots[:, : shape[1] - back], fate[:, back:])
        return np.take_along_axis(inside, words, 1), np.take_along_axis(fate, words, 1)


def _start_rate(share: float, longer: npt.NDArray[np.float64]) -> float:
    """Return how often a span must begin at a word so that this share of the words lies in one.

    `longer` holds P(length > k) for k = 0, 1, …: a word is free where none of the words before it began a span that
    reaches it, so that share = 1 − Π (1 − rate × P(length > k)).
    """
    from scipy.optimize import brentq

    return float(brentq(lambda rate: 1 - np.prod(1 - rate * longer) - share, 0.0, 1.0))
