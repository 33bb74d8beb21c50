"""Pretrain a decoder (next-token prediction) or an encoder (masked tokens and whole names).

Run as `python -m tasks.pretrain ENTRY`; the entry's `objective` selects one. Training starts from random weights, or
from a given model (`tasks/pretrain/pretrained.py`). Causal: Radford et al. 2018. Masked: Devlin et al. 2019, with the
masking of `tasks/pretrain/masking.py`, which also masks whole names, so that the encoder learns to predict a missing
name.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from tasks.common.evaluation.nll import TokenRows, bits_per_byte, model_nll, text_windows, windows_nll
from tasks.common.harness.job import Job
from tasks.common.harness.launch import rank
from tasks.common.modelling import models, torch_setup
from tasks.common.random_streams import Stream, generator
from tasks.common.text import chat
from tasks.common.text.mixtures import DocumentBatches, Mixture, Weights
from tasks.common.text.shards import Ids, Split
from tasks.common.training import losses
from tasks.common.training.flops import MfuEstimator
from tasks.common.training.loop import FULL_BATCH, MicroBatch, Shard, Training, last_losses, train
from tasks.common.training.losses import IGNORE_INDEX, Loss
from tasks.pretrain import pretrained
from tasks.pretrain.masking import Masker, Masking, Vocabulary
from tasks.pretrain.pretrained import From, New

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {
    "tokenizer": "data/tokenize/tokenizer",
    "shards": "data/tokenize/shards",
    "start": "{config.model.path}",  # the tokenizer, or the model that training continues from
}
OUTPUTS = {"model": "data/pretrain/{key}/model", "history": "data/pretrain/{key}/history.csv"}
PARALLEL = True


class Pretraining(Training):
    """Settings of both objectives."""

    window: int = Field(
        description="Length of a training sequence (tokens); masked: longer texts are truncated",
        ge=16, le=2**17,
    )  # fmt: skip
    batch: int = Field(description="Sequences per step; masked: batch x window tokens per step", ge=1, le=2**16)
    mixture: Weights
    model: Annotated[New | From, Field(discriminator="name", description="Initial model")]
    loss: Loss = Loss()


class CausalConfig(Pretraining):
    """Settings of causal pretraining."""

    objective: Literal["causal"] = Field(description="Training objective")


class MaskedConfig(Pretraining):
    """Settings of masked pretraining."""

    objective: Literal["masked"] = Field(description="Training objective")
    masking: Masking = Masking()


Config = Annotated[CausalConfig | MaskedConfig, Field(discriminator="objective")]


def run(config: CausalConfig | MaskedConfig, job: Job) -> dict[str, Any]:
    """Train the entry's model and return its losses on training and held-out text."""
    torch_setup.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["tokenizer"])
    train_split, heldout = (Split.open(job.inputs["shards"] / name) for name in ("train", "heldout"))
    evaluation: dict[str, Any] = {}
    if isinstance(config, MaskedConfig):
        vocabulary = Vocabulary.of(tokenizer)
        model = load_start_model(config, tokenizer, job)
        masked = MaskedObjective(config, job, model, train_split, vocabulary, tokenizer.pad_token_id)
        first_batch = masked.draw(0, FULL_BATCH)
        mfu_estimator = MfuEstimator.for_model(
            model, config.window, job.numerics, head_share=first_batch.target_counts["masked"] / first_batch.tokens
        )
        model, history = train(model, masked, config, job, mfu_estimator)
        evaluation = dict(masked.batches.document_counts)
    else:
        model = load_start_model(config, tokenizer, job)
        mfu_estimator = MfuEstimator.for_model(model, config.window, job.numerics)
        model, history = train(model, CausalObjective(config, job, model, train_split), config, job, mfu_estimator)
        evaluation = heldout_figures(model, heldout, config.window, None if rank() else f"{job.name} held-out text")
    models.save(model, tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    return {"parameters": models.parameter_count(model), "steps": config.steps, **last_losses(history), **evaluation}


def load_start_model(
    config: CausalConfig | MaskedConfig, tokenizer: "PreTrainedTokenizerFast", job: Job
) -> "PreTrainedModel":
    """Return the model to train: a new one of the configured shape, or the given model."""
    masked = isinstance(config, MaskedConfig)
    if isinstance(config.model, From):
        load = pretrained.open_encoder if masked else pretrained.open_decoder
        return load(config.model, job.inputs["start"], tokenizer, config.window, job.numerics)
    build = models.new_encoder if masked else models.new_decoder
    return build(config.model, tokenizer, tokenizer.model_max_length, job.numerics)


class CausalObjective:
    """Causal language modelling on windows."""

    weights: ClassVar = {"causal": 1.0}
    static_shapes = True

    def __init__(self, config: CausalConfig, job: Job, model: "PreTrainedModel", split: Split) -> None:
        self.mixture = Mixture(split, config.window, config.batch, config.mixture, job.seed)
        self.config, self.job, self.model = config, job, model

    def draw(self, step: int, shard: Shard) -> MicroBatch:
        """Return a shard of a step's windows, token ids (B, T)."""
        import torch

        ids = torch.from_numpy(self.mixture.batch(step, shard.rows))
        numbers = range(step * self.config.batch, (step + 1) * self.config.batch)[shard.rows]
        return MicroBatch(ids, {"causal": ids[:, 1:].numel()}, ids.numel(), [f"window {number}" for number in numbers])

    def loss_sums(self, micro_batch: MicroBatch) -> dict[str, "torch.Tensor"]:
        """Return the summed negative log-likelihood (nats) of all tokens but each window's first."""
        return {"causal": windows_nll(self.model, micro_batch.inputs, self.job.numerics, self.config.loss)}


class MaskedObjective:
    """Masked language modelling on whole texts."""

    weights: ClassVar = {"masked": 1.0}
    static_shapes = False

    def __init__(
        self, config: MaskedConfig, job: Job, model: Any, split: Split, vocabulary: Vocabulary, pad_id: int
    ) -> None:
        self.batches = DocumentBatches(split, config.batch * config.window, config.window, config.mixture, job.seed)
        self.masker, self.pad_id = Masker(config.masking, vocabulary), pad_id
        model.sparse_prediction = True  # ModernBERT computes logits only at targets; others have no such option
        self.config, self.job, self.model = config, job, model
        # The micro-batches of a step are sliced from one masked batch.
        self._cached_batch = lru_cache(maxsize=1)(self._masked_batch)

    def _masked_batch(self, step: int) -> "tuple[Ids, Ids, Ids, Ids]":
        """Return a step's document indices (B,), and their masked ids, attention mask and targets, each (B, T)."""
        documents = self.batches.documents_at(step)
        ids, mask, names = self.batches.read(documents, self.pad_id)
        masked_ids, targets = self.masker.mask_batch(ids, names, generator(self.job.seed, Stream.MASKED_TOKENS, step))
        return documents, masked_ids, mask, targets

    def draw(self, step: int, shard: Shard) -> MicroBatch:
        """Return a shard of a step's texts: masked ids, attention mask and targets, each (B, T)."""
        import torch

        documents, masked_ids, mask, targets = self._cached_batch(step)
        numbers = documents[shard.rows]
        if not len(numbers):  # more shards than texts: pass one text without targets, since other processes wait
            inputs = [torch.from_numpy(array[:1]) for array in (masked_ids, mask, np.full_like(targets, IGNORE_INDEX))]
            return MicroBatch(inputs, {"masked": 0}, 0, [])
        inputs = [torch.from_numpy(np.ascontiguousarray(array[shard.rows])) for array in (masked_ids, mask, targets)]
        target_count = int((inputs[2] != IGNORE_INDEX).sum())
        return MicroBatch(
            inputs, {"masked": target_count}, int(inputs[1].sum()), [f"document {number}" for number in numbers]
        )

    def loss_sums(self, micro_batch: MicroBatch) -> dict[str, "torch.Tensor"]:
        """Return the summed negative log-likelihood (nats) of the masked targets."""
        masked_ids, mask, targets = (array.to(self.model.device, non_blocking=True) for array in micro_batch.inputs)
        with models.autocast(self.model, self.job.numerics):
            logits = self.model(input_ids=masked_ids, attention_mask=mask, labels=targets).logits
        chosen = targets != IGNORE_INDEX  # (B, T)
        logits = logits[chosen] if logits.ndim == 3 else logits  # (targets, V)
        return {"masked": losses.cross_entropy(logits, targets[chosen], self.config.loss)}


def heldout_figures(
    model: "PreTrainedModel", split: Split, window: int, desc: str | None = None
) -> dict[str, float | None]:
    """Return a causal model's loss and bits per byte on held-out text; `desc` is the title of the progress bar."""
    from tqdm import tqdm

    rows = len(split.tokens) // window + sum(map(len, text_windows(split, window)))
    with tqdm(total=rows, desc=desc, disable=desc is None, mininterval=2) as bar:
        nats = partial(model_nll, model.eval(), progress=bar.update)
        return {
            "heldout_loss": heldout_loss(nats, split, window), "bits_per_byte": bits_per_byte(split, window, nats)
        }  # fmt: skip


def heldout_loss(row_nll_fn: Callable[[TokenRows], Sequence[float]], split: Split, window: int) -> float | None:
    """Return the mean negative log-likelihood (nats per token) of full windows; None if the split has none."""
    count = len(split.tokens) // window
    if not count:
        return None
    rows = split.tokens[: count * window].reshape(count, window)
    return round(math.fsum(row_nll_fn(rows)) / (count * (window - 1)), 6)
