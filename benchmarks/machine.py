"""The environment of a benchmark: the machine's peak rate, its hardware, package versions and the commit.

The peak rate ("ceiling") is the GFLOP/s of a matrix product with the benchmark's number of threads. It is printed
before the measurements. `python -m benchmarks.machine FILE` measures it.
"""

import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import harness
from tasks.common.harness import records

MATRIX_SIZE = 1024
REPEATS = 15
BUSY_SAMPLE_SECONDS = 2.0
MAX_BUSY_PERCENT = 15.0
PACKAGES = (
    "torch", "transformers", "accelerate", "tokenizers", "optimum-intel", "openvino", "openvino-genai", "nncf",
    "bentoml", "prefect", "dvc", "great-expectations", "pyarrow", "numpy", "rensa",
)  # fmt: skip


def surroundings(threads: int) -> dict[str, Any]:
    """Measure and print the peak rate; return the environment entries of a result file."""
    busy = _busy_percent()
    ceiling = harness.run_module("benchmarks.machine", {"threads": threads})
    gpu = ceiling.pop("gpu")
    hardware = {**_hardware(), **({"gpu": gpu} if gpu else {}), "busy_before_percent": busy}
    hardware["ceiling"] = {"threads": threads, **ceiling}
    rates = ", ".join(f"{ceiling[kind]:,.0f} GFLOP/s in {kind.removesuffix('_gflops')}" for kind in ceiling)
    print(f"  {hardware['cpu']}, {hardware['cores']} cores; a matrix product on {threads} thread(s): {rates}")
    if busy > MAX_BUSY_PERCENT:
        print(f"  Other processes use {busy:.0f} % of the cores: treat these figures as a trial, not as a record.")
    return {"commit": commit(), "hardware": hardware, "versions": versions()}


def has_gpu() -> bool:
    """Return whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def gpu_count() -> int:
    """Return how many GPUs torch sees."""
    import torch

    return torch.cuda.device_count()


def _busy_percent() -> float:
    """Return the CPU use of other processes in per cent. The load average would include an earlier benchmark."""
    import psutil

    busy: float = psutil.cpu_percent(interval=BUSY_SAMPLE_SECONDS)
    return round(busy, 1)


def _hardware() -> dict[str, Any]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    return {"cpu": _processor(), "cores": cores, "memory_gb": round(memory / 1e9, 1), "system": platform.system()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect speed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the current commit, with `-dirty` if code or settings differ from it."""
    found = records.commit(harness.ROOT)
    return f"{found['commit'] or 'unknown (no git here)'}{'-dirty' if found['dirty'] else ''}"


def _matmul_gflops(dtype: str) -> float:
    """Return the median GFLOP/s of a square matrix product, after three warm-up runs."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(MATRIX_SIZE, MATRIX_SIZE, generator=generator).to(getattr(torch, dtype)) for _ in range(2)
    )
    seconds = []
    for _ in range(REPEATS + 3):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return round(2 * MATRIX_SIZE**3 / statistics.median(seconds[3:]) / 1e9, 1)


def main() -> None:
    """Measure float32 and bfloat16 with the requested number of threads."""
    import torch

    request = harness.read_request()
    torch.set_num_threads(request["threads"])
    figures = {f"{name}_gflops": _matmul_gflops(dtype) for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))}
    gpu = torch.cuda.get_device_name() if has_gpu() else None
    records.write_json(Path(request["result"]), {**figures, "gpu": gpu})


if __name__ == "__main__":
    main()
