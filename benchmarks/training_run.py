"""One pretraining run: our loop, Transformers' `Trainer`, or a plain loop, on the same model, tokens and seed.

`benchmarks/pretrain.py` runs it as `python -m benchmarks.training_run FILE`. All sides build the same model from the
same seed, read the same windows and are timed by the same hook, which torch calls after every optimizer step. Sides:
`ours`; `trainer`, with our arithmetic, optimizer, schedule and order of windows; `trainer-defaults`, with our model,
windows, batch size and learning rate and its own defaults otherwise (fp32, SDPA, linear schedule, shuffled order);
`plain` and `plain-compiled`, a loop like nanoGPT's (bf16 autocast, SDPA, AdamW with betas 0.9 and 0.95 and weight decay
0.1, cosine schedule, gradient clipping at 1) on the same windows.
"""

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from tasks.common.harness.job import Job
from tasks.common.harness.records import peak_memory, write_json
from tasks.common.identity import file_hash
from tasks.common.modelling import models, torch_setup
from tasks.common.random_streams import Stream, seed_torch
from tasks.common.settings import Checkpoints, Numerics
from tasks.common.text import chat
from tasks.common.text.mixtures import Mixture
from tasks.common.text.shards import Split
from tasks.common.training import flops, optimizers
from tasks.common.training.losses import IGNORE_INDEX
from tasks.pretrain import stage as pretrain

if TYPE_CHECKING:
    import torch

NO_CHECKPOINT_SECONDS, EVERY_STEP_SECONDS = 1e9, 1e-9  # seconds between two checkpoints of our loop
WARMUP_STEPS = 5  # not timed: allocators and caches are still cold
SEED = 1
StepTime = tuple[float, float]  # wall-clock seconds, CPU seconds


@dataclass(frozen=True)
class Run:
    """Settings of one run; `scratch` contains the checkpoints of an interrupted run."""

    config: pretrain.CausalConfig
    numerics: Numerics
    tokens: Path
    scratch: Path
    checkpoints: bool
    resume: bool

    @classmethod
    def from_request(cls, request: dict[str, Any]) -> "Run":
        """Read a request."""
        config = pretrain.CausalConfig.model_validate(request["config"])
        numerics = Numerics.model_validate(request["numerics"])
        paths = Path(request["tokens"]), Path(request["scratch"])
        return cls(config, numerics, *paths, request["checkpoints"], request["resume"])

    def job(self) -> Job:
        """Return the stage's job."""
        inputs = {"tokenizer": self.tokens / "tokenizer", "shards": self.tokens / "shards"}
        outputs = {"model": self.scratch / "model", "history": self.scratch / "history.csv"}
        checkpoints = Checkpoints(
            url=str(self.scratch / "checkpoints"),
            every_seconds=EVERY_STEP_SECONDS if self.checkpoints else NO_CHECKPOINT_SECONDS,
        )
        return Job(
            stage="pretrain",
            key="causal",
            inputs=inputs,
            outputs=outputs,
            seed=SEED,
            numerics=self.numerics,
            recipe="benchmark",
            checkpoints=checkpoints,
        )


def ours(run: Run) -> float | None:
    """Run the stage itself and return its held-out loss."""
    loss: float | None = pretrain.run(run.config, run.job())["heldout_loss"]
    return loss


def trainer(run: Run, *, defaults: bool) -> float | None:
    """Run Transformers' `Trainer` and return the same held-out loss."""
    from transformers import Trainer

    job, numerics = run.job(), run.numerics
    torch_setup.prepare_torch(numerics, SEED)
    tokenizer = chat.load_tokenizer(job.inputs["tokenizer"])
    splits = {name: Split.open(job.inputs["shards"] / name) for name in ("train", "heldout")}
    model = pretrain.load_start_model(run.config, tokenizer, job)
    windows = _windows(run.config, splits["train"])
    kind: Any = Trainer if defaults else _sequential_trainer()
    trainer_instance = kind(
        model=model,
        args=_trainer_arguments(run, defaults=defaults),
        train_dataset=windows,
        optimizers=(None, None) if defaults else _our_optimizer(run.config, model),
    )
    trainer_instance.train(resume_from_checkpoint=run.resume or None)
    models.save(model, tokenizer, job.outputs["model"])
    return pretrain.heldout_loss(model, splits["heldout"], run.config.window)


def plain(run: Run, *, compiled: bool) -> float | None:
    """Run a plain loop with nanoGPT's settings and return the same held-out loss."""
    import torch

    job, config = run.job(), run.config
    torch.set_num_threads(run.numerics.threads)
    seed_torch(SEED, Stream.INITIAL_WEIGHTS)  # the same initial weights as ours
    tokenizer = chat.load_tokenizer(job.inputs["tokenizer"])
    splits = {name: Split.open(job.inputs["shards"] / name) for name in ("train", "heldout")}
    model = pretrain.load_start_model(config, tokenizer, job)
    called: Any = torch.compile(model) if compiled else model
    mixture = Mixture(splits["train"], config.window, config.batch, config.mixture, SEED)
    peak, warmup = config.optimizer.learning_rate, round(0.05 * config.steps)
    optimizer = torch.optim.AdamW(model.parameters(), peak, (0.9, 0.95), weight_decay=0.1)
    for step in range(config.steps):
        done = max(0.0, (step - warmup) / (config.steps - warmup))
        rising = (step + 1) / (warmup + 1)
        optimizer.param_groups[0]["lr"] = peak * min(rising, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        plain_step(model, called, optimizer, torch.from_numpy(mixture.batch(step)))
    models.save(model, tokenizer, job.outputs["model"])
    return pretrain.heldout_loss(model, splits["heldout"], config.window)


def plain_step(model: Any, called: Any, optimizer: "torch.optim.Optimizer", ids: "torch.Tensor") -> None:
    """Take a step like nanoGPT's on windows of token ids (B, T); `called` is the model, compiled or not."""
    import torch

    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = called(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _windows(config: pretrain.CausalConfig, split: Split) -> Any:
    """Return the windows of our loop as a list of examples, in the same order.

    The first token of a window has no label: it is never predicted, but `Trainer` would count it in the mean loss.
    """
    import numpy as np

    mixture = Mixture(split, config.window, config.batch, config.mixture, SEED)
    rows = np.concatenate([mixture.batch(step) for step in range(config.steps)])
    labels = rows.copy()
    labels[:, 0] = IGNORE_INDEX
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def _sequential_trainer() -> Any:
    """Return a `Trainer` subclass that does not shuffle; `Trainer` has no setting for that."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset)

    return InOrder


def _our_optimizer(config: pretrain.CausalConfig, model: Any) -> tuple[Any, Any]:
    """Return our optimizer and learning-rate schedule for `Trainer`."""
    from torch.optim.lr_scheduler import LambdaLR

    (optimizer,), peak = optimizers.build(config.optimizer, model), config.optimizer.learning_rate
    return optimizer, LambdaLR(
        optimizer, lambda step: optimizers.learning_rate_at(config.optimizer, step, config.steps) / peak
    )


def _trainer_arguments(run: Run, *, defaults: bool) -> Any:
    """Return `TrainingArguments` that save as often as our loop and report to no trackers."""
    from transformers import TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": str(run.scratch / "trainer"),
        "per_device_train_batch_size": run.config.batch,
        "max_steps": run.config.steps,
        "learning_rate": run.config.optimizer.learning_rate,
        "seed": SEED,
        "use_cpu": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "save_strategy": "steps" if run.checkpoints else "no",
        "save_steps": 1,
        "save_total_limit": 1,
    }
    if not defaults:
        settings |= {
            "bf16": run.numerics.dtype.decoder == "bfloat16",
            "max_grad_norm": run.config.optimizer.max_grad_norm,
        }
    return TrainingArguments(**settings)


def watch_steps(stop_at: int | None) -> list[StepTime]:
    """Return a list that receives the end time of each optimizer step; kill this process at step `stop_at`."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    step_times: list[StepTime] = []

    def record_step(*_: Any) -> None:
        step_times.append((time.monotonic(), time.process_time()))
        if len(step_times) == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(record_step)
    return step_times


def flops_per_token(run: Run) -> float:
    """Return the model FLOPs per token (tasks/common/training/flops.py)."""
    model = models.load_decoder(run.job().outputs["model"], run.numerics)
    return flops.flops_per_token(model, run.config.window)


def main() -> None:
    """Do one run and write its figures."""
    request = harness.read_request()
    run = Run.from_request(request)
    sides: dict[str, Callable[[Run], float | None]] = {
        "ours": ours,
        "trainer": lambda run: trainer(run, defaults=False),
        "trainer-defaults": lambda run: trainer(run, defaults=True),
        "plain": lambda run: plain(run, compiled=False),
        "plain-compiled": lambda run: plain(run, compiled=True),
    }
    step_times = watch_steps(request["stop_at"])
    loss = sides[request["side"]](run)
    if loss is None:
        raise SystemExit(f"the held-out tokens do not fill one window of {run.config.window}")
    num_optimizers = max(1, len(step_times) // run.config.steps)  # the hook is called for each optimizer
    step_times = step_times[num_optimizers - 1 :: num_optimizers]
    skip = min(WARMUP_STEPS, len(step_times) - 2)
    tokens = (len(step_times) - 1 - skip) * run.config.batch * run.config.window
    seconds, cpu_seconds = (late - early for early, late in zip(step_times[skip], step_times[-1], strict=True))
    figures = {
        "startup_seconds": step_times[0][0] - request["started"],
        "startup_cpu_seconds": step_times[0][1],
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "heldout_loss": loss,
        "flops_per_token": flops_per_token(run),
        "peak_memory_bytes": peak_memory(),
        "steps": len(step_times),
        "weights": file_hash(run.scratch / "model" / "model.safetensors"),
    }
    write_json(Path(request["result"]), figures)


if __name__ == "__main__":
    main()
