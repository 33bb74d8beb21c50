"""Classification and regression heads: examples, training objective and held-out metrics.

An example is a conversation up to its last answer, formatted by the chat template with the generation prompt. Its label
is that answer: one of the answers in the training rows, or a number.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from tasks.common.evaluation.labels import label_metrics, number_metrics
from tasks.common.harness.job import Job, StageError
from tasks.common.modelling import head_models
from tasks.common.settings import Numerics, Settings
from tasks.common.text import chat
from tasks.common.text.chat import Message
from tasks.common.training import losses
from tasks.common.training.loop import MicroBatch, Shard, batch_at
from tasks.finetune.conversations import (
    Rejected,
    Row,
    TooLong,
    find_control_token,
    find_missing_answer,
    fit_to_context,
)
from tasks.finetune.packing import Encoded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

EVAL_MICROBATCH_ROWS = 128  # in one forward pass without gradients


class Classification(Settings):
    """A classification head over the answers in the training rows; trained by cross-entropy."""

    name: Literal["classification"] = Field(description="Task")
    max_labels: int = Field(
        default=20, description="Largest number of labels; more distinct answers are an error", ge=2
    )


class Regression(Settings):
    """A regression head for numeric answers; trained by mean squared error on the unscaled numbers."""

    name: Literal["regression"] = Field(description="Task")


HeadTask = Classification | Regression


@dataclass(frozen=True)
class Example:
    """Token ids of a conversation up to its last answer, and that answer: a label's index, or a number."""

    name: str
    ids: list[int]
    target: float


@dataclass(frozen=True)
class Reader:
    """Encodes rows of the instructions table as examples, and rejects the others."""

    tokenizer: "PreTrainedTokenizerFast"
    max_length: int
    too_long: TooLong
    labels: Sequence[str] | None  # None for numbers

    def read(self, rows: Iterable[Row]) -> tuple[list[Example], list[Rejected]]:
        """Return the examples in the table's order, and the rejected and shortened rows."""
        examples: list[Example] = []
        rejected: list[Rejected] = []
        controls = chat.control_tokens(self.tokenizer)
        for row in rows:
            rejection = find_missing_answer(row) or find_control_token(row, controls)
            target = math.nan if rejection else self._target(row)
            if isinstance(target, Rejected):
                rejection = target
            elif not rejection:
                encoded, rejection = fit_to_context(
                    row, row["messages"][: _last_answer_index(row)], self._encode, self.max_length, self.too_long
                )
                examples += [Example(row["id"], encoded[0], target)] if encoded else []
            rejected += [rejection] if rejection else []
        return examples, rejected

    def _target(self, row: Row) -> float | Rejected:
        answer = last_answer(row)
        if self.labels is not None:
            if answer in self.labels:
                return self.labels.index(answer)
            return Rejected.of(row, "unseen_label", f"{answer!r} is not an answer in the training rows")
        try:
            number = float(answer)
        except ValueError:
            number = math.nan
        return number if math.isfinite(number) else Rejected.of(row, "no_number", repr(answer))

    def _encode(self, messages: Sequence[Message]) -> Encoded:
        ids = chat.encode_prompt(self.tokenizer, messages)
        # `fit_to_context` keeps a row only if a token of it is marked; there is no loss on tokens here.
        return ids, [True] * len(ids)


def _last_answer_index(row: Row) -> int:
    return max(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")


def last_answer(row: Row) -> str:
    """Return a conversation's last answer, stripped."""
    text: str = row["messages"][_last_answer_index(row)]["content"]
    return text.strip()


def find_labels(rows: Iterable[Row], task: Classification) -> list[str]:
    """Return the distinct answers, sorted; raise StageError if there are fewer than 2 or more than `max_labels`."""
    counts = Counter(last_answer(row) for row in rows if not find_missing_answer(row))
    if not 2 <= len(counts) <= task.max_labels:
        examples = ", ".join(repr(label[:40]) for label, _ in counts.most_common(3))
        raise StageError(
            f"finetune.task is classification, and the training conversations end in {len(counts)} different answers "
            f"(such as {examples}); expected 2 to finetune.task.max_labels, which is {task.max_labels}. Raise it, or "
            "name the sources whose last answers are labels with `sources`."
        )
    return sorted(counts)


class LabelObjective:
    """Labels or numbers of examples as the training objective of a model with a head."""

    weights: ClassVar = {"task": 1.0}
    static_shapes = None  # ids of rows, of which each pass makes tensors

    def __init__(
        self, model: Any, examples: Sequence[Example], batch: int, task: HeadTask,
        tokenizer: "PreTrainedTokenizerFast", job: Job,
    ) -> None:  # fmt: skip
        self.model, self.examples, self.batch, self.task = model, examples, batch, task
        self.tokenizer, self.job = tokenizer, job

    def draw(self, step: int, shard: Shard) -> MicroBatch:
        """Return a shard of a step's examples."""
        part = batch_at(self.examples, self.batch, self.job.seed, step)[shard.rows]
        tokens = sum(len(example.ids) for example in part)
        return MicroBatch(part, {"task": len(part)}, tokens, [f"conversation {example.name}" for example in part])

    def loss_sums(self, micro_batch: MicroBatch) -> dict[str, "torch.Tensor"]:
        """Return the summed cross-entropy of the labels (nats), or the summed squared error."""
        import torch

        ids = [example.ids for example in micro_batch.inputs]
        outputs = head_models.head_outputs(self.model, self.tokenizer, ids, self.job.numerics, chat.MICROBATCH_ROWS)
        targets = torch.tensor([example.target for example in micro_batch.inputs], device=outputs.device)
        if isinstance(self.task, Classification):
            return {"task": losses.cross_entropy(outputs, targets.long())}
        return {"task": losses.squared_error(outputs[:, 0], targets)}


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    examples: Sequence[Example],
    numerics: Numerics,
    train_examples: Sequence[Example],
    labels: Sequence[str] | None,
    desc: str | None = None,
) -> dict[str, Any]:
    """Return a head's metrics on held-out examples, and those of the training examples' majority label or mean.

    `desc` is the title of the progress bar; without it none is shown.
    """
    import torch

    if not examples:
        return {"heldout": 0}
    with torch.no_grad():
        outputs = head_models.head_outputs(
            model.eval(), tokenizer, [e.ids for e in examples], numerics, EVAL_MICROBATCH_ROWS, desc
        )
    targets = np.array([example.target for example in examples])
    train_targets = [example.target for example in train_examples]
    metrics: Mapping[str, float | None]
    if labels is None:
        metrics = number_metrics(outputs[:, 0].cpu().numpy(), targets, float(np.mean(train_targets)))
    else:
        majority_label = Counter(train_targets).most_common(1)[0][0]
        metrics = label_metrics(outputs.argmax(-1).cpu().numpy(), targets, len(labels), majority_label)
    return {"heldout": len(examples), **metrics}
