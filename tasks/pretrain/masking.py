"""Masking for masked pretraining: tokens, whole words or spans of a text, and whole names.

Devlin et al. 2019, section 3.1: a share of the tokens is predicted; of those 80 % become the mask token, 10 % a random
token, and 10 % stay. Words and spans are masked whole. Spans follow Joshi et al. 2020, "SpanBERT", section 3.1: their
lengths in words are geometric with p = 0.2, at most 10, and all tokens of a span get the same replacement.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tasks.common.harness.job import StageError
from tasks.common.settings import Settings
from tasks.common.text.shards import Ids
from tasks.common.training.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_SPAN_WORDS, SPAN_END_PROBABILITY = 10, 0.2
Flags = npt.NDArray[np.bool_]


class Masking(Settings):
    """Settings of masking."""

    unit: Literal["token", "word", "span"] = Field(default="token", description="Unit that is masked whole")
    share: float = Field(default=0.15, description="Share of the tokens outside names to predict", gt=0, lt=1)
    names: float = Field(
        default=0.95, description="Share of the texts with names in which one whole name is masked", ge=0, lt=1
    )


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs of a tokenizer with V tokens."""

    mask: int
    ordinary: Ids  # the ids without special tokens
    special: Flags  # (V,)
    word_starts: Flags  # (V,) whether a token begins a word, or is punctuation

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast") -> "Vocabulary":
        """Read a tokenizer that marks word starts by a leading space (Ġ, ▁), or continuations by `##`.

        Raises StageError if the tokenizer has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise StageError(
                "masked pretraining needs a mask token, and the tokenizer has none (decoders' tokenizers rarely do): "
                "train a tokenizer (tokenize.tokenizer.name: train), or remove the entries that start from the encoder "
                "from params.yaml, or run only the stages that do not need it: `bessemer run -s ENTRY`, for example "
                "finetune@chat."
            )
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        special = np.zeros(len(tokens), dtype=bool)
        special[tokenizer.all_special_ids] = True
        special[list(tokenizer.added_tokens_decoder)] = True
        if any(token.startswith("##") for token in tokens):
            word_starts = [not token.startswith("##") for token in tokens]
        else:
            word_starts = [token[:1] in "Ġ▁Ċĉ" or not any(map(str.isalnum, token)) for token in tokens]
        mask: Any = tokenizer.mask_token_id
        return cls(mask, np.flatnonzero(~special), special, np.array(word_starts) | special)


class Masker:
    """Masks batches of token ids, with a given random generator."""

    def __init__(self, masking: Masking, vocabulary: Vocabulary) -> None:
        self.masking, self.vocabulary = masking, vocabulary
        lengths = np.arange(1, MAX_SPAN_WORDS + 1)
        odds = (1 - SPAN_END_PROBABILITY) ** (lengths - 1) * SPAN_END_PROBABILITY
        self.lengths, self.length_probabilities = lengths, odds / odds.sum()
        self.start_rate = _start_rate(
            masking.share, 1 - np.cumsum(self.length_probabilities) + self.length_probabilities
        )

    def mask_batch(self, ids: Ids, names: list[tuple[int, int, int]], random: np.random.Generator) -> tuple[Ids, Ids]:
        """Return masked ids, and targets (IGNORE_INDEX where nothing is predicted), both (B, T).

        `names` holds (row, start, end) of every name. In a share `masking.names` of the texts with names, one whole
        name is masked, with one mask token per token; the tokens of other names are never masked.
        """
        is_name = np.zeros(ids.shape, dtype=bool)
        by_row: dict[int, list[tuple[int, int]]] = {}
        for row, start, end in names:
            is_name[row, start:end] = True
            by_row.setdefault(row, []).append((start, end))
        chosen, replacement_draw = self._choose(ids, random)
        chosen &= ~self.vocabulary.special[ids] & ~is_name
        masked_ids = np.where(chosen & (replacement_draw < 0.8), self.vocabulary.mask, ids)
        ordinary = self.vocabulary.ordinary
        substitutes = ordinary[random.integers(len(ordinary), size=ids.shape)]
        masked_ids = np.where(chosen & (replacement_draw >= 0.9), substitutes, masked_ids)
        for (row, spans), draw in zip(by_row.items(), random.random((len(by_row), 2)), strict=True):
            if draw[0] < self.masking.names:
                start, end = spans[int(draw[1] * len(spans))]
                masked_ids[row, start:end] = self.vocabulary.mask
                chosen[row, start:end] = True
        chosen[0, 0] |= not chosen.any()  # at least one target, so that the mean loss is not NaN
        return masked_ids, np.where(chosen, ids, IGNORE_INDEX)

    def _choose(self, ids: Ids, random: np.random.Generator) -> tuple[Flags, npt.NDArray[np.float64]]:
        """Return which tokens are predicted, and a uniform number that selects their replacement, both (B, T)."""
        if self.masking.unit == "token":
            chosen = random.random(ids.shape) < self.masking.share
            return chosen, random.random(ids.shape)
        words = self.vocabulary.word_starts[ids].cumsum(1)  # (B, T) index of the token's word
        shape = (len(ids), int(words.max()) + 1)
        if self.masking.unit == "word":
            chosen_words = random.random(shape) < self.masking.share
            return np.take_along_axis(chosen_words, words, 1), random.random(ids.shape)
        before = MAX_SPAN_WORDS - 1  # virtual words before a text, at which spans that reach into it may begin
        words, shape = words + before, (shape[0], shape[1] + before)
        span_starts, draws = random.random(shape) < self.start_rate, random.random(shape)
        lengths = random.choice(self.lengths, shape, p=self.length_probabilities)
        inside, replacement_draw = np.zeros(shape, dtype=bool), np.zeros(shape)
        for back in reversed(range(MAX_SPAN_WORDS)):  # the span that begins last overrides the earlier ones
            reached = (span_starts & (lengths > back))[:, : shape[1] - back]
            inside[:, back:] |= reached
            replacement_draw[:, back:] = np.where(reached, draws[:, : shape[1] - back], replacement_draw[:, back:])
        return np.take_along_axis(inside, words, 1), np.take_along_axis(replacement_draw, words, 1)


def _start_rate(share: float, longer: npt.NDArray[np.float64]) -> float:
    """Return the probability that a span begins at a word such that `share` of the words lie in a span.

    `longer` holds P(length > k) for k = 0, 1, …: a word is outside all spans if no span that began k words before
    reaches it, so share = 1 − Π (1 − rate × P(length > k)).
    """
    from scipy.optimize import brentq

    return float(brentq(lambda rate: 1 - np.prod(1 - rate * longer) - share, 0.0, 1.0))
