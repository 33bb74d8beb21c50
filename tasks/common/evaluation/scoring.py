"""Scores from a reward model: what PPO learns from and what the sheet's mean reward is.

A score is a model's number for the reply's tokens plus a lexicon's for its words, on the raters' scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.common.modelling import models
from tasks.common.modelling.lexicon import Lexicon
from tasks.common.settings import Numerics
from tasks.common.text import chat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LEXICON = "lexicon.json"


def encode(tokenizer: "PreTrainedTokenizerFast", text: str, longest: int) -> list[int]:
    """Return the ids of a reply as a reward model reads it, cut to `longest`.

    It begins with a space, so that a word is the same token at a reply's start as within it (docs/decisions.md).
    """
    return chat.encode_text(tokenizer, f" {text.lstrip()}")[:longest]


def score_rows(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    rows: Sequence[list[int]],
    numerics: Numerics,
    together: int = chat.TOGETHER,
) -> "torch.Tensor":
    """Return the head's number for each row of token ids, shape (N,), worked out `together` rows at a time."""
    return models.head_outputs(model, tokenizer, rows, numerics, together)[:, 0]


@dataclass(frozen=True)
class Scorer:
    """A reward model with its own tokenizer: it reads text, so the policy may have another vocabulary."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    lexicon: Lexicon  # its rating of the reply's words is a part of the score
    scale: list[float] | None  # the ends of the raters' scale, which no score leaves; None where people only ranked
    max_tokens: int
    numerics: Numerics

    @classmethod
    def load(cls, path: Path, numerics: Numerics) -> "Scorer":
        """Load the reward model of a folder that `reward` left, ready to score."""
        model = models.load_scorer(path, numerics).eval()
        tokenizer = chat.load_tokenizer(path)
        lexicon, settings = Lexicon.load(path / LEXICON), model.config
        return cls(model, tokenizer, lexicon, settings.bessemer_scale, settings.bessemer_max_tokens, numerics)

    def save(self, path: Path) -> None:
        """Save all of it for `load`; the weights are a Transformers folder, whose number the lexicon's is added to."""
        models.save(self.model, self.tokenizer, path)
        self.lexicon.save(path / LEXICON)

    def score(self, texts: Sequence[str], together: int = 128) -> list[float]:
        """Return the rating that people would give each text, as the model predicts it.

        A sum over words has no end of its own: beyond the raters' scale it is cut off, lest PPO count kind words.
        """
        import torch

        if not texts:
            return []
        rows = [encode(self.tokenizer, text, self.max_tokens) for text in texts]
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            scores = score_rows(self.model, self.tokenizer, rows, self.numerics, together)
        self.model.train(was_training)
        low, high = self.scale or (-math.inf, math.inf)
        sums = (base + value for base, value in zip(self.lexicon.score(texts), scores.tolist(), strict=True))
        return [min(max(value, low), high) for value in sums]
