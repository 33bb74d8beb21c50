"""Pretrain a small decoder (`clm`, next-token prediction) or a small encoder (`mlm`, masked tokens and whole names).

Run as `python -m tasks.pretrain clm` or `python -m tasks.pretrain mlm`. Causal: Radford et al. 2018. Masked: Devlin et
al. 2019, section 3.1 (15 % of tokens, of which 80 % become the mask, 10 % a random token, 10 % stay); beside it whole
names are masked, each token of a name by one mask, so that the encoder learns to name what a sentence is about.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from tasks.common import chat, models, stage
from tasks.common.models import Shape
from tasks.common.settings import Settings
from tasks.common.shards import Ids, Split, Windows
from tasks.common.stage import Job
from tasks.common.training import Losses, Optimizer, summary, train

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

INPUTS = {"tokenizer": "data/tokenize/tokenizer", "shards": "data/tokenize/shards"}
OUTPUTS = {"model": "data/pretrain/{key}/model", "history": "data/pretrain/{key}/history.csv"}

IGNORED = -100


class Config(Settings):
    """Settings of a pretraining run."""

    model: Shape
    window: int = Field(description="Length of a training sequence, in tokens", ge=16, le=2**17)
    batch: int = Field(description="Sequences a step", ge=1, le=2**16)
    steps: int = Field(description="Optimizer steps", ge=1)
    statements: float = Field(description="Share of the sequences that is statements of facts; the rest is prose", ge=0, le=1)
    optimizer: Optimizer


class MaskedConfig(Config):
    """Settings of masked pretraining."""

    mask_tokens: float = Field(description="Share of ordinary tokens to predict", gt=0, lt=1)
    mask_names: float = Field(description="Share of names to mask whole", ge=0, lt=1)


KEYS = {"clm": Config, "mlm": MaskedConfig}


class Mixture:
    """Windows of statements and of prose in a fixed proportion; a batch is a pure function of the step."""

    def __init__(self, split: Split, config: Config, seed: int) -> None:
        self.config = config
        self.counts = {True: round(config.batch * config.statements)}
        self.counts[False] = config.batch - self.counts[True]
        self.streams = {
            kind: Windows(split.select(statements=kind), config.window, seed + kind) for kind, n in self.counts.items() if n
        }

    def batch(self, step: int) -> Ids:
        """Return token ids, shape (batch, window)."""
        return np.concatenate([w.batch(step * self.counts[k], self.counts[k]) for k, w in self.streams.items()])

    def names(self, step: int) -> list[tuple[int, int, int]]:
        """Return (row, start, end) of every name that lies whole in the step's windows."""
        found: list[tuple[int, int, int]] = []
        row = 0
        for kind, windows in self.streams.items():
            spans = windows.split.names
            for at in windows.starts(step * self.counts[kind], self.counts[kind]):
                first, last = np.searchsorted(spans[:, 0], [at, at + windows.length])
                inside = spans[first:last][spans[first:last, 1] <= at + windows.length] - at
                found += [(row, int(start), int(end)) for start, end in inside]
                row += 1
        return found


def run(config: Config, job: Job) -> dict[str, Any]:
    """Train the model of the job's key and return its losses on training and held-out text."""
    device = models.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["tokenizer"])
    train_split, heldout = (Split.open(job.inputs["shards"] / name) for name in ("train", "heldout"))
    build = models.new_decoder if job.key == "clm" else models.new_encoder
    model = build(config.model, tokenizer, tokenizer.model_max_length).to(device)
    mixture = Mixture(train_split, config, job.seed)
    if isinstance(config, MaskedConfig):
        masker = Masker(config, tokenizer.mask_token_id, len(chat.SPECIAL_TOKENS), len(tokenizer), job.seed)
        history = train(model, lambda step: _masked_loss(model, mixture, masker, job, step), config.optimizer, config.steps, job)
        evaluation: dict[str, Any] = {}
    else:
        history = train(model, lambda step: _causal_loss(model, mixture, job, step), config.optimizer, config.steps, job)
        evaluation = {"heldout_loss": round(heldout_loss(model, heldout, config.window, job), 6)}
    models.save(model, tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    return {"parameters": models.parameters(model), "steps": config.steps, **summary(history), **evaluation}


def _causal_loss(model: "PreTrainedModel", mixture: Mixture, job: Job, step: int) -> tuple["torch.Tensor", Losses, int]:
    import torch

    ids = torch.from_numpy(mixture.batch(step)).to(model.device)  # (B, T)
    with models.autocast(job.numerics):
        logits = model(input_ids=ids, use_cache=False).logits  # (B, T, V)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    return loss, {}, ids.numel()


class Masker:
    """Chooses what a step's sequences hide; seeded per step."""

    def __init__(self, config: MaskedConfig, mask: int, special: int, vocabulary: int, seed: int) -> None:
        self.config, self.mask, self.special, self.vocabulary, self.seed = config, mask, special, vocabulary, seed

    def hide(self, ids: Ids, names: list[tuple[int, int, int]], step: int) -> tuple[Ids, Ids]:
        """Return the ids with masks in them and the targets (IGNORED where nothing is asked), both of ids' shape."""
        random = np.random.default_rng([self.seed, step, 1])
        chosen = (random.random(ids.shape) < self.config.mask_tokens) & (ids >= self.special)
        fate = random.random(ids.shape)
        hidden = np.where(chosen & (fate < 0.8), self.mask, ids)
        substitutes = random.integers(self.special, self.vocabulary, ids.shape)
        hidden = np.where(chosen & (fate >= 0.9), substitutes, hidden)
        for (row, start, end), draw in zip(names, random.random(len(names)), strict=True):
            if draw < self.config.mask_names:
                hidden[row, start:end] = self.mask
                chosen[row, start:end] = True
        return hidden, np.where(chosen, ids, IGNORED)


def _masked_loss(
    model: "PreTrainedModel", mixture: Mixture, masker: Masker, job: Job, step: int
) -> tuple["torch.Tensor", Losses, int]:
    import torch

    ids = mixture.batch(step)
    hidden, targets = (torch.from_numpy(array).to(model.device) for array in masker.hide(ids, mixture.names(step), step))
    asked = targets != IGNORED  # (B, T); the vocabulary's logits are computed at these places only
    with models.autocast(job.numerics):
        states = model.model(input_ids=hidden, attention_mask=torch.ones_like(hidden)).last_hidden_state  # (B, T, H)
        logits = model.decoder(model.head(states[asked]))  # (asked, V)
    return torch.nn.functional.cross_entropy(logits.float(), targets[asked]), {}, ids.size


def heldout_loss(model: "PreTrainedModel", split: Split, window: int, job: Job) -> float:
    """Return the mean negative log-likelihood a token (nats) of a causal model on a held-out split, window by window."""
    import torch

    count = len(split.tokens) // window
    ids = torch.from_numpy(split.tokens[: count * window].astype(np.int64)).view(count, window)
    model.eval()
    total = 0.0
    with torch.no_grad():
        for rows in ids.split(32):
            rows = rows.to(model.device)
            logits = model(input_ids=rows).logits
            total += torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return total / max(count * (window - 1), 1)


if __name__ == "__main__":
    stage.main("tasks.pretrain")
