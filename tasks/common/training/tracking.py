"""Live curves of a training stage, for DVCLive, TensorBoard, Weights & Biases and MLflow (`placement.tracking`).

They lie in the run's own folder, `runs/<run id>/tracking/<stage>/<service>`, which neither git nor DVC tracks, and are
no part of the result: a stage's own curve is its `history.csv`. So nothing here can change or end a training run. Each
service writes in a process of its own (`services.py`), and one that fails says so and is left. The network
is used only where the user's environment says so (WANDB_MODE, MLFLOW_TRACKING_URI, DVC Studio's settings).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tasks.common import identity, stage
from tasks.common.settings import Service
from tasks.common.stage import Job, rank
from tasks.common.training.flops import Work

Figures = Mapping[str, float]

WRITER = Path(__file__).with_name("services.py")
PATIENCE_S = 60.0  # the services have this long to end
HURRIED_S = 10.0  # and so long where the stage failed or is told to stop, for which it has twice as long itself


@contextmanager
def opened(
    job: Job, *, work: Work | None = None, first: int = 0, earlier: Sequence[Figures] = (), every: int | None = None
) -> Iterator["Tracker"]:
    """Yield the tracker of a job that goes on after `first` steps; `earlier` are the rows of its curve until there.

    A run that is resumed in its own folder goes on there, without the steps that were lost; in a new one, its curve
    starts with the earlier rows. `every` overrides the setting where a step is long. Of several processes that train
    one model the first one writes.
    """
    folder = job.run_folder / "tracking" / job.name
    if not first:
        shutil.rmtree(folder, ignore_errors=True)
    resumed = folder.exists()
    services = [] if rank() else job.tracking.to
    writers = [Writer(name, job, folder / name, first) for name in services]
    tracker = Tracker(job, writers, work, every or job.tracking.every)
    for row in () if resumed else earlier:
        tracker.write(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
    patience = HURRIED_S
    try:
        yield tracker
        patience = PATIENCE_S
    finally:
        tracker.close(patience)


@dataclass
class Tracker:
    """Gathers a run's figures and hands them on every few steps, with speed, utilisation and memory."""

    job: Job
    writers: Sequence["Writer"]
    work: Work | None
    every: int
    tokens: int = 0
    reported: int = 0  # tokens of the steps that were handed on
    pending: tuple[int, Figures] | None = None
    started: float = field(default_factory=time.perf_counter)
    clock: float = field(default_factory=time.perf_counter)

    def log(self, step: int, figures: Figures, tokens: int = 0) -> None:
        """Take the figures of a step (the first is 1) and the tokens that it read."""
        self.tokens += tokens
        self.pending = step, figures
        if step % self.every == 0:
            self.flush()

    def flush(self) -> None:
        """Hand the last step's figures on, unless they were."""
        if self.pending is None:
            return
        (step, figures), now = self.pending, time.perf_counter()
        if self.writers:
            speed = self._speed(self.tokens - self.reported, now - self.clock)
            self.write(step, {**figures, **speed, "peak_memory_bytes": peak_memory()})
        self.pending, self.reported, self.clock = None, self.tokens, now

    def write(self, step: int, figures: Figures) -> None:
        """Hand figures on as they are."""
        for writer in self.writers:
            writer.write(step, figures)

    def close(self, patience: float) -> None:
        """End the services, within some seconds, and keep the whole run's utilisation among what was measured."""
        self.flush()
        speed = self._speed(self.tokens, self.clock - self.started)
        if self.work and speed:
            self.job.measured(mfu=round(speed["mfu"], 4), ceiling_gflops=round(self.work.ceiling / 1e9, 1))
        for writer in self.writers:
            writer.end()
        deadline = time.monotonic() + patience
        for writer in self.writers:
            writer.wait(deadline - time.monotonic())

    def _speed(self, tokens: int, seconds: float) -> dict[str, float]:
        """Return tokens a second and the utilisation, each where it is known."""
        if not tokens:
            return {}
        utilisation = {"mfu": self.work.utilisation(tokens, seconds)} if self.work else {}
        return {"tokens_per_second": tokens / max(seconds, 1e-9), **utilisation}


class Writer:
    """The process that writes for one service. Nothing waits for it: what its pipe has no room for is not written."""

    def __init__(self, service: Service, job: Job, folder: Path, first: int) -> None:
        name = f"{job.run_folder.name}/{job.name}"
        run_id = identity.hash_json([name, job.recipe])[: identity.TAG_LENGTH]
        # -P: the modules that lie beside that file are none of its libraries.
        command = [sys.executable, "-P", str(WRITER), service, str(folder), str(first), name, run_id]
        self.service, self.job = service, job
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self.process.stdin is not None
        self.pipe = self.process.stdin.fileno()
        os.set_blocking(self.pipe, False)

    def write(self, step: int, figures: Figures) -> None:
        """Send one point, whole or not at all (a pipe takes up to 4,096 bytes in one piece)."""
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self.pipe, json.dumps([step, dict(figures)]).encode() + b"\n")

    def end(self) -> None:
        """Let the process see that no more comes."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def wait(self, seconds: float) -> None:
        """Wait until it has written what it has; end it where it takes longer."""
        try:
            self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            print(f"{self.job.name}: {self.service} was still busy; its last points may be missing", flush=True)
        finally:
            self.process.kill()
            self.process.wait()


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes: the GPU's where it computes there."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return stage.peak_memory()
