"""Model FLOPs and the machine's ceiling, from which comes the model FLOPs utilisation (MFU) of a training run.

Model FLOPs a token are those of Chowdhery et al. 2022 ("PaLM", appendix B): 6N + 12·L·H·Q·T, where N counts the weights
of all matrix products (the head's, not the embedding's, which is looked up), L layers, H heads of width Q, and T tokens
that a token attends to. The ceiling is not a data sheet's: it is the median of matrix products that this process did
itself, in the type and with the threads that the training has.
"""

import statistics
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.common.modelling import models
from tasks.common.settings import Numerics

if TYPE_CHECKING:
    import torch

ROWS, WIDEST = 1024, 2048  # of the CPU's product: wider ones are no faster there and take too long
GPU_WIDTH = 8192  # a GPU comes near its best only on large squares
SECONDS, FEWEST = 0.25, 3  # the CPU's product is repeated for so long, so often at least


@dataclass(frozen=True)
class Work:
    """What a token costs and what the machine can do."""

    flops_per_token: float
    ceiling: float  # FLOP/s

    @classmethod
    def of(cls, model: Any, length: int, numerics: Numerics, read_out: float = 1.0) -> "Work":
        """Return the work of training a model on sequences of a length; see `per_token`."""
        rows, columns = max((p.shape for p in model.parameters() if p.ndim == 2), key=lambda shape: shape.numel())
        dtype = models.dtype_of(model, numerics)
        return cls(per_token(model, length, read_out), ceiling(rows, columns, dtype, numerics.device))

    def of_all(self, processes: int) -> "Work":
        """Return the work of several processes that each do this."""
        return replace(self, ceiling=processes * self.ceiling)

    def utilisation(self, tokens: int, seconds: float) -> float:
        """Return the share of the ceiling that these tokens in this time amount to."""
        return tokens * self.flops_per_token / max(seconds, 1e-9) / self.ceiling


def per_token(model: Any, length: int, read_out: float = 1.0) -> float:
    """Return the model FLOPs of a token's forward and backward pass in sequences of `length` tokens.

    `read_out` is the share of the tokens that the head is worked out for (a masked model needs it where something is
    asked). Of the formula's 6 FLOPs a weight, 2 are the forward pass, 2 carry the gradient on and 2 give the weight's
    own: a frozen weight lacks the last, and the one before it too where nothing beneath it learns.
    """
    import torch

    total, learning = 0.0, False
    body = {id(module) for module in model.base_model.modules()}
    for module in model.modules():
        weights = list(module.parameters(recurse=False))
        if not isinstance(module, torch.nn.Embedding):  # which is looked up
            share = 1.0 if id(module) in body else read_out
            matrices = [weight for weight in weights if weight.ndim == 2]
            total += sum(share * weight.numel() * (2 + 2 * learning + 2 * weight.requires_grad) for weight in matrices)
        learning = learning or any(weight.requires_grad for weight in weights)
    config = model.config
    heads: int | None = getattr(config, "num_attention_heads", None)
    if not heads:  # a model without attention, such as Mamba: no token is compared with another
        return total
    width: int = getattr(config, "head_dim", None) or config.hidden_size // heads  # Q
    pairs: int = 12 * config.num_hidden_layers * heads * width * length
    return total + pairs


@cache
def ceiling(rows: int, columns: int, dtype: str, device: str) -> float:
    """Return the FLOP/s of a matrix product: of the model's largest matrix on a CPU, of a large square on a GPU.

    Measured once a process, with the threads that torch is set to. torch's own generators are left alone.
    """
    import torch

    cuda = device == "cuda"
    outer, inner, width = (GPU_WIDTH,) * 3 if cuda else (ROWS, min(columns, WIDEST), min(rows, WIDEST))
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(outer, inner, generator=generator, device=device).to(getattr(torch, dtype))
    b = torch.randn(inner, width, generator=generator, device=device).to(a.dtype)
    _seconds(a, b, cuda)  # the first one also loads kernels and asks for memory
    times: list[float] = []
    while len(times) < FEWEST or sum(times) < SECONDS:
        times.append(_seconds(a, b, cuda))
    return 2.0 * outer * inner * width / statistics.median(times)


def _seconds(a: "torch.Tensor", b: "torch.Tensor", cuda: bool) -> float:
    import torch

    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    torch.mm(a, b)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
