"""Live curves of a training stage, for DVCLive, TensorBoard, Weights & Biases and MLflow (`placement.tracking`).

They are written to `runs/<run id>/tracking/<stage>/<service>`, which git and DVC ignore. They are not part of the
result: a stage's own curve is its `history.csv`. Nothing here can change or end a training run. Each service runs in a
process of its own (`services.py`); a failure is reported once and then ignored. The network is used only if the user's
environment asks for it (WANDB_MODE, MLFLOW_TRACKING_URI, DVC Studio's settings).
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

from tasks.common import identity
from tasks.common.harness import records
from tasks.common.harness.job import Job
from tasks.common.harness.launch import rank
from tasks.common.settings import Service
from tasks.common.training.flops import MfuEstimator

Metrics = Mapping[str, float]

WRITER_SCRIPT = Path(__file__).with_name("services.py")
CLOSE_TIMEOUT_S = 60.0  # for the services to finish after a complete stage
ABORT_TIMEOUT_S = 10.0  # after a failed or interrupted stage, which itself has twice as long to stop


@contextmanager
def open_tracker(
    job: Job,
    *,
    mfu_estimator: MfuEstimator | None = None,
    first_step: int = 0,
    earlier_rows: Sequence[Metrics] = (),
    every: int | None = None,
) -> Iterator["Tracker"]:
    """Yield the tracker of a job that resumes after `first_step` steps; `earlier_rows` are its curve so far.

    A run that resumes in its own folder continues its curves there, without the steps after the checkpoint. In a new
    folder the curves start with `earlier_rows`. `every` overrides the setting where a step is long. In distributed
    training only rank 0 logs.
    """
    folder = job.run_folder / "tracking" / job.name
    if not first_step:
        shutil.rmtree(folder, ignore_errors=True)
    resumed = folder.exists()
    services = [] if rank() else job.tracking.to
    writers = [Writer(name, job, folder / name, first_step) for name in services]
    tracker = Tracker(job, writers, mfu_estimator, every or job.tracking.every)
    for row in () if resumed else earlier_rows:
        tracker.write(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
    timeout = ABORT_TIMEOUT_S
    try:
        yield tracker
        timeout = CLOSE_TIMEOUT_S
    finally:
        tracker.close(timeout)


@dataclass
class Tracker:
    """Logs a run's metrics every few steps, with speed, MFU and peak memory."""

    job: Job
    writers: Sequence["Writer"]
    mfu_estimator: MfuEstimator | None
    every: int
    tokens: int = 0
    logged_tokens: int = 0  # tokens of the steps that were logged
    pending: tuple[int, Metrics] | None = None
    started: float = field(default_factory=time.perf_counter)
    last_logged: float = field(default_factory=time.perf_counter)

    def log(self, step: int, metrics: Metrics, tokens: int = 0) -> None:
        """Take the metrics of a step (1-based) and the number of tokens that it read."""
        self.tokens += tokens
        self.pending = step, metrics
        if step % self.every == 0:
            self.flush()

    def flush(self) -> None:
        """Log the latest step's metrics, unless they have been logged."""
        if self.pending is None:
            return
        (step, metrics), now = self.pending, time.perf_counter()
        if self.writers:
            throughput = self._throughput(self.tokens - self.logged_tokens, now - self.last_logged)
            self.write(step, {**metrics, **throughput, "peak_memory_bytes": peak_memory()})
        self.pending, self.logged_tokens, self.last_logged = None, self.tokens, now

    def write(self, step: int, metrics: Metrics) -> None:
        """Send metrics to all services."""
        for writer in self.writers:
            writer.write(step, metrics)

    def close(self, timeout: float) -> None:
        """Record the whole run's MFU in the job's measurements, and end the services within `timeout` seconds."""
        self.flush()
        throughput = self._throughput(self.tokens, self.last_logged - self.started)
        if self.mfu_estimator and throughput:
            self.job.log_figures(
                mfu=round(throughput["mfu"], 4), peak_gflops=round(self.mfu_estimator.peak_flops / 1e9, 1)
            )
        for writer in self.writers:
            writer.close_input()
        deadline = time.monotonic() + timeout
        for writer in self.writers:
            writer.wait(deadline - time.monotonic())

    def _throughput(self, tokens: int, seconds: float) -> dict[str, float]:
        """Return tokens per second and MFU, as far as known."""
        if not tokens:
            return {}
        utilisation = {"mfu": self.mfu_estimator.utilisation(tokens, seconds)} if self.mfu_estimator else {}
        return {"tokens_per_second": tokens / max(seconds, 1e-9), **utilisation}


class Writer:
    """The process that logs to one service. Writes never block: points that do not fit into its pipe are dropped."""

    def __init__(self, service: Service, job: Job, folder: Path, first_step: int) -> None:
        name = f"{job.run_folder.name}/{job.name}"
        run_id = identity.hash_json([name, job.recipe])[: identity.TAG_LENGTH]
        # -P: do not import the modules in the script's folder instead of libraries of the same name.
        command = [sys.executable, "-P", str(WRITER_SCRIPT), service, str(folder), str(first_step), name, run_id]
        self.service, self.job = service, job
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self.process.stdin is not None
        self.pipe = self.process.stdin.fileno()
        os.set_blocking(self.pipe, False)

    def write(self, step: int, metrics: Metrics) -> None:
        """Send one point completely or not at all (writes of up to 4,096 bytes to a pipe are atomic)."""
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self.pipe, json.dumps([step, dict(metrics)]).encode() + b"\n")

    def close_input(self) -> None:
        """Close the process's standard input, so that it finishes."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def wait(self, seconds: float) -> None:
        """Wait until the process has written its points; kill it after `seconds`."""
        try:
            self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            print(f"{self.job.name}: {self.service} did not finish in time; its last points may be missing", flush=True)
        finally:
            self.process.kill()
            self.process.wait()


def peak_memory() -> int:
    """Return the process's peak memory in bytes: the GPU's if it uses one, else the machine's."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return records.peak_memory()
