"""The machine under the figures: its ceiling, its hardware, the versions in use and the commit.

The ceiling is what one matrix product reaches in GFLOP/s on the threads that a benchmark computes with; it is printed
before anything is measured. `python -m benchmarks.machine FILE` is the process that measures it.
"""

import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import harness
from tasks.common import stage

SIZE = 1024
REPEATS = 15
SAMPLED_SECONDS = 2.0
BUSY_PERCENT = 15.0
PACKAGES = (
    "torch", "transformers", "accelerate", "tokenizers", "optimum-onnx", "onnxruntime", "onnxruntime-genai", "bentoml",
    "prefect", "dvc", "great-expectations", "pyarrow", "numpy", "rensa",
)  # fmt: skip


def surroundings(threads: int) -> dict[str, Any]:
    """Measure the ceiling on a number of threads, print it, and return what a result says of its surroundings."""
    busy = _busy_percent()
    ceiling = harness.in_process("benchmarks.machine", {"threads": threads})
    gpu = ceiling.pop("gpu")
    hardware = {**_hardware(), **({"gpu": gpu} if gpu else {}), "busy_before_percent": busy}
    hardware["ceiling"] = {"threads": threads, **ceiling}
    rates = ", ".join(f"{ceiling[kind]:,.0f} GFLOP/s in {kind.removesuffix('_gflops')}" for kind in ceiling)
    print(f"  {hardware['cpu']}, {hardware['cores']} cores; a matrix product on {threads} thread(s): {rates}")
    if busy > BUSY_PERCENT:
        print(f"  Others keep {busy:.0f} % of the cores busy: take these figures for a trial, not for a record.")
    return {"commit": commit(), "hardware": hardware, "versions": versions()}


def has_gpu() -> bool:
    """Return whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def _busy_percent() -> float:
    """Return what share of the cores others use just now; the load average would tell of the benchmark before, too."""
    import psutil

    busy: float = psutil.cpu_percent(interval=SAMPLED_SECONDS)
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
    """Return Python's version and those of the packages that bear on speed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the commit that is checked out, with `-dirty` where code or settings differ from it."""
    found = stage.commit(harness.ROOT)
    return f"{found['commit'] or 'unknown (no git here)'}{'-dirty' if found['dirty'] else ''}"


def _product(dtype: str) -> float:
    """Return the median GFLOP/s of a square product, after three that warm up."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIZE, SIZE, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(REPEATS + 3):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return round(2 * SIZE**3 / statistics.median(seconds[3:]) / 1e9, 1)


def main() -> None:
    """Measure both types on the threads that were asked for."""
    import torch

    request = harness.read_request()
    torch.set_num_threads(request["threads"])
    figures = {f"{name}_gflops": _product(dtype) for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))}
    gpu = torch.cuda.get_device_name() if has_gpu() else None
    stage.write_json(Path(request["result"]), {**figures, "gpu": gpu})


if __name__ == "__main__":
    main()
