"""Pretrain a decoder (`clm`, next-token prediction) or a small encoder (`mlm`, masked tokens and whole names).

Run as `python -m tasks.pretrain clm` or `python -m tasks.pretrain mlm`. Causal: Radford et al. 2018; from nothing, or
from a given model (`tasks/common/modelling/pretrained.py`). Masked: Devlin et al. 2019; what is hidden is chosen in
`tasks/common/text/masking.py`, a whole name of a text among it, so that the encoder learns to name what is missing.
"""

import math
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from tasks.common import stage
from tasks.common.evaluation.surprise import bits_per_byte, model_nats, windows_surprise
from tasks.common.modelling import models, pretrained
from tasks.common.modelling.models import Shape
from tasks.common.modelling.pretrained import From, New
from tasks.common.stage import Job
from tasks.common.text import chat
from tasks.common.text.masking import Masker, Masking, Vocabulary
from tasks.common.text.shards import Batches, Ids, Mixture, Split, Weights
from tasks.common.training import losses
from tasks.common.training.flops import Work
from tasks.common.training.loop import WHOLE, Drawn, Share, Training, summary, train
from tasks.common.training.losses import IGNORED, Entropy

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {"tokenizer": "data/tokenize/tokenizer", "shards": "data/tokenize/shards"}
KEY_INPUTS: dict[str, dict[str, str]] = {"clm": {"start": "{config.model.path}"}, "mlm": {}}
OUTPUTS = {"model": "data/pretrain/{key}/model", "history": "data/pretrain/{key}/history.csv"}
PARALLEL = True


class Config(Training):
    """Settings that both kinds of pretraining have."""

    window: int = Field(
        description="Length of a training sequence, in tokens; mlm reads whole texts, the beginning of longer ones",
        ge=16, le=2**17,
    )  # fmt: skip
    batch: int = Field(description="Sequences a step; batch x window tokens where whole texts are read", ge=1, le=2**16)
    mixture: Weights
    entropy: Entropy


class CausalConfig(Config):
    """Settings of causal pretraining."""

    model: Annotated[New | From, Field(discriminator="name")]


class MaskedConfig(Config):
    """Settings of masked pretraining."""

    model: Shape
    masking: Masking


KEYS = {"clm": CausalConfig, "mlm": MaskedConfig}


def run(config: CausalConfig | MaskedConfig, job: Job) -> dict[str, Any]:
    """Train the model of the job's key and return its losses on training and held-out text."""
    models.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["tokenizer"])
    train_split, heldout = (Split.open(job.inputs["shards"] / name) for name in ("train", "heldout"))
    evaluation: dict[str, Any] = {}
    if isinstance(config, MaskedConfig):
        vocabulary = Vocabulary.of(tokenizer)
        model = models.new_encoder(config.model, tokenizer, tokenizer.model_max_length, job.numerics)
        masked = Masked(config, job, model, train_split, vocabulary, tokenizer.pad_token_id)
        drawn = masked.draw(0, WHOLE)
        work = Work.of(model, config.window, job.numerics, read_out=drawn.targets["masked"] / drawn.tokens)
        model, history = train(model, masked, config, job, work)
        evaluation = dict(masked.batches.counted)
    else:
        model = start(config, tokenizer, job)
        work = Work.of(model, config.window, job.numerics)
        model, history = train(model, Causal(config, job, model, train_split), config, job, work)
        nats = partial(model_nats, model.eval())
        evaluation = {
            "heldout_loss": heldout_loss(model, heldout, config.window),
            "bits_per_byte": bits_per_byte(heldout, config.window, nats),
        }
    models.save(model, tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    return {"parameters": models.parameters(model), "steps": config.steps, **summary(history), **evaluation}


def start(config: CausalConfig, tokenizer: "PreTrainedTokenizerFast", job: Job) -> "PreTrainedModel":
    """Return the decoder that training begins with: of the shape that was asked for, or the given one."""
    if isinstance(config.model, From):
        return pretrained.open_decoder(config.model, job.inputs["start"], tokenizer, config.window, job.numerics)
    return models.new_decoder(config.model, tokenizer, tokenizer.model_max_length, job.numerics)


class Causal:
    """The next token of every window."""

    weights: ClassVar = {"causal": 1.0}
    steady = True

    def __init__(self, config: Config, job: Job, model: "PreTrainedModel", split: Split) -> None:
        self.mixture = Mixture(split, config.window, config.batch, config.mixture, job.seed)
        self.config, self.job, self.model = config, job, model

    def draw(self, step: int, share: Share) -> Drawn:
        """Return a part of a step's windows, token ids (B, T)."""
        import torch

        ids = torch.from_numpy(self.mixture.batch(step, share.rows))
        numbers = range(step * self.config.batch, (step + 1) * self.config.batch)[share.rows]
        return Drawn(ids, {"causal": ids[:, 1:].numel()}, ids.numel(), [f"window {number}" for number in numbers])

    def sums(self, drawn: Drawn) -> dict[str, "torch.Tensor"]:
        """Return the summed surprise (nats) of each token after its window's first."""
        return {"causal": windows_surprise(self.model, drawn.content, self.job.numerics, self.config.entropy)}


class Masked:
    """What is hidden of whole texts."""

    weights: ClassVar = {"masked": 1.0}
    steady = False

    def __init__(
        self, config: MaskedConfig, job: Job, model: Any, split: Split, vocabulary: Vocabulary, fill: int
    ) -> None:
        self.batches = Batches(split, config.batch * config.window, config.window, config.mixture, job.seed)
        self.masker, self.fill = Masker(config.masking, vocabulary), fill
        model.sparse_prediction = True  # the vocabulary's logits are computed where something is asked only
        self.config, self.job, self.model = config, job, model
        self._whole = lru_cache(maxsize=1)(self._hidden)  # a step's parts are cut from it one after the other

    def _hidden(self, step: int) -> "tuple[Ids, Ids, Ids, Ids]":
        """Return a step's documents (B,), and their hidden ids, attention mask and targets, each (B, T)."""
        documents = self.batches.at(step)
        ids, mask, names = self.batches.read(documents, self.fill)
        hidden, targets = self.masker.hide(ids, names, np.random.default_rng([self.job.seed, step, 1]))
        return documents, hidden, mask, targets

    def draw(self, step: int, share: Share) -> Drawn:
        """Return a part of a step's texts: hidden ids, attention mask and targets, each (B, T)."""
        import torch

        documents, hidden, mask, targets = self._whole(step)
        numbers = documents[share.rows]
        if not len(numbers):  # more parts than texts: something to pass through the model, of which nothing is asked
            content = [torch.from_numpy(array[:1]) for array in (hidden, mask, np.full_like(targets, IGNORED))]
            return Drawn(content, {"masked": 0}, 0, [])
        content = [torch.from_numpy(np.ascontiguousarray(array[share.rows])) for array in (hidden, mask, targets)]
        asked = int((content[2] != IGNORED).sum())
        return Drawn(content, {"masked": asked}, int(content[1].sum()), [f"document {number}" for number in numbers])

    def sums(self, drawn: Drawn) -> dict[str, "torch.Tensor"]:
        """Return the summed surprise (nats) of what is asked."""
        hidden, mask, targets = (array.to(self.model.device, non_blocking=True) for array in drawn.content)
        with models.autocast(self.model, self.job.numerics):
            logits = self.model(input_ids=hidden, attention_mask=mask, labels=targets).logits  # (asked, V)
        return {"masked": losses.cross_entropy(logits, targets[targets != IGNORED], self.config.entropy)}


def heldout_loss(model: "PreTrainedModel", split: Split, window: int) -> float | None:
    """Return the mean negative log-likelihood a token (nats) of a causal model; None where no window is full."""
    count = len(split.tokens) // window
    if not count:
        return None
    rows = split.tokens[: count * window].reshape(count, window)
    return round(math.fsum(model_nats(model.eval(), rows)) / (count * (window - 1)), 6)


if __name__ == "__main__":
    stage.main("tasks.pretrain")
