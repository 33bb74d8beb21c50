"""The training loop that the stages share: any objective, optimizer by name, checkpoints, curves, several processes.

A stage gives the loop a model and an objective whose batch is a pure function of the step number (never of a position
that somebody has to remember). So a checkpoint is the weights, the optimizers' state and the step, and a resumed run
computes what an uninterrupted one would have.
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

from tasks.common.settings import Settings
from tasks.common.stage import Job, StageError, rank
from tasks.common.training import compiling, tracking
from tasks.common.training.checkpoints import Store
from tasks.common.training.flops import Work
from tasks.common.training.optimizers import Optimizer, rate_at
from tasks.common.training.parallel import World
from tasks.common.training.updates import Updates, begun

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Model = TypeVar("Model", bound="torch.nn.Module")

AHEAD = 2  # steps whose batches are drawn, by a thread of its own, while one is worked out
# How torch's allocators, of a CPU and of a GPU, and CUDA's libraries say that memory ended.
NO_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "out of memory", "ALLOC_FAILED")
NAMED = 12  # items of a batch, or of what was cut, that are named


@dataclass(frozen=True)
class Share:
    """One of the equal parts that a step's batch is worked out in."""

    index: int = 0
    count: int = 1

    @property
    def rows(self) -> slice:
        """This part's places in a batch; together the parts hold each place once."""
        return slice(self.index, None, self.count)


@dataclass(frozen=True)
class Drawn:
    """What is read at once: a part of a step's batch."""

    content: Any  # whatever the objective's `sums` takes
    targets: Mapping[str, int]  # for each term of the loss, how many things are asked
    tokens: int
    names: Sequence[str]  # what was read, as a person could look it up


WHOLE = Share()
Sums = Callable[[Drawn], "dict[str, torch.Tensor]"]


class Objective(Protocol):
    """What a model is trained on."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The terms of the loss by name, with their weights: it is the sum of weight × mean over a term's targets."""
        ...

    @property
    def steady(self) -> bool | None:
        """Whether all parts have one shape; None where parts are no tensors alone, of which no program can be made."""
        ...

    def draw(self, step: int, share: Share) -> Drawn:
        """Return a part of a step's batch: a pure function, called in a thread of its own."""
        ...

    def sums(self, drawn: Drawn) -> "dict[str, torch.Tensor]":
        """Return for each term the sum over its targets, from which gradients flow."""
        ...


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


class Training(Settings):
    """What every stage that trains is told."""

    steps: int = Field(description="Optimizer steps", ge=1)
    accumulate: int = Field(
        description="Parts that a step's batch is worked out in, one after the other: less memory, the same step",
        ge=1, le=4096,
    )  # fmt: skip
    optimizer: Optimizer


def train(
    model: Model, objective: Objective, config: Training, job: Job, work: Work | None = None
) -> "tuple[Model, History]":
    """Train for a number of steps and return the trained model and the curves, resuming from the last checkpoint.

    The model is trained in place; it is another object that is returned only where several processes shared it out.
    `work` is what a token costs, where the model's utilisation is to be known. Raises StageError where the loss stops
    being finite, before it can spoil the weights, and where memory ends.
    """
    import torch
    from tqdm import tqdm

    world, steps = World.join(job.numerics), config.steps
    sums = _sums(model, objective, config, job, work)
    history = History(every=max(1, steps // 60))
    store = Store.of(job, world)
    checkpoint = store.resume(model, history)
    first = checkpoint.step if checkpoint else 0
    trained: Model = world.spread(model)
    updates = begun(config.optimizer, model, world)
    if checkpoint:
        updates.load(checkpoint)
    del checkpoint  # as large as the model, twice
    model.train()
    tokens, started = 0, time.perf_counter()
    batches = _drawn_ahead(objective, range(first, steps), config.accumulate, world)
    bar = tqdm(range(first, steps), desc=job.name, initial=first, total=steps, mininterval=2, disable=world.rank > 0)
    with tracking.opened(job, work=work and work.of_all(world.size), first=first, earlier=history.rows) as tracker:
        for step in bar:
            rate = rate_at(config.optimizer, step, steps)
            parts = next(batches)
            _reseed(_seed(job.seed, step, world.reader), world.device)  # dropout, wherever a model has some
            with _memory_advice(job, config.accumulate):
                losses = _backward(sums, objective.weights, parts, updates, world)
            values = updates.step(torch.stack([*losses.values()]), rate)
            figures = dict(zip([*losses, "gradient_norm"], values, strict=True))
            if not all(map(math.isfinite, values)):
                store.keep(step, updates, history, now=True)
                names = world.names([name for part in parts for name in part.names])
                raise StageError(_not_finite(step, steps, figures, names, store, rate, job))
            figures["learning_rate"] = rate
            read = world.readers * sum(part.tokens for part in parts)
            tokens += read
            history.add(step, figures)
            tracker.log(step + 1, figures, read)
            store.keep(step + 1, updates, history)
    history.flush(steps - 1)
    job.measured(tokens_per_second=round(tokens / max(time.perf_counter() - started, 1e-9)), resumed_at_step=first)
    updates.end(trained)
    world.leave()
    return trained, history


def _sums(model: Any, objective: Objective, config: Training, job: Job, work: Work | None) -> Sums:
    """Return the objective's sums as the numerics want them worked out: compiled, with blocks worked out again."""
    numerics = job.numerics
    if numerics.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    flops = work.flops_per_token * objective.draw(0, WHOLE).tokens * config.steps if work else None
    if objective.steady is None or not compiling.worthwhile(numerics, flops):
        return objective.sums
    return compiling.compiled(objective.sums, model, steady=objective.steady)


def _drawn_ahead(objective: Objective, steps: range, accumulate: int, world: World) -> Iterator[list[Drawn]]:
    """Yield each step's parts of this process, drawn while the steps before are worked out.

    A part that holds nothing is left out, but where the others wait for its pass.
    """
    waiting: deque[Future[list[Drawn]]] = deque()

    def draw(step: int) -> list[Drawn]:
        count = accumulate * world.readers
        shares = (Share(index * world.readers + world.reader, count) for index in range(accumulate))
        parts = [part for part in (objective.draw(step, share) for share in shares) if part.tokens or world.in_step]
        return [replace(part, content=_pinned(part.content)) for part in parts] if world.device == "cuda" else parts

    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            for step in steps:
                waiting.append(pool.submit(draw, step))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _pinned(content: Any) -> Any:
    """Return what was drawn with its tensors in memory that a GPU reads by itself, while it still computes."""
    import torch

    if isinstance(content, torch.Tensor):
        return content.pin_memory() if content.device.type == "cpu" else content
    return [_pinned(item) for item in content] if isinstance(content, list | tuple) else content


def _backward(
    sums_of: Sums, terms: Mapping[str, float], parts: Sequence[Drawn], updates: Updates, world: World
) -> "dict[str, torch.Tensor]":
    """Work the parts out, gather their gradient, and return the loss and, where several, its terms.

    Each term is divided by the targets of the whole batch, so that parts of unequal size weigh what they hold.
    """
    import torch

    names = list(terms)
    asked = torch.tensor([sum(part.targets[term] for part in parts) for term in names], device=world.device)
    targets = world.sum(asked).clamp(min=1)  # (terms,)
    weights = torch.tensor(list(terms.values()), device=world.device)
    means = torch.zeros(len(names), device=world.device)
    for part in parts:
        sums = sums_of(part)
        found = torch.stack([sums[term] for term in names]) / targets
        updates.backward(found @ weights)
        means += found.detach()
    means = world.sum(means)
    several = {f"{term}_loss": mean for term, mean in zip(names, means, strict=True)} if len(names) > 1 else {}
    return {"loss": means @ weights, **several}


@contextmanager
def _memory_advice(job: Job, accumulate: int) -> Iterator[None]:
    """Turn an end of memory into a sentence that says which setting to change and to what."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one
        ended = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(end in str(error) for end in NO_MEMORY)
        if not ended:
            raise
        section = job.name.replace("@", ".")
        more = "" if job.numerics.recompute else "; or numerics.recompute to true, which costs a third of the speed"
        raise StageError(
            f"memory ended while a step was worked out ({str(error).splitlines()[0]}). Set "
            f"{section}.accumulate to {2 * accumulate} (now {accumulate}): the same step in smaller parts, "
            f"at half the memory for activations{more}."
        ) from error


def _not_finite(
    step: int, steps: int, figures: Mapping[str, float], names: Sequence[str], store: Store, rate: float, job: Job
) -> str:
    """Say what is no longer finite and what was read; of a large batch all names go to a file of the run's."""
    more = ""
    if len(names) > NAMED:
        file = job.run_folder / f"{job.name}-batch.txt"
        if not rank():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(names) + "\n", encoding="utf-8")
        more = f" and {len(names) - NAMED} more, all of which {file} names"
    found = ", ".join(f"{name} {value:g}" for name, value in figures.items())
    return (
        f"the loss, or its gradient, is no longer a finite number at step {step + 1} of {steps} ({found}). The batch: "
        f"{', '.join(names[:NAMED])}{more}. The weights from before this step are kept in {store.folder}, for these "
        f"settings; others begin anew. Lower optimizer.learning_rate (the rate of this step was {rate:g}), or look at "
        "the batch."
    )


def _seed(seed: int, step: int, reader: int) -> int:
    return int(np.random.SeedSequence([seed, step, 5, reader]).generate_state(1)[0])


def _reseed(seed: int, device: str) -> None:
    """Seed the generators of the devices that are used; `torch.manual_seed` takes 0.4 ms, for GPUs that are not."""
    import torch

    torch.default_generator.manual_seed(seed)
    if device == "cuda":
        torch.cuda.manual_seed(seed)


def batch_at(items: Sequence[Item], size: int, seed: int, step: int) -> list[Item]:
    """Return a step's items: an endless reshuffled reading of all, a pure function of seed and step."""
    places = (divmod(n, len(items)) for n in range(step * size, (step + 1) * size))
    return [items[_order(len(items), seed, epoch)[place]] for epoch, place in places]


@lru_cache(maxsize=4)
def _order(items: int, seed: int, epoch: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return the order in which an epoch reads so many items."""
    return np.random.default_rng([seed, epoch]).permutation(items)


def summary(history: History) -> dict[str, Any]:
    """Return the last row's losses for the stage's metrics."""
    last = history.rows[-1] if history.rows else {}
    return {name: value for name, value in last.items() if "loss" in name}
