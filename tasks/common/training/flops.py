"""Model FLOPs utilisation (MFU) of a training run: model FLOPs per token, and the machine's peak FLOP/s.

Model FLOPs per token follow Chowdhery et al. 2022 ("PaLM", appendix B): 6N + 12·L·H·Q·T with N weights of matrix
products (the head's, not the embedding's, which is a lookup), L layers, H heads of width Q and T tokens of context. The
peak is measured and not taken from a data sheet: it is the median over matrix products that this process runs, in the
dtype and with the threads of the training.
"""

import statistics
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.common.modelling import models
from tasks.common.random_streams import Stream, torch_generator
from tasks.common.settings import Numerics

if TYPE_CHECKING:
    import torch

CPU_ROWS, MAX_CPU_WIDTH = 1024, 2048  # of the matrix product on a CPU: wider ones are no faster and take too long
GPU_WIDTH = 8192  # a GPU reaches its peak only on large square matrices
MIN_MEASURED_SECONDS, MIN_MEASUREMENTS = 0.25, 3  # the product is repeated until both are reached


@dataclass(frozen=True)
class MfuEstimator:
    """Model FLOPs per token of a training run and peak FLOP/s of its hardware."""

    flops_per_token: float
    peak_flops: float  # FLOP/s

    @classmethod
    def for_model(cls, model: Any, length: int, numerics: Numerics, head_share: float = 1.0) -> "MfuEstimator":
        """Return the estimator for training a model on sequences of `length` tokens; see `flops_per_token`."""
        rows, columns = max((p.shape for p in model.parameters() if p.ndim == 2), key=lambda shape: shape.numel())
        dtype = models.dtype_of(model, numerics)
        peak_flops = measure_peak_flops(rows, columns, dtype, numerics.device)
        return cls(flops_per_token(model, length, head_share), peak_flops)

    def for_processes(self, processes: int) -> "MfuEstimator":
        """Return the estimator of several processes on hardware of their own."""
        return replace(self, peak_flops=processes * self.peak_flops)

    def utilisation(self, tokens: int, seconds: float) -> float:
        """Return the MFU, as a fraction of the peak, of training on `tokens` tokens in `seconds`."""
        return tokens * self.flops_per_token / max(seconds, 1e-9) / self.peak_flops


def flops_per_token(model: Any, length: int, head_share: float = 1.0) -> float:
    """Return the model FLOPs per token of a forward and backward pass over sequences of `length` tokens.

    `head_share` is the fraction of tokens for which the head is computed (a masked model computes it for the masked
    ones only). Of the formula's 6 FLOPs per weight, 2 are the forward pass, 2 the gradient of the inputs and 2 the
    gradient of the weight. A frozen weight needs no weight gradient, and no input gradient if no layer below it is
    trained.
    """
    import torch

    total, trained_below = 0.0, False
    body = {id(module) for module in model.base_model.modules()}
    for module in model.modules():
        weights = list(module.parameters(recurse=False))
        if not isinstance(module, torch.nn.Embedding):  # a lookup
            token_share = 1.0 if id(module) in body else head_share
            matrices = [weight for weight in weights if weight.ndim == 2]
            total += sum(token_share * w.numel() * (2 + 2 * trained_below + 2 * w.requires_grad) for w in matrices)
        trained_below = trained_below or any(weight.requires_grad for weight in weights)
    config = model.config
    heads: int | None = getattr(config, "num_attention_heads", None)
    if not heads:  # a model without attention, such as Mamba
        return total
    width: int = getattr(config, "head_dim", None) or config.hidden_size // heads  # Q
    attention: int = 12 * config.num_hidden_layers * heads * width * length
    return total + attention


@cache
def measure_peak_flops(rows: int, columns: int, dtype: str, device: str) -> float:
    """Return the measured FLOP/s of a matrix product: of the model's largest matrix on a CPU, a large square on a GPU.

    Measured once per process and argument, with torch's current number of threads. Does not use torch's global
    generators.
    """
    import torch

    cuda = device == "cuda"
    cpu_shape = CPU_ROWS, min(columns, MAX_CPU_WIDTH), min(rows, MAX_CPU_WIDTH)
    outer, inner, width = (GPU_WIDTH,) * 3 if cuda else cpu_shape
    generator = torch_generator(device, 0, Stream.MATRIX_PRODUCT)
    a = torch.randn(outer, inner, generator=generator, device=device).to(getattr(torch, dtype))
    b = torch.randn(inner, width, generator=generator, device=device).to(a.dtype)
    _time_matmul(a, b, cuda)  # warm-up: the first call loads kernels and allocates memory
    times: list[float] = []
    while len(times) < MIN_MEASUREMENTS or sum(times) < MIN_MEASURED_SECONDS:
        times.append(_time_matmul(a, b, cuda))
    return 2.0 * outer * inner * width / statistics.median(times)


def _time_matmul(a: "torch.Tensor", b: "torch.Tensor", cuda: bool) -> float:
    import torch

    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    torch.mm(a, b)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
