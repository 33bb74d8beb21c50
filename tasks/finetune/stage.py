"""Fine-tune a pretrained model on conversations, or with a classification or regression head.

Run as `python -m tasks.finetune ENTRY`. On conversations the loss is `answer loss + w x pretraining loss`; without the
second term the model forgets facts about entities that no question mentions
(docs/explanation/training.md#pretraining-text-in-fine-tuning has figures). Methods are in
`tasks/common/modelling/methods.py`, objectives in `chat.py` and `labels.py` of `tasks/finetune/objectives/`. Rows that
are rejected or shortened are listed in `rejected.jsonl` with their reason.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from tasks.common import tables
from tasks.common.harness.job import Job, StageError
from tasks.common.harness.launch import rank
from tasks.common.modelling import head_models, methods, models, torch_setup
from tasks.common.modelling.methods import Adapter, Full, Lora, QLora, TopLayers
from tasks.common.random_streams import Stream, generator
from tasks.common.text import chat
from tasks.common.training.flops import MfuEstimator
from tasks.common.training.loop import History, Objective, Training, last_losses, train
from tasks.finetune import conversations
from tasks.finetune.conversations import EncodedConversation, Rejected
from tasks.finetune.objectives import labels
from tasks.finetune.objectives.chat import Chat, ChatObjective, PretrainingMix, mean_nll
from tasks.finetune.objectives.labels import Classification, LabelObjective, Regression
from tasks.finetune.packing import Encoded, check_packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {
    "model": "{config.model}",
    "instructions": "data/validate/instructions",
    "shards": "data/tokenize/shards",
}
OUTPUTS = {
    "model": "data/finetune/{key}/model",
    "history": "data/finetune/{key}/history.csv",
    "rejected": "data/finetune/{key}/rejected.jsonl",
}
PARALLEL = True


class Config(Training):
    """Settings of fine-tuning."""

    model: str = Field(description="Folder of the model to start from: an entry's, or your own", min_length=1)
    chat_template: chat.TemplateName = None
    sources: tables.SourceNames = None
    task: Annotated[Chat | Classification | Regression, Field(discriminator="name", description="Training task")] = (
        Chat(name="chat")
    )
    method: Annotated[
        Full | TopLayers | Lora | QLora | Adapter,
        Field(discriminator="name", description="Which weights are trained"),
    ] = Full(name="full")
    pretraining_mix: PretrainingMix = PretrainingMix()
    max_tokens: int | None = Field(
        default=None, description="Longest conversation, in tokens; null: the model's context", ge=8
    )
    too_long: Literal["reject", "truncate"] = Field(default="reject", description="Handling of longer conversations")
    heldout: int = Field(
        default=256, description="Held-out conversations for the loss before and after fine-tuning", ge=0
    )
    batch: int = Field(description="Conversations per step", ge=1)

    @model_validator(mode="after")
    def _check_task_options(self) -> "Config":
        conflicts = list(self._unsupported_options())
        if conflicts:
            raise ValueError("; ".join(conflicts))
        return self

    def _unsupported_options(self) -> Iterator[str]:
        task, method = self.task.name, self.method.name
        if task != "chat" and self.pretraining_mix.weight:
            weight = self.pretraining_mix.weight
            yield f"task {task} uses no pretraining text: set pretraining_mix.weight to 0 (it is {weight})"
        if task != "chat" and method == "qlora":
            yield f"method qlora supports only the task chat (it is {task}): use method lora"


def run(config: Config, job: Job) -> dict[str, Any]:
    """Fine-tune the model; return its losses, held-out metrics and the counts of rejected rows."""
    torch_setup.prepare_torch(job.numerics, job.seed)
    tokenizer = chat.load_tokenizer(job.inputs["model"], config.chat_template)
    if isinstance(config.task, Chat):
        return tune_chat(config, config.task, tokenizer, job)
    return tune_head(config, config.task, tokenizer, job)


def tune_chat(config: Config, task: Chat, tokenizer: "PreTrainedTokenizerFast", job: Job) -> dict[str, Any]:
    """Fine-tune the decoder on conversations, with the loss on their answers."""
    reader = conversations.Reader(tokenizer, max_length(config, tokenizer), config.too_long, task.answers)
    rows = read_rows(config, job)
    (usable, rejected), (heldout, heldout_rejected) = read_splits(reader, rows, job.key)
    heldout_sample, pad_id = sample_conversations(heldout, config.heldout, job.seed), tokenizer.pad_token_id

    def base() -> "PreTrainedModel":
        return models.load_decoder(job.inputs["model"], job.numerics)

    if isinstance(config.method, QLora):
        model = methods.load_four_bit(job.inputs["model"], config.method, job.numerics.attention)
    else:
        model = base()
    if task.packing:
        check_packing(model, job.numerics)
    before = mean_nll(model, heldout_sample, pad_id, job.numerics, bar_title(job))
    trained = methods.apply(model, config.method)
    methods.cast_frozen_to_bfloat16(trained, config.method, job.numerics.dtype.decoder)
    four_bit = isinstance(config.method, QLora)  # packed weights give no FLOP estimate
    work = (
        None
        if four_bit
        else MfuEstimator.for_model(trained, task.packing or config.pretraining_mix.window, job.numerics)
    )
    objective = ChatObjective(trained, usable, config.batch, task, config.pretraining_mix, pad_id, job)
    tuned, history = train_and_save(trained, objective, config, tokenizer, job, mfu_estimator=work, base=base)
    conversations.write_rejected([*rejected, *heldout_rejected], job.outputs["rejected"])
    return {
        **row_metrics(len(usable), config, rejected),
        **last_losses(history),
        "heldout_conversations": len(heldout_sample),
        "heldout_rejected": conversations.count_reasons(heldout_rejected),
        "heldout_loss_before": before,
        "heldout_loss_after": mean_nll(tuned, heldout_sample, pad_id, job.numerics, bar_title(job)),
    }


def tune_head(
    config: Config, task: Classification | Regression, tokenizer: "PreTrainedTokenizerFast", job: Job
) -> dict[str, Any]:
    """Fine-tune the model with a new head on conversations whose last answers are labels or numbers."""
    rows = read_rows(config, job)
    classes = labels.find_labels(rows["train"], task) if isinstance(task, Classification) else None
    reader = labels.Reader(tokenizer, max_length(config, tokenizer), config.too_long, classes)
    (usable, rejected), (heldout, heldout_rejected) = read_splits(reader, rows, job.key)
    if rows["heldout"] and not heldout:
        reasons = conversations.format_counts(conversations.count_reasons(heldout_rejected))
        raise StageError(
            f"none of the {len(rows['heldout'])} held-out conversations can be used ({reasons}): the model could not "
            "be evaluated. Labels must be answers that occur in both splits."
        )
    with models.suppress_warnings("transformers"):  # the warning that the head is newly initialized
        if classes is None:
            model = head_models.load_scorer(job.inputs["model"], job.numerics)
            model.config.problem_type = "regression"
        else:
            model = head_models.load_classifier(job.inputs["model"], job.numerics, classes)
    model.config.pad_token_id = tokenizer.pad_token_id
    trained = methods.apply(model, config.method)
    objective = LabelObjective(trained, usable, config.batch, task, tokenizer, job)
    tuned, history = train_and_save(trained, objective, config, tokenizer, job)
    conversations.write_rejected([*rejected, *heldout_rejected], job.outputs["rejected"])
    return {
        **row_metrics(len(usable), config, rejected),
        **last_losses(history),
        "labels": classes and len(classes),
        "heldout_rejected": conversations.count_reasons(heldout_rejected),
        **labels.evaluate(tuned, tokenizer, heldout, job.numerics, usable, classes, bar_title(job)),
    }


def bar_title(job: Job) -> str | None:
    """Return the title of the progress bar over held-out rows; None in all processes but the first."""
    return None if rank() else f"{job.name} held-out rows"


def train_and_save(
    trained: Any, objective: Objective, config: Config, tokenizer: "PreTrainedTokenizerFast", job: Job, *,
    mfu_estimator: MfuEstimator | None = None, base: "Callable[[], PreTrainedModel] | None" = None,
) -> "tuple[PreTrainedModel, History]":  # fmt: skip
    """Train by the method, save the merged model and the training curves, and return both."""
    trained, history = train(trained, objective, config, job, mfu_estimator)
    torch_setup.release_freed_memory()  # merging may need memory for a second model
    tuned = methods.merge(trained, config.method, base)
    models.save(tuned, tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    return tuned, history


def max_length(config: Config, tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the longest conversation that is trained on, in tokens."""
    context = int(tokenizer.model_max_length)
    return context if config.max_tokens is None else min(config.max_tokens, context)


def read_rows(config: Config, job: Job) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the instructions table by split, of the sources that are used."""
    path = job.inputs["instructions"]
    return {split: tables.read(path, split, config.sources).to_pylist() for split in ("train", "heldout")}


def read_splits(
    reader: Any, rows: dict[str, list[dict[str, Any]]], key: str | None
) -> list[tuple[list[Any], list[Rejected]]]:
    """Return each split's usable and rejected rows, train first; raise StageError without a usable training row."""
    with models.suppress_warnings("transformers"):  # the tokenizer's warnings of long texts; they are counted
        read = [reader.read(rows[split]) for split in ("train", "heldout")]
    usable, rejected = read[0]
    if not usable:
        raise conversations.no_rows_error(len(rows["train"]), rejected, reader.max_length)
    counts = conversations.count_reasons([*rejected, *read[1][1]])
    if counts and not rank():
        reasons = conversations.format_counts(counts)
        print(f"conversations rejected or shortened: {reasons}; listed in data/finetune/{key}/rejected.jsonl")
    return read


def sample_conversations(items: Sequence[EncodedConversation], count: int, seed: int) -> list[Encoded]:
    """Return a random sample of up to `count` conversations, in their original order."""
    order = generator(seed, Stream.HELDOUT_SAMPLE).permutation(len(items))[:count]
    return [items[i][1] for i in sorted(order)]


def row_metrics(usable: int, config: Config, rejected: Sequence[Rejected]) -> dict[str, Any]:
    """Return the metrics of the training rows."""
    return {
        "conversations": usable,
        "rejected": conversations.count_reasons(rejected),
        "epochs": round(config.steps * config.batch / usable, 3),
    }
