"""Classification and regression heads: examples, their objective, and how well they do on held-out ones.

An example is a conversation up to its last answer, written by the chat template up to where that answer would begin;
its label is that answer: one of the answers seen in training, or a number.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from tasks.common.modelling import models
from tasks.common.settings import Numerics, Settings
from tasks.common.stage import Job, StageError
from tasks.common.text import chat
from tasks.common.text.chat import Message
from tasks.common.text.conversations import Aside, Row, TooLong, controlling, controls_of, fit, unanswered
from tasks.common.text.packing import Encoded
from tasks.common.training import losses
from tasks.common.training.loop import Drawn, Share, batch_at

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TOGETHER = 128  # rows in one forward pass where nothing is trained


class Classification(Settings):
    """A head that tells which of the answers seen in training is right; trained by cross-entropy."""

    name: Literal["classification"] = Field(description="Task")
    labels: int = Field(description="Most different answers; more are taken for answers that are no labels", ge=2)


class Regression(Settings):
    """A head that gives the number which the answer is; trained by mean squared error on the numbers as they are."""

    name: Literal["regression"] = Field(description="Task")


Head = Classification | Regression


@dataclass(frozen=True)
class Example:
    """Token ids of a conversation up to its last answer, and that answer: a label's place, or a number."""

    name: str
    ids: list[int]
    target: float


@dataclass(frozen=True)
class Reader:
    """Reads rows of the instructions table as examples, and keeps the others aside."""

    tokenizer: "PreTrainedTokenizerFast"
    longest: int
    too_long: TooLong
    labels: Sequence[str] | None  # None for numbers

    def read(self, rows: Iterable[Row]) -> tuple[list[Example], list[Aside]]:
        """Return the examples, in the table's order, and the rows that were kept aside or shortened."""
        kept: list[Example] = []
        aside: list[Aside] = []
        controls = controls_of(self.tokenizer)
        for row in rows:
            found = unanswered(row) or controlling(row, controls)
            target = math.nan if found else self._target(row)
            if isinstance(target, Aside):
                found = target
            elif not found:
                encoded, found = fit(
                    row, row["messages"][: _last_answer(row)], self._encode, self.longest, self.too_long
                )
                kept += [Example(row["id"], encoded[0], target)] if encoded else []
            aside += [found] if found else []
        return kept, aside

    def _target(self, row: Row) -> float | Aside:
        answer = answer_of(row)
        if self.labels is not None:
            if answer in self.labels:
                return self.labels.index(answer)
            return Aside.of(row, "unseen_label", f"{answer!r} is no answer of the training")
        try:
            number = float(answer)
        except ValueError:
            number = math.nan
        return number if math.isfinite(number) else Aside.of(row, "no_number", repr(answer))

    def _encode(self, messages: Sequence[Message]) -> Encoded:
        ids = chat.encode_prompt(self.tokenizer, messages)
        return ids, [True] * len(ids)  # all of it is read, and none of it is learnt


def _last_answer(row: Row) -> int:
    return max(place for place, message in enumerate(row["messages"]) if message["role"] == "assistant")


def answer_of(row: Row) -> str:
    """Return a conversation's last answer, without space around it."""
    text: str = row["messages"][_last_answer(row)]["content"]
    return text.strip()


def labels_of(rows: Iterable[Row], task: Classification) -> list[str]:
    """Return the different answers of the rows, sorted; raise StageError for one alone and for more than are labels."""
    counts = Counter(answer_of(row) for row in rows if not unanswered(row))
    if not 2 <= len(counts) <= task.labels:
        examples = ", ".join(repr(label[:40]) for label, _ in counts.most_common(3))
        raise StageError(
            f"finetune.task is classification, and the training conversations end in {len(counts)} different answers "
            f"(such as {examples}); it takes 2 to finetune.task.labels, which is {task.labels}. Raise that, or give a "
            "table whose last answers are labels."
        )
    return sorted(counts)


class Labelled:
    """Examples with their labels or numbers, as the objective of a model with a head."""

    weights: ClassVar = {"task": 1.0}
    steady = None  # ids of rows, of which each pass makes tensors

    def __init__(
        self, model: Any, examples: Sequence[Example], batch: int, task: Head,
        tokenizer: "PreTrainedTokenizerFast", job: Job,
    ) -> None:  # fmt: skip
        self.model, self.examples, self.batch, self.task = model, examples, batch, task
        self.tokenizer, self.job = tokenizer, job

    def draw(self, step: int, share: Share) -> Drawn:
        """Return a part of a step's examples."""
        part = batch_at(self.examples, self.batch, self.job.seed, step)[share.rows]
        tokens = sum(len(example.ids) for example in part)
        return Drawn(part, {"task": len(part)}, tokens, [f"conversation {example.name}" for example in part])

    def sums(self, drawn: Drawn) -> dict[str, "torch.Tensor"]:
        """Return the summed cross-entropy (nats) over labels, or the summed squared error."""
        import torch

        ids = [example.ids for example in drawn.content]
        outputs = models.head_outputs(self.model, self.tokenizer, ids, self.job.numerics, chat.TOGETHER)
        targets = torch.tensor([example.target for example in drawn.content], device=outputs.device)
        if isinstance(self.task, Classification):
            return {"task": losses.cross_entropy(outputs, targets.long())}
        return {"task": losses.squared_error(outputs[:, 0], targets)}


def judge(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    examples: Sequence[Example],
    numerics: Numerics,
    learnt: Sequence[Example],
    labels: Sequence[str] | None,
) -> dict[str, Any]:
    """Return how well a head does on held-out examples, beside always giving what is usual among those learnt from."""
    import torch

    if not examples:
        return {"heldout": 0}
    with torch.no_grad():
        outputs = models.head_outputs(model.eval(), tokenizer, [e.ids for e in examples], numerics, TOGETHER)
    right = np.array([example.target for example in examples])
    known = [example.target for example in learnt]
    figures: Mapping[str, float | None]
    if labels is None:
        figures = number_figures(outputs[:, 0].cpu().numpy(), right, float(np.mean(known)))
    else:
        usual = Counter(known).most_common(1)[0][0]
        figures = label_figures(outputs.argmax(-1).cpu().numpy(), right, len(labels), usual)
    return {"heldout": len(examples), **figures}


def label_figures(found: Any, right: Any, labels: int, usual: float) -> dict[str, float]:
    """Return accuracy and macro F1 (the mean over the labels that are right or found anywhere)."""
    counts = np.zeros((labels, labels))
    np.add.at(counts, (right.astype(int), found), 1)  # (right, found)
    hits, total = counts.diagonal(), counts.sum(0) + counts.sum(1)
    return {
        "accuracy": round(float((found == right).mean()), 4),
        "accuracy_of_the_usual_label": round(float((right == usual).mean()), 4),
        "macro_f1": round(float((2 * hits[total > 0] / total[total > 0]).mean()), 4),
    }


def number_figures(found: Any, right: Any, usual: float) -> dict[str, float | None]:
    """Return root mean squared error and correlations; None for a correlation where all numbers are the same."""
    from scipy.stats import pearsonr, spearmanr

    varied = len(right) > 1 and np.ptp(found) > 0 and np.ptp(right) > 0
    return {
        "rmse": round(float(np.sqrt(np.mean((found - right) ** 2))), 4),
        "rmse_of_the_mean": round(float(np.sqrt(np.mean((usual - right) ** 2))), 4),
        "pearson": round(float(pearsonr(found, right).statistic), 4) if varied else None,
        "spearman": round(float(spearmanr(found, right).statistic), 4) if varied else None,
    }
