"""Scores from a reward model, for RL training and for the scorecard.

A score is the model's output for a reply, or for the whole conversation, plus the lexicon's rating of the reply's
words. It is on the raters' scale, or a logit if the model was trained on rankings without ratings. The score of a model
with several heads is their mean; their standard deviation measures its uncertainty (Coste et al. 2024, "Reward Model
Ensembles Help Mitigate Overoptimization").
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.common.modelling import head_models, models
from tasks.common.reward.frozen import FrozenBackbone
from tasks.common.reward.lexicon import Lexicon
from tasks.common.settings import Numerics
from tasks.common.text import chat
from tasks.common.text.chat import Exchange, Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LEXICON_FILE = "lexicon.json"
# Fields saved in the model's config.json as bessemer_..., each with its name in folders of earlier versions.
CONFIG_FIELDS = {"scale": "scale", "max_tokens": "max_tokens", "input": "reads", "score_mean_std": "normal"}
NO_NORMALIZATION = (0.0, 1.0)  # mean and standard deviation that leave scores unchanged

RewardInput = Literal["response", "conversation"]


def encode_reply(
    tokenizer: "PreTrainedTokenizerFast", reply: str, max_tokens: int, prompt: Sequence[Message] = ()
) -> list[int]:
    """Return a reward model's input ids for a reply, after its prompt if there is one: at most `max_tokens`.

    The reply begins with a space, so that a word is the same token at its start as within it
    (docs/explanation/alignment.md#encoder-alone). The reply is truncated on the right; then the prompt is truncated on
    the left to the tokens that remain.
    """
    ids = chat.encode_text(tokenizer, f" {reply.lstrip()}")[:max_tokens]
    if not prompt:
        return ids
    prompt_ids = chat.encode_prompt(tokenizer, prompt)
    prompt_ids = prompt_ids[prompt_ids[:1] == ids[:1] :]  # BOS appears once
    room = max_tokens - len(ids)
    return [ids[0], *prompt_ids[max(len(prompt_ids) - room, 0) :], *ids[1:]]


@dataclass(frozen=True)
class Scorer:
    """A reward model with its own tokenizer: it reads text, so the policy may have another vocabulary."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    lexicon: Lexicon  # its rating of the reply is added to the model's output
    scale: Sequence[float] | None  # [low, high] of the raters' scale, to which scores are clipped; None for logits
    max_tokens: int
    input: RewardInput
    numerics: Numerics
    score_mean_std: Sequence[float] = NO_NORMALIZATION  # mean and standard deviation of the training responses' scores
    frozen: FrozenBackbone | None = None  # cached backbone states, if only the head was trained

    @classmethod
    def load(cls, path: Path, numerics: Numerics) -> "Scorer":
        """Load a reward model from an output folder of the stage `reward`."""
        model = head_models.load_scorer(path, numerics, heads=None).eval()
        kept = {name: _read_field(model.config, name, old) for name, old in CONFIG_FIELDS.items()}
        return cls(model, chat.load_tokenizer(path), Lexicon.load(path / LEXICON_FILE), numerics=numerics, **kept)

    def save(self, path: Path) -> None:
        """Save everything that `load` needs: a Transformers folder and the lexicon beside it."""
        for name in CONFIG_FIELDS:
            setattr(self.model.config, f"bessemer_{name}", getattr(self, name))
        models.save(self.model, self.tokenizer, path)
        self.lexicon.save(path / LEXICON_FILE)

    def score(
        self, exchanges: Sequence[Exchange], batch_size: int = 128, *, normalized: bool = False, desc: str | None = None
    ) -> list[float]:
        """Return the predicted rating of each reply to its prompt, shape (N,).

        With `normalized`, scores are shifted and scaled so that the training responses have mean 0 and variance 1.
        `desc` is the title of the progress bar; without it none is shown.
        """
        return self.score_with_std(exchanges, batch_size, normalized=normalized, desc=desc)[0]

    def score_with_std(
        self, exchanges: Sequence[Exchange], batch_size: int = 128, *, normalized: bool = False, desc: str | None = None
    ) -> tuple[list[float], list[float]]:
        """Return each reply's score and the standard deviation of the heads' outputs, in the score's unit.

        Scores are clipped to the raters' scale: the lexicon's sum has no bound, and PPO would exploit it by adding kind
        words.
        """
        import torch

        if not exchanges:
            return [], []
        rows = [
            encode_reply(self.tokenizer, reply, self.max_tokens, prompt if self.input == "conversation" else ())
            for prompt, reply in exchanges
        ]
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            if self.frozen:
                heads = self.frozen.outputs(rows, batch_size, desc)  # (N, heads)
            else:
                heads = head_models.head_outputs(self.model, self.tokenizer, rows, self.numerics, batch_size, desc)
        self.model.train(was_training)
        low, high = self.scale or (-math.inf, math.inf)
        bases = self.lexicon.score([reply for _, reply in exchanges])
        sums = (base + value for base, value in zip(bases, heads.mean(1).tolist(), strict=True))
        mean, deviation = self.score_mean_std if normalized else NO_NORMALIZATION
        scores = [(min(max(value, low), high) - mean) / deviation for value in sums]
        return scores, (heads.std(1, correction=0) / deviation).tolist()


def _read_field(config: Any, name: str, old: str) -> Any:
    field = f"bessemer_{name}"
    return getattr(config, field if hasattr(config, field) else f"bessemer_{old}")
