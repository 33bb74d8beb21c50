"""A rough speed of this machine, from which `bessemer init` chooses numbers of steps and estimates times."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
SIZE = 768  # of the square matrices that are multiplied
REPEATS = 20
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}
BFLOAT16_GAIN = 2.0  # of matrix products in bfloat16 over float32, on processors that have them
TRAINING_SHARE = 0.6  # of the speed of large matrix products that training reaches (LoRA of 135 M parameters: 0.64)
SAMPLING_SHARE = 0.08  # the same for sampling replies in batches
GPU_FLOPS = 6e13  # per second that training reaches on a current data-centre GPU; not measured


@dataclass(frozen=True)
class Machine:
    """Cores, the class of the device, and floating-point operations per second in training."""

    cores: int
    device: str  # cpu | cuda
    training_flops: float

    @property
    def sampling_flops(self) -> float:
        """Floating-point operations per second of sampling."""
        return self.training_flops / TRAINING_SHARE * SAMPLING_SHARE

    def training_seconds(self, parameters: int, tokens: float, *, frozen: bool = False) -> float:
        """Return the seconds that training on `tokens` takes: 6 operations per token and parameter, 4 if frozen.

        Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1; with frozen weights their gradients
        are not computed.
        """
        return (4 if frozen else 6) * parameters * tokens / self.training_flops

    def scoring_seconds(self, parameters: int, tokens: float) -> float:
        """Return the seconds that reading `tokens` takes without training: 2 operations per token and parameter."""
        return 2 * parameters * tokens / self.training_flops

    def sampling_seconds(self, parameters: int, tokens: float) -> float:
        """Return the seconds that sampling `tokens` takes: 2 operations per token and parameter."""
        return 2 * parameters * tokens / self.sampling_flops


def measure() -> Machine:
    """Return this machine's figures; multiplies matrices for a fraction of a second."""
    cores = len(os.sched_getaffinity(0))
    if shutil.which("nvidia-smi"):
        return Machine(cores, "cuda", GPU_FLOPS)
    import numpy as np

    matrix = np.ones((SIZE, SIZE), dtype=np.float32)
    matrix @ matrix  # the first product starts the threads
    started = time.process_time()  # of all threads, so that other programs on the machine do not count
    for _ in range(REPEATS):
        matrix @ matrix
    flops = 2 * SIZE**3 * REPEATS * cores / (time.process_time() - started)
    flags = set(CPU_INFO.read_text(encoding="utf-8").split()) if CPU_INFO.exists() else set()
    gain = BFLOAT16_GAIN if flags & BFLOAT16_FLAGS else 1.0
    return Machine(cores, "cpu", flops * gain * TRAINING_SHARE)
