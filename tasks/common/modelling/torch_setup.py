"""Setting up torch for a stage: threads, determinism, seeds, memory and the device."""

from typing import TYPE_CHECKING

from tasks.common.overrides import bfloat16, masks
from tasks.common.random_streams import Stream, seed_torch
from tasks.common.settings import Numerics

if TYPE_CHECKING:
    import torch


def prepare_torch(numerics: Numerics, seed: int) -> "torch.device":
    """Set threads, determinism and seeds of this process and return the device; raise StageError without a GPU."""
    import os

    import torch

    from tasks.common.harness.job import StageError

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs this to be deterministic
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR", numerics.device)  # else DeepSpeed guesses and logs its guess
    _keep_freed_memory()
    torch.set_num_threads(numerics.threads)
    torch.use_deterministic_algorithms(True, warn_only=numerics.device == "cuda")
    # Takes a tenth of a step and serves only to reveal reads of uninitialized memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    seed_torch(seed, Stream.INITIAL_WEIGHTS)
    masks.install()
    uses_bfloat16 = "bfloat16" in (numerics.dtype.decoder, numerics.dtype.encoder)
    if numerics.device == "cpu" and uses_bfloat16 and not bfloat16.has_native_bfloat16():
        bfloat16.install()
    if numerics.device == "cuda" and not torch.cuda.is_available():
        raise StageError(
            "numerics.device is cuda, but torch finds no GPU on this machine; set it to cpu, or use a machine with a "
            "GPU."
        )
    if numerics.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(numerics.device)


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor instead of returning it to the system.

    Every step frees and allocates the same tensors of some MB. If they are returned, the kernel has to clear fresh
    pages: 20,000 per step, a tenth of the time with one stage running and up to half with two in parallel.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # glibc only
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # the M_... constants of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)


def release_freed_memory() -> None:
    """Return the memory kept by `_keep_freed_memory` to the system, after the last step."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # glibc only
        trim(0)
