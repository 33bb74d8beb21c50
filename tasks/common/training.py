"""The training loop that the stages share, on accelerate: optimizers and schedules by name, checkpoints, curves.

A stage gives the loop a model and a `loss(step)` that is a pure function of the step number (it draws its batch from
the step, never from a position that somebody has to remember). So a checkpoint is the weights, the optimizer's state
and the step, and a resumed run computes what an uninterrupted one would have.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from pydantic import Field

from tasks.common.checkpoints import Store
from tasks.common.settings import Settings
from tasks.common.stage import Job, StageError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Losses = dict[str, "torch.Tensor"]
LossAt = Callable[[int], tuple["torch.Tensor", Losses, int]]


class Optimizer(Settings):
    """How weights are updated."""

    name: Literal["sgd", "adam", "adamw"] = Field(description="Update rule")
    learning_rate: float = Field(description="Peak learning rate", gt=0, le=10)
    weight_decay: float = Field(description="Decay a step of matrices; norms and biases have none", ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = Field(description="How the rate falls after the warm-up")
    warmup: float = Field(description="Share of the steps in which the rate rises from 0", ge=0, le=0.5)
    clip: float = Field(description="Largest norm of the gradient; longer ones are scaled down to it", gt=0)


def rate_at(optimizer: Optimizer, step: int, steps: int) -> float:
    """Return the learning rate of a step (0-based): a linear warm-up, then the schedule down to a tenth of the peak."""
    warmup = max(1, round(optimizer.warmup * steps))
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    remaining = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[optimizer.schedule]
    return optimizer.learning_rate * (0.1 + 0.9 * remaining)


def build_optimizer(config: Optimizer, model: "torch.nn.Module") -> "torch.optim.Optimizer":
    """Return the optimizer over the model's trainable parameters; only matrices decay (norms and biases do not)."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-9, fused=True)


@dataclass
class History:
    """Curves of a training run: one row every few steps, averaged over them, written as CSV for `dvc plots`."""

    every: int
    rows: list[dict[str, float]] = field(default_factory=list)
    pending: list[dict[str, float]] = field(default_factory=list)

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Take one step's figures."""
        self.pending.append(figures)
        if (step + 1) % self.every == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Close the running average into a row."""
        if self.pending:
            means = {name: sum(item[name] for item in self.pending) / len(self.pending) for name in self.pending[0]}
            self.rows.append({"step": step + 1, **{name: round(value, 6) for name, value in means.items()}})
            self.pending.clear()

    def write(self, path: Path) -> None:
        """Write the rows as CSV."""
        import csv

        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def train(model: "torch.nn.Module", loss_at: LossAt, optimizer_config: Optimizer, steps: int, job: Job) -> History:
    """Train in place for a number of steps and return the curves, resuming from the job's last checkpoint if any.

    `loss_at(step)` returns the loss, the parts of it to log, and the tokens it read. Raises StageError where the loss
    stops being finite, before it can spoil the weights.
    """
    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

    accelerator = Accelerator(cpu=job.numerics.device == "cpu", mixed_precision="no")
    optimizer = build_optimizer(optimizer_config, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    history = History(every=max(1, steps // 60))
    store = Store.of(job)
    first = store.resume(model, optimizer, history)
    model.train()
    tokens, started = 0, time.perf_counter()
    for step in tqdm(range(first, steps), desc=job.name, initial=first, total=steps, mininterval=2):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(optimizer_config, step, steps)
        loss, parts, read = loss_at(step)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), optimizer_config.clip)
        figures = torch.stack(
            [loss.detach().float(), norm.float(), *(part.detach().float() for part in parts.values())]
        ).tolist()
        if not all(map(math.isfinite, figures)):
            raise StageError(
                f"the loss is no longer a finite number at step {step + 1} of {steps} (loss {figures[0]}, gradient "
                f"norm {figures[1]}); lower optimizer.learning_rate (now {optimizer_config.learning_rate})."
            )
        optimizer.step()
        optimizer.zero_grad()
        tokens += read
        named = {"loss": figures[0], "gradient_norm": figures[1], **dict(zip(parts, figures[2:], strict=True))}
        history.add(step, {**named, "learning_rate": rate_at(optimizer_config, step, steps)})
        store.keep(step + 1, model, optimizer, history)
    history.flush(steps - 1)
    job.measured(tokens_per_second=round(tokens / max(time.perf_counter() - started, 1e-9)), resumed_at_step=first)
    return history


def batch_at(items: Sequence[Item], size: int, seed: int, step: int) -> list[Item]:
    """Return a step's items: an endless reshuffled reading of all, a pure function of seed and step."""
    wanted = np.arange(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng([seed, int(epoch)]).permutation(len(items)) for epoch in set(wanted // len(items))
    }
    return [items[orders[n // len(items)][n % len(items)]] for n in wanted]


def summary(history: History) -> dict[str, Any]:
    """Return the last row's losses for the stage's metrics."""
    last = history.rows[-1] if history.rows else {}
    return {name: value for name, value in last.items() if "loss" in name}
