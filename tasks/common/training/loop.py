"""The training loop shared by all stages: objectives, optimizers by name, checkpoints, curves, several processes.

The objective's batch is a pure function of the step number, so the data loader has no state: a checkpoint is the
weights, the optimizers' state and the step, and a resumed run computes exactly what an uninterrupted run would have.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from pydantic import Field

from tasks.common.harness.job import Job, StageError
from tasks.common.harness.launch import rank
from tasks.common.random_streams import Stream, generator, seed_torch
from tasks.common.settings import Settings
from tasks.common.training import compiling, tracking
from tasks.common.training.checkpoints import CheckpointStore
from tasks.common.training.flops import MfuEstimator
from tasks.common.training.optimizers import Optimizer, learning_rate_at
from tasks.common.training.parallel import World
from tasks.common.training.updates import TrainEngine, make_engine

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Model = TypeVar("Model", bound="torch.nn.Module")

PREFETCH_STEPS = 2  # steps whose batches a background thread prepares in advance
# Parts of the out-of-memory messages of torch's CPU and GPU allocators and of the CUDA libraries.
OUT_OF_MEMORY_MESSAGES = ("DefaultCPUAllocator", "can't allocate memory", "out of memory", "ALLOC_FAILED")
MAX_LISTED_ITEMS = 12  # names of batch items, or of truncated ones, in a message


@dataclass(frozen=True)
class Shard:
    """One of `count` equal parts of a step's batch: one process's part of one gradient accumulation step."""

    index: int = 0
    count: int = 1

    @property
    def rows(self) -> slice:
        """The row indices of this shard; together the shards cover each row of the batch once."""
        return slice(self.index, None, self.count)


@dataclass(frozen=True)
class MicroBatch:
    """The part of a step's batch that one forward and backward pass reads."""

    inputs: Any  # in the form that the objective's `loss_sums` expects
    target_counts: Mapping[str, int]  # number of targets of each loss term
    tokens: int
    names: Sequence[str]  # the rows' names, for messages to the user


FULL_BATCH = Shard()
LossSums = Callable[[MicroBatch], "dict[str, torch.Tensor]"]


class Objective(Protocol):
    """A training objective: its data and its loss."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The loss terms' weights by name. The loss is the sum over terms of weight × mean over the term's targets."""
        ...

    @property
    def static_shapes(self) -> bool | None:
        """Whether all micro-batches have one shape; None if inputs are not only tensors (cannot be compiled)."""
        ...

    def draw(self, step: int, shard: Shard) -> MicroBatch:
        """Return one shard of a step's batch. Must be a pure function; it is called in a background thread."""
        ...

    def loss_sums(self, micro_batch: MicroBatch) -> "dict[str, torch.Tensor]":
        """Return for each loss term the differentiable sum over its targets."""
        ...


@dataclass
class History:
    """Curves of a training run: one row of means every `every_steps` steps, written as CSV for `dvc plots`."""

    every_steps: int
    rows: list[dict[str, float]] = field(default_factory=list)
    pending: list[dict[str, float]] = field(default_factory=list)

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Add one step's metrics (`step` is 0-based)."""
        self.pending.append(metrics)
        if (step + 1) % self.every_steps == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Append the means of the pending steps as a row."""
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


class Training(Settings):
    """The settings that all training stages share."""

    steps: int = Field(description="Optimizer steps", ge=1)
    gradient_accumulation_steps: int = Field(
        default=1,
        description="Micro-batches that a step's batch is split into: less memory for activations, the same update",
        ge=1, le=4096,
    )  # fmt: skip
    optimizer: Optimizer


def train(
    model: Model, objective: Objective, config: Training, job: Job, mfu_estimator: MfuEstimator | None = None
) -> "tuple[Model, History]":
    """Train for a number of steps and return the trained model and the curves, resuming from the last checkpoint.

    The model is trained in place. The returned model is another object only where the engine sharded the first one.
    With `mfu_estimator` the run reports its model FLOPs utilisation. Raises StageError if the loss or its gradient is
    not finite (the weights keep their last finite values), and if memory runs out.
    """
    import torch
    from tqdm import tqdm

    world, steps = World.join(job.numerics), config.steps
    loss_sums, compiled = _make_loss_sums(model, objective, config, job, mfu_estimator)
    history = History(every_steps=max(1, steps // 60))
    store = CheckpointStore.for_job(job, world)
    checkpoint = store.resume(model, history)
    first_step = checkpoint.step if checkpoint else 0
    unsharded: Model = world.shard(model)
    engine = make_engine(config.optimizer, model, world)
    if checkpoint:
        engine.load(checkpoint)
    del checkpoint  # as large as the model, twice
    model.train()
    tokens, started = 0, time.perf_counter()
    batches = _prefetch(objective, range(first_step, steps), config.gradient_accumulation_steps, world)
    total_mfu = mfu_estimator and mfu_estimator.for_processes(world.size)
    step_range = range(first_step, steps)
    bar = tqdm(step_range, desc=job.name, initial=first_step, total=steps, mininterval=2, disable=world.rank > 0)
    with tracking.open_tracker(
        job, mfu_estimator=total_mfu, first_step=first_step, earlier_rows=history.rows
    ) as tracker:
        for step in bar:
            learning_rate = learning_rate_at(config.optimizer, step, steps)
            micro_batches = next(batches)
            seed_torch(job.seed, Stream.DROPOUT, step, world.data_parallel_rank, device=world.device)
            with _explain_out_of_memory(job, config.gradient_accumulation_steps, compiled=compiled):
                losses = _accumulate_gradients(loss_sums, objective.weights, micro_batches, engine, world)
            values = engine.step(torch.stack([*losses.values()]), learning_rate)
            metrics = dict(zip([*losses, "gradient_norm"], values, strict=True))
            if not all(map(math.isfinite, values)):
                store.save(step, engine, history, force=True)
                names = world.gather_names([name for part in micro_batches for name in part.names])
                raise StageError(_not_finite_message(step, steps, metrics, names, store, learning_rate, job))
            metrics["learning_rate"] = learning_rate
            step_tokens = world.data_parallel_size * sum(part.tokens for part in micro_batches)
            tokens += step_tokens
            history.add(step, metrics)
            tracker.log(step + 1, metrics, step_tokens)
            store.save(step + 1, engine, history)
    history.flush(steps - 1)
    seconds = max(time.perf_counter() - started, 1e-9)
    job.log_figures(tokens_per_second=round(tokens / seconds), resumed_at_step=first_step)
    engine.gather_into(unsharded)
    world.shutdown()
    return unsharded, history


def _make_loss_sums(
    model: Any, objective: Objective, config: Training, job: Job, mfu_estimator: MfuEstimator | None
) -> tuple[LossSums, bool]:
    """Return the objective's `loss_sums`, compiled if worthwhile, and whether it is; enable activation checkpointing.

    Raises StageError if both are wanted: compiled in bfloat16, recomputed activations are fused and rounded in another
    way (weights of a toy model differed by up to 7e-3 after four steps).
    """
    tokens = objective.draw(0, FULL_BATCH).tokens * config.steps if mfu_estimator else 0
    flops = mfu_estimator.flops_per_token * tokens if mfu_estimator else None
    static_shapes = objective.static_shapes
    if static_shapes is None or not compiling.should_compile(job.numerics, flops, compiling.layer_count(model)):
        if job.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return objective.loss_sums, False
    if job.activation_checkpointing:
        raise StageError(
            "placement.activation_checkpointing would change the result of a compiled run, and numerics.compile is "
            f"{job.numerics.compile}, which compiles this one: set placement.activation_checkpointing to false, or "
            "numerics.compile to never (training then restarts from step 0)."
        )
    return compiling.compile_for(objective.loss_sums, model, static_shapes=static_shapes), True


def _prefetch(objective: Objective, steps: range, accumulation_steps: int, world: World) -> Iterator[list[MicroBatch]]:
    """Yield each step's micro-batches of this process; a background thread prepares them in advance.

    Empty micro-batches are left out, unless the engine needs the same number of passes in every process.
    """
    pending: deque[Future[list[MicroBatch]]] = deque()

    def draw(step: int) -> list[MicroBatch]:
        size = world.data_parallel_size
        indices = (index * size + world.data_parallel_rank for index in range(accumulation_steps))
        drawn = (objective.draw(step, Shard(index, accumulation_steps * size)) for index in indices)
        parts = [part for part in drawn if part.tokens or world.lockstep]
        return [replace(part, inputs=_pin_memory(part.inputs)) for part in parts] if world.device == "cuda" else parts

    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            for step in steps:
                pending.append(pool.submit(draw, step))
                if len(pending) > PREFETCH_STEPS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _pin_memory(inputs: Any) -> Any:
    """Return inputs with their CPU tensors in pinned memory, for asynchronous copies to the GPU."""
    import torch

    if isinstance(inputs, torch.Tensor):
        return inputs.pin_memory() if inputs.device.type == "cpu" else inputs
    return [_pin_memory(item) for item in inputs] if isinstance(inputs, list | tuple) else inputs


def _accumulate_gradients(
    loss_sums: LossSums,
    term_weights: Mapping[str, float],
    micro_batches: Sequence[MicroBatch],
    engine: TrainEngine,
    world: World,
) -> "dict[str, torch.Tensor]":
    """Run the forward and backward passes of a step; return the loss and, if there are several, its terms.

    Each term's sum is divided by its number of targets in the whole batch over all processes, so micro-batches of
    unequal size are weighted correctly.
    """
    import torch

    names = list(term_weights)
    counts = [sum(part.target_counts[term] for part in micro_batches) for term in names]
    targets = world.sum(torch.tensor(counts, device=world.device)).clamp(min=1)  # (terms,)
    weights = torch.tensor(list(term_weights.values()), device=world.device)
    means = torch.zeros(len(names), device=world.device)
    for part in micro_batches:
        sums = loss_sums(part)
        term_losses = torch.stack([sums[term] for term in names]) / targets
        engine.backward(term_losses @ weights)
        means += term_losses.detach()
    means = world.sum(means)
    term_means = {f"{term}_loss": mean for term, mean in zip(names, means, strict=True)} if len(names) > 1 else {}
    return {"loss": means @ weights, **term_means}


@contextmanager
def _explain_out_of_memory(job: Job, accumulation_steps: int, *, compiled: bool) -> Iterator[None]:
    """Turn an out-of-memory error into a StageError that says which setting to change and to what."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
            text in str(error) for text in OUT_OF_MEMORY_MESSAGES
        )
        if not out_of_memory:
            raise
        section = job.name.replace("@", ".")
        advice = (
            "Set placement.activation_checkpointing to true: a step needs less memory and takes a third longer, and "
            "training resumes from its last checkpoint. If that is not enough, set"
        )
        raise StageError(
            f"memory ran out in a training step ({str(error).splitlines()[0]}). "
            f"{'Set' if job.activation_checkpointing or compiled else advice} {section}.gradient_accumulation_steps to "
            f"{2 * accumulation_steps} (now {accumulation_steps}): the same batch in smaller micro-batches, at half "
            "the memory for activations; training then restarts from step 0."
        ) from error


def _not_finite_message(
    step: int,
    steps: int,
    metrics: Mapping[str, float],
    names: Sequence[str],
    store: CheckpointStore,
    learning_rate: float,
    job: Job,
) -> str:
    """Return the message for a loss that is not finite. The names of a large batch go to a file in the run's folder."""
    more = ""
    if len(names) > MAX_LISTED_ITEMS:
        file = job.run_folder / f"{job.name}-batch.txt"
        if not rank():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(names) + "\n", encoding="utf-8")
        more = f" and {len(names) - MAX_LISTED_ITEMS} more (full list: {file})"
    values = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
    return (
        f"the loss or its gradient is not finite at step {step + 1} of {steps} ({values}). The batch: "
        f"{', '.join(names[:MAX_LISTED_ITEMS])}{more}. The weights from before this step are saved in {store.folder}; "
        "runs with other settings start from step 0. Lower optimizer.learning_rate (the rate of this step was "
        f"{learning_rate:g}), or look at the batch."
    )


def batch_at(items: Sequence[Item], size: int, seed: int, step: int) -> list[Item]:
    """Return the `size` items of a step's batch, reshuffled each epoch: a pure function of seed and step."""
    positions = (divmod(n, len(items)) for n in range(step * size, (step + 1) * size))
    return [items[_epoch_order(len(items), seed, epoch)[position]] for epoch, position in positions]


@lru_cache(maxsize=4)
def _epoch_order(items: int, seed: int, epoch: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return the permutation of `items` indices in an epoch."""
    return generator(seed, Stream.ITEM_ORDER, epoch).permutation(items)


def last_losses(history: History) -> dict[str, Any]:
    """Return the losses of the history's last row, for the stage's metrics."""
    last = history.rows[-1] if history.rows else {}
    return {name: value for name, value in last.items() if "loss" in name}
