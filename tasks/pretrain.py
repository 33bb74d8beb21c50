"""Pretrain a small decoder (`clm`, next-token prediction) or a small encoder (`mlm`, masked tokens and whole names).

Run as `python -m tasks.pretrain clm` or `python -m tasks.pretrain mlm`. Causal: Radford et al. 2018. Masked: Devlin et
al. 2019, section 3.1 (a share of the tokens, of which 80 % become the mask, 10 % a random token, 10 % stay); beside it
one whole name of a text is masked, each of its tokens by one mask, so that the encoder learns to name what is missing.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from tasks.common import chat, models, stage
from tasks.common.models import Shape
from tasks.common.settings import Settings
from tasks.common.shards import Batches, Ids, Mixture, Split
from tasks.common.stage import Job
from tasks.common.training import Losses, Optimizer, summary, train

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {"tokenizer": "data/tokenize/tokenizer", "shards": "data/tokenize/shards"}
OUTPUTS = {"model": "data/pretrain/{key}/model", "history": "data/pretrain/{key}/history.csv"}

IGNORED = -100


class Config(Settings):
    """Settings of a pretraining run."""

    model: Shape
    window: int = Field(description="Length of a training sequence, in tokens", ge=16, le=2**17)
    batch: int = Field(description="Sequences a step; batch x window tokens where whole texts are read", ge=1, le=2**16)
    steps: int = Field(description="Optimizer steps", ge=1)
    statements: float = Field(
        description="Share of the sequences that is statements of facts; the rest is prose", ge=0, le=1
    )
    optimizer: Optimizer


class MaskedConfig(Config):
    """Settings of masked pretraining."""

    mask_tokens: float = Field(description="Share of the tokens outside names to predict", gt=0, lt=1)
    mask_names: float = Field(description="Share of the texts with names that hide one of them, whole", ge=0, lt=1)


KEYS = {"clm": Config, "mlm": MaskedConfig}


def run(config: Config, job: Job) -> dict[str, Any]:
    """Train the model of the job's key and return its losses on training and held-out text."""
    models.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["tokenizer"])
    train_split, heldout = (Split.open(job.inputs["shards"] / name) for name in ("train", "heldout"))
    build = models.new_decoder if job.key == "clm" else models.new_encoder
    model = build(config.model, tokenizer, tokenizer.model_max_length, job.numerics)
    evaluation: dict[str, Any] = {}
    if isinstance(config, MaskedConfig):
        masker = Masker(config, train_split, tokenizer, job.seed)
        history = train(model, lambda step: _masked_loss(model, masker, job, step), config.optimizer, config.steps, job)
    else:
        mixture = Mixture(train_split, config.window, config.batch, config.statements, job.seed)
        history = train(
            model, lambda step: _causal_loss(model, mixture, job, step), config.optimizer, config.steps, job
        )
        evaluation = {"heldout_loss": heldout_loss(model, heldout, config.window)}
    models.save(model, tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    return {"parameters": models.parameters(model), "steps": config.steps, **summary(history), **evaluation}


def _causal_loss(model: "PreTrainedModel", mixture: Mixture, job: Job, step: int) -> tuple["torch.Tensor", Losses, int]:
    import torch

    ids = torch.from_numpy(mixture.batch(step)).to(model.device)  # (B, T)
    with models.autocast(model, job.numerics):
        logits = model(input_ids=ids, use_cache=False).logits  # (B, T, V)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    return loss, {}, ids.numel()


class Masker:
    """Draws a step's documents and chooses what they hide; both are pure functions of the step."""

    def __init__(self, config: MaskedConfig, split: Split, tokenizer: "PreTrainedTokenizerFast", seed: int) -> None:
        self.batches = Batches(split, config.batch * config.window, config.window, config.statements, seed)
        self.config, self.seed, self.vocabulary = config, seed, len(tokenizer)
        self.mask, self.fill, self.special = tokenizer.mask_token_id, tokenizer.pad_token_id, len(chat.SPECIAL_TOKENS)

    def draw(self, step: int) -> tuple[Ids, Ids, Ids]:
        """Return ids with masks in them, attention mask, and targets (IGNORED where nothing is asked), each (B, T)."""
        ids, mask, names = self.batches.read(self.batches.at(step), self.fill)
        random = np.random.default_rng([self.seed, step, 1])
        named = np.zeros(ids.shape, dtype=bool)
        by_row: dict[int, list[tuple[int, int]]] = {}
        for row, start, end in names:
            named[row, start:end] = True
            by_row.setdefault(row, []).append((start, end))
        chosen = (random.random(ids.shape) < self.config.mask_tokens) & (ids >= self.special) & ~named
        fate = random.random(ids.shape)
        hidden = np.where(chosen & (fate < 0.8), self.mask, ids)
        substitutes = random.integers(self.special, self.vocabulary, ids.shape)
        hidden = np.where(chosen & (fate >= 0.9), substitutes, hidden)
        for (row, spans), lot in zip(by_row.items(), random.random((len(by_row), 2)), strict=True):
            if lot[0] < self.config.mask_names:
                start, end = spans[int(lot[1] * len(spans))]
                hidden[row, start:end] = self.mask
                chosen[row, start:end] = True
        chosen[0, 0] |= not chosen.any()  # a step always asks something, so that its loss is a number
        return hidden, mask, np.where(chosen, ids, IGNORED)


def _masked_loss(model: Any, masker: Masker, job: Job, step: int) -> tuple["torch.Tensor", Losses, int]:
    import torch

    hidden, mask, targets = (torch.from_numpy(array).to(model.device) for array in masker.draw(step))
    asked = targets != IGNORED  # (B, T); the vocabulary's logits are computed at these places only
    with models.autocast(model, job.numerics):
        states = model.model(input_ids=hidden, attention_mask=mask).last_hidden_state  # (B, T, H)
        logits = model.decoder(model.head(states[asked]))  # (asked, V)
    return torch.nn.functional.cross_entropy(logits.float(), targets[asked]), {}, int(mask.sum())


def heldout_loss(model: "PreTrainedModel", split: Split, window: int) -> float | None:
    """Return the mean negative log-likelihood a token (nats) of a causal model; None where no window is full."""
    import torch

    count = len(split.tokens) // window
    if not count:
        return None
    ids = torch.from_numpy(split.tokens[: count * window].astype(np.int64)).view(count, window)
    model.eval()
    total = 0.0
    with torch.no_grad():
        for rows in ids.split(32):
            rows = rows.to(model.device)
            logits = model(input_ids=rows).logits
            total += torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            ).item()
    return round(total / (count * (window - 1)), 6)


if __name__ == "__main__":
    stage.main("tasks.pretrain")
