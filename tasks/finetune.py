"""Fine-tune a pretrained model: the decoder on conversations, or either model with a head that classifies or rates.

Run as `python -m tasks.finetune`. On conversations the loss is `answer loss + w x pretraining loss`: without the
second term the facts of entities that no question mentions are lost (docs/decisions.md has the figures). Methods are
in `tasks/common/modelling/methods.py`, objectives in `answering.py` and `heads.py` of `tasks/common/training/`. Rows
that are not used as they stand are listed in `aside.jsonl` with their reason.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from tasks.common import stage, tables
from tasks.common.modelling import methods, models
from tasks.common.modelling.methods import Adapter, Full, Lora, QLora, Top
from tasks.common.stage import Job, StageError, rank
from tasks.common.text import chat, conversations
from tasks.common.text.conversations import Aside, Named
from tasks.common.text.packing import Encoded
from tasks.common.training import heads
from tasks.common.training.answering import Answers, Chat, Mix, mean_surprise
from tasks.common.training.flops import Work
from tasks.common.training.heads import Classification, Labelled, Regression
from tasks.common.training.loop import History, Objective, Training, summary, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DECODER, ENCODER = "data/pretrain/clm/model", "data/pretrain/mlm/model"
INPUTS = {
    "model": "{config.model}",
    "instructions": "data/validate/instructions",
    "shards": "data/tokenize/shards",
}
OUTPUTS = {
    "model": "data/finetune/model",
    "history": "data/finetune/history.csv",
    "aside": "data/finetune/aside.jsonl",
}
PARALLEL = True


class Config(Training):
    """Settings of fine-tuning."""

    model: Literal["data/pretrain/clm/model", "data/pretrain/mlm/model"] = Field(description="Model to start from")
    task: Annotated[Chat | Classification | Regression, Field(discriminator="name", description="What is learnt")]
    method: Annotated[
        Full | Top | Lora | QLora | Adapter, Field(discriminator="name", description="What of the model is trained")
    ]
    mix: Mix
    too_long: Literal["refuse", "truncate"] = Field(description="What is done with rows longer than the context")
    heldout: int = Field(description="Held-out conversations that the loss is measured on before and after", ge=0)
    batch: int = Field(description="Conversations a step", ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        wrong = list(self._misfits())
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _misfits(self) -> Iterator[str]:
        task, method = self.task.name, self.method.name
        if task == "chat" and self.model != DECODER:
            yield f"task chat needs the decoder: set model to {DECODER} (it is {self.model})"
        if task != "chat" and self.mix.weight:
            yield f"task {task} reads no pretraining text: set mix.weight to 0 (it is {self.mix.weight})"
        if task != "chat" and method == "qlora":
            yield f"method qlora trains the task chat only (it is {task}): take method lora"
        if self.model == ENCODER and method == "adapter":
            yield "method adapter merges into the decoder's feed-forward layers only: take method lora for the encoder"


def run(config: Config, job: Job) -> dict[str, Any]:
    """Tune the model and return its losses, what it does on held-out rows, and how many rows were kept aside."""
    models.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["model"])
    if isinstance(config.task, Chat):
        return tune_chat(config, config.task, tokenizer, job)
    return tune_head(config, config.task, tokenizer, job)


def tune_chat(config: Config, task: Chat, tokenizer: "PreTrainedTokenizerFast", job: Job) -> dict[str, Any]:
    """Train the decoder on conversations, with loss on their answers."""
    reader = conversations.Reader(tokenizer, tokenizer.model_max_length, config.too_long, task.answers)
    rows = rows_of(job)
    (usable, aside), (heldout, more) = read_both(reader, rows)
    chosen, fill = drawn(heldout, config.heldout, job.seed), tokenizer.pad_token_id

    def base() -> "PreTrainedModel":
        return models.load_decoder(job.inputs["model"], job.numerics)

    if isinstance(config.method, QLora):
        model = methods.load_four_bit(job.inputs["model"], config.method, job.numerics.attention)
    else:
        model = base()
    before = mean_surprise(model, chosen, fill, job.numerics)
    trained = methods.apply(model, config.method)
    methods.store_as_computed(trained, config.method, job.numerics.dtype.decoder)
    four_bit = isinstance(config.method, QLora)  # whose packed weights say nothing of the work
    work = None if four_bit else Work.of(trained, task.packing or config.mix.window, job.numerics)
    objective = Answers(trained, usable, config.batch, task, config.mix, fill, job)
    tuned, history = tune(trained, objective, config, tokenizer, job, work=work, base=base)
    conversations.write_aside([*aside, *more], job.outputs["aside"])
    return {
        **reading(len(usable), config, aside),
        **summary(history),
        "heldout_conversations": len(chosen),
        "heldout_aside": conversations.tally(more),
        "heldout_loss_before": before,
        "heldout_loss_after": mean_surprise(tuned, chosen, fill, job.numerics),
    }


def tune_head(
    config: Config, task: Classification | Regression, tokenizer: "PreTrainedTokenizerFast", job: Job
) -> dict[str, Any]:
    """Train a head on the model, and the model with it, on conversations whose last answers are labels or numbers."""
    rows = rows_of(job)
    labels = heads.labels_of(rows["train"], task) if isinstance(task, Classification) else None
    reader = heads.Reader(tokenizer, tokenizer.model_max_length, config.too_long, labels)
    (usable, aside), (heldout, more) = read_both(reader, rows)
    if rows["heldout"] and not heldout:
        raise StageError(
            f"none of the {len(rows['heldout'])} held-out conversations can be asked "
            f"({conversations.told(conversations.tally(more))}): what is learnt could not be judged. Labels must be "
            "answers that come on both sides of the split."
        )
    with models.quiet("transformers"):  # the head is fresh, and is about to be trained
        if labels is None:
            model = models.load_scorer(job.inputs["model"], job.numerics)
            model.config.problem_type = "regression"
        else:
            model = models.load_classifier(job.inputs["model"], job.numerics, labels)
    model.config.pad_token_id = tokenizer.pad_token_id
    trained = methods.apply(model, config.method)
    objective = Labelled(trained, usable, config.batch, task, tokenizer, job)
    tuned, history = tune(trained, objective, config, tokenizer, job)
    conversations.write_aside([*aside, *more], job.outputs["aside"])
    return {
        **reading(len(usable), config, aside),
        **summary(history),
        "labels": labels and len(labels),
        "heldout_aside": conversations.tally(more),
        **heads.judge(tuned, tokenizer, heldout, job.numerics, usable, labels),
    }


def tune(
    trained: Any, objective: Objective, config: Config, tokenizer: "PreTrainedTokenizerFast", job: Job, *,
    work: Work | None = None, base: "Callable[[], PreTrainedModel] | None" = None,
) -> "tuple[PreTrainedModel, History]":  # fmt: skip
    """Train what the method trains, and return and save the plain model that comes of it, with the curves."""
    trained, history = train(trained, objective, config, job, work)
    models.give_freed_memory_back()  # there may now be two models
    tuned = methods.merge(trained, config.method, base)
    models.save(tuned, tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    return tuned, history


def rows_of(job: Job) -> dict[str, list[dict[str, Any]]]:
    """Return the instructions of each split."""
    return {split: tables.read(job.inputs["instructions"], split).to_pylist() for split in ("train", "heldout")}


def read_both(reader: Any, rows: dict[str, list[dict[str, Any]]]) -> list[tuple[list[Any], list[Aside]]]:
    """Return what a reader makes of each split, and what it keeps aside; raise StageError where nothing is left."""
    with models.quiet("transformers"):  # it warns of each text that is too long; they are counted
        read = [reader.read(rows[split]) for split in ("train", "heldout")]
    usable, aside = read[0]
    if not usable:
        raise conversations.nothing_left(len(rows["train"]), aside, reader.longest)
    left = conversations.tally([*aside, *read[1][1]])
    if left and not rank():
        told = conversations.told(left)
        print(f"conversations that are not used as they stand ({told}): data/finetune/aside.jsonl names them")
    return read


def drawn(items: Sequence[Named], count: int, seed: int) -> list[Encoded]:
    """Return up to `count` of the conversations, drawn by the seed, in their order."""
    order = np.random.default_rng([seed, 2]).permutation(len(items))[:count]
    return [items[i][1] for i in sorted(order)]


def reading(usable: int, config: Config, aside: Sequence[Aside]) -> dict[str, Any]:
    """Return what is told of the rows to train on."""
    return {
        "conversations": usable,
        "aside": conversations.tally(aside),
        "epochs": round(config.steps * config.batch / usable, 3),
    }


if __name__ == "__main__":
    stage.main("tasks.finetune")
