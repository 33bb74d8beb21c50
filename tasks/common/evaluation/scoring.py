"""Scores from a reward model: what PPO learns from and what the sheet's mean reward is.

A score is a model's number for the tokens of a reply, or of the whole conversation, plus a lexicon's for the reply's
words, on the raters' scale (a logit, where it is orders that were learnt from). A model of several heads has as many
numbers: their mean is its score, and how far they lie apart tells where it knows little (Coste et al. 2024, "Reward
Model Ensembles Help Mitigate Overoptimization").
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tasks.common.modelling import models
from tasks.common.modelling.frozen import Frozen
from tasks.common.modelling.lexicon import Lexicon
from tasks.common.settings import Numerics
from tasks.common.text import chat
from tasks.common.text.chat import Exchange, Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LEXICON = "lexicon.json"
KEPT = ("scale", "max_tokens", "reads", "normal")  # in the model's config.json, as bessemer_...
AS_RATED = (0.0, 1.0)  # mean and standard deviation of which normalising changes nothing

Reads = Literal["response", "conversation"]


def encode(tokenizer: "PreTrainedTokenizerFast", reply: str, longest: int, prompt: Sequence[Message] = ()) -> list[int]:
    """Return the ids of a reply, after a prompt where there is one, as a reward model reads it: at most `longest`.

    A reply begins with a space, so that a word is the same token at its start as within it (docs/decisions.md). Of what
    is too long the reply keeps its beginning, and the prompt, in the room that is left, its end.
    """
    ids = chat.encode_text(tokenizer, f" {reply.lstrip()}")[:longest]
    if not prompt:
        return ids
    before = chat.encode_prompt(tokenizer, prompt)
    asked = before[before[:1] == ids[:1] :]  # the start token stands once
    room = longest - len(ids)
    return [ids[0], *asked[max(len(asked) - room, 0) :], *ids[1:]]


@dataclass(frozen=True)
class Scorer:
    """A reward model with its own tokenizer: it reads text, so the policy may have another vocabulary."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    lexicon: Lexicon  # its rating of the reply's words is a part of the score
    scale: Sequence[float] | None  # the ends of the raters' scale, which no score leaves; None: scores are logits
    max_tokens: int
    reads: Reads
    numerics: Numerics
    normal: Sequence[float] = AS_RATED  # mean and standard deviation of the scores of the training responses
    frozen: Frozen | None = None  # what the model is known to make of texts, where only its head was trained

    @classmethod
    def load(cls, path: Path, numerics: Numerics) -> "Scorer":
        """Load the reward model of a folder that `reward` left, ready to score."""
        model = models.load_scorer(path, numerics, heads=None).eval()
        kept = {name: getattr(model.config, f"bessemer_{name}") for name in KEPT}
        return cls(model, chat.load_tokenizer(path), Lexicon.load(path / LEXICON), numerics=numerics, **kept)

    def save(self, path: Path) -> None:
        """Save all of it for `load`; the weights are a Transformers folder, whose number the lexicon's is added to."""
        for name in KEPT:
            setattr(self.model.config, f"bessemer_{name}", getattr(self, name))
        models.save(self.model, self.tokenizer, path)
        self.lexicon.save(path / LEXICON)

    def score(self, exchanges: Sequence[Exchange], together: int = 128, *, normalised: bool = False) -> list[float]:
        """Return the rating that people would give each reply to its prompt, as the model predicts it.

        Normalised, the scores of the training responses have mean 0 and variance 1, whatever scale people rated on.
        """
        return self.judge(exchanges, together, normalised=normalised)[0]

    def judge(
        self, exchanges: Sequence[Exchange], together: int = 128, *, normalised: bool = False
    ) -> tuple[list[float], list[float]]:
        """Return each reply's score, and the standard deviation of the heads' numbers for it, in the score's unit.

        A sum over words has no end of its own: beyond the raters' scale it is cut off, lest PPO count kind words.
        """
        import torch

        if not exchanges:
            return [], []
        rows = [
            encode(self.tokenizer, reply, self.max_tokens, prompt if self.reads == "conversation" else ())
            for prompt, reply in exchanges
        ]
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            if self.frozen:
                heads = self.frozen.outputs(rows, together)  # (N, heads)
            else:
                heads = models.head_outputs(self.model, self.tokenizer, rows, self.numerics, together)
        self.model.train(was_training)
        low, high = self.scale or (-math.inf, math.inf)
        bases = self.lexicon.score([reply for _, reply in exchanges])
        sums = (base + value for base, value in zip(bases, heads.mean(1).tolist(), strict=True))
        mean, deviation = self.normal if normalised else AS_RATED
        scores = [(min(max(value, low), high) - mean) / deviation for value in sums]
        return scores, (heads.std(1, correction=0) / deviation).tolist()
