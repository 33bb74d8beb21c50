"""Scores from a reward model: what PPO learns from and what the sheet's mean reward is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.common import chat, models
from tasks.common.settings import Numerics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def encode(tokenizer: "PreTrainedTokenizerFast", text: str, longest: int) -> list[int]:
    """Return the ids of a reply as a reward model reads it, cut to `longest`.

    It begins with a space, so that a word is the same token at a reply's start as within it (docs/decisions.md).
    """
    return chat.encode_text(tokenizer, f" {text.lstrip()}")[:longest]


@dataclass(frozen=True)
class Scorer:
    """A reward model with its own tokenizer: it reads text, so the policy may have another vocabulary."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    max_tokens: int
    numerics: Numerics

    @classmethod
    def load(cls, path: Path, numerics: Numerics) -> "Scorer":
        """Load the reward model of a folder that `reward` left, ready to score."""
        model = models.load_scorer(path, numerics).eval()
        tokenizer = chat.load_tokenizer(path)
        return cls(model, tokenizer, model.config.bessemer_max_tokens, numerics)

    def score(self, texts: Sequence[str], batch: int = 128) -> list[float]:
        """Return the rating that people would give each text, as the model predicts it, on the raters' scale."""
        import torch

        encoded = [encode(self.tokenizer, text, self.max_tokens) for text in texts]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores = [0.0] * len(encoded)
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), models.autocast(self.model, self.numerics):
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                rows = [encoded[i] for i in chosen]
                ids = torch.tensor(chat.pad(rows, self.tokenizer.pad_token_id), device=self.model.device)
                mask = torch.tensor(chat.pad([[1] * len(row) for row in rows], 0), device=self.model.device)
                logits = self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
                for i, value in zip(chosen, logits.tolist(), strict=True):
                    scores[i] = value + self.model.config.bessemer_reward_offset
        self.model.train(was_training)
        return scores
