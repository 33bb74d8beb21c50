"""One causal pretraining run on random tokens, on a GPU or, to test the script, on a CPU.

`benchmarks/gpu.py` runs it as `python -m benchmarks.gpu_run FILE`. Sides: `ours`, the stage's objective and loop;
`plain`, a compiled loop like nanoGPT's (bf16 autocast, SDPA, fused AdamW). Random tokens train as fast as text.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.training_run import plain_step
from tasks.common.harness.job import Job
from tasks.common.harness.records import write_json
from tasks.common.identity import file_hash
from tasks.common.modelling import models, torch_setup
from tasks.common.random_streams import Stream, seed_torch
from tasks.common.settings import Checkpoints, Numerics
from tasks.common.text.mixtures import Mixture
from tasks.common.text.shards import Ids
from tasks.common.training import flops, tracking
from tasks.common.training.loop import train
from tasks.pretrain import stage as pretrain

SEED = 1
WARMUP_STEPS = 10  # untimed steps: compilation, caches and the allocator


class RandomWindows(Mixture):
    """Windows of random tokens instead of text."""

    def __init__(self, vocabulary: int, config: pretrain.CausalConfig) -> None:
        self.vocabulary, self.size = vocabulary, (config.batch, config.window)

    def batch(self, step: int, rows: slice = slice(None)) -> Ids:
        """Return a step's windows (B, T), or the slice `rows` of them."""
        return np.random.default_rng([SEED, step]).integers(self.vocabulary, size=self.size)[rows]


class Causal(pretrain.CausalObjective):
    """The stage's objective on random windows."""

    def __init__(self, config: pretrain.CausalConfig, job: Job, model: Any, noise: RandomWindows) -> None:
        self.config, self.job, self.model, self.mixture = config, job, model, noise


def plain(model: Any, config: pretrain.CausalConfig, noise: RandomWindows) -> None:
    """Train with a plain compiled loop."""
    import torch

    called, rate = torch.compile(model), config.optimizer.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(config.steps):
        plain_step(model, called, optimizer, torch.from_numpy(noise.batch(step)).to(model.device, non_blocking=True))


def main() -> None:
    """Do one run and write its figures."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import LlamaConfig, LlamaForCausalLM

    request = harness.read_request()
    numerics = Numerics.model_validate(request["numerics"])
    config = pretrain.CausalConfig.model_validate(request["config"])
    ours = request["side"] == "ours"
    if ours:  # only our side promises deterministic algorithms
        torch_setup.prepare_torch(numerics, SEED)
    else:
        seed_torch(SEED, Stream.INITIAL_WEIGHTS)
    ceiling = flops.measure_peak_flops(flops.GPU_WIDTH, flops.GPU_WIDTH, "bfloat16", numerics.device)
    model: Any = LlamaForCausalLM(LlamaConfig(**request["shape"], attn_implementation=numerics.attention))
    model.to(numerics.device)
    step_times: list[float] = []

    def record_step(*_: Any) -> None:
        if numerics.device == "cuda":
            torch.cuda.synchronize()
        step_times.append(time.perf_counter())
        if len(step_times) == request["stop_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(record_step)
    noise = RandomWindows(model.config.vocab_size, config)
    if ours:
        store = str(Path(request["scratch"], "checkpoints"))
        checkpoints = Checkpoints(url=store, every_seconds=request["checkpoint_seconds"])
        job = Job("pretrain", "causal", {}, {}, SEED, numerics, "benchmark", checkpoints)
        train(model, Causal(config, job, model, noise), config, job)
    else:
        plain(model, config, noise)
    model.save_pretrained(Path(request["scratch"], "model"))
    warm = min(WARMUP_STEPS, len(step_times) - 2)
    tokens = (len(step_times) - 1 - warm) * config.batch * config.window
    rate, cost = tokens / (step_times[-1] - step_times[warm]), flops.flops_per_token(model, config.window)
    write_json(Path(request["result"]), {
        "tokens_per_second": rate, "flops_per_second": rate * cost, "ceiling": ceiling,
        "parameters": models.parameter_count(model), "memory_bytes": tracking.peak_memory(),
        "steps": len(step_times), "weights": file_hash(Path(request["scratch"], "model", "model.safetensors")),
    })  # fmt: skip


if __name__ == "__main__":
    main()
