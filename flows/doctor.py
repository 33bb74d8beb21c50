"""`bessemer doctor`: check whether this machine and folder are ready for a run."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flows import graph
from serving.errors import ServingError
from serving.folders import available_cores
from serving.serve import HOST, check_port
from tasks.common.params_file import check
from tasks.common.raw_params import read_params
from tasks.common.settings import BessemerError

NEEDED_DISK_GB = 3.0
NEEDED_MEMORY_GB = 4.0
CPU_INFO = Path("/proc/cpuinfo")
PORTS = {3000: "the endpoint (`bessemer serve --port` changes it)", 4200: "Prefect's page (`bessemer ui --port`)"}


@dataclass(frozen=True)
class Finding:
    """The result of one check. A note is information that does not prevent a run."""

    good: bool
    text: str
    note: bool = False


def examine(project: Path) -> Iterator[Finding]:
    """Yield the results of all checks."""
    checks: tuple[Callable[[Path], Finding], ...] = (
        _python,
        _packages,
        _settings,
        _git,
        _dvc,
        _disk,
        _cores,
        _processor,
        _memory,
    )
    for check_one in checks:
        yield check_one(project)
    for port, what in PORTS.items():
        taken = _port_in_use(port)
        text = f"port {port} is in use; it is the default port of {what}" if taken else f"port {port} is free"
        yield Finding(True, text, note=taken)


def _port_in_use(port: int) -> bool:
    try:
        check_port(port, HOST, "")
    except ServingError:
        return True
    return False


def differing_packages(lock: str) -> list[str]:
    """Return the packages whose installed version differs from the lock, ignoring local version labels (`+cpu`)."""
    found = []
    for name, wanted in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", lock, flags=re.MULTILINE):
        try:
            version = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            version = "none"
        if version != wanted:
            found.append(f"{name} {version} instead of {wanted}")
    return found


def _python(project: Path) -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Finding(good, f"Python {version}" + ("" if good else ": 3.11 or later is needed"))


def _packages(project: Path) -> Finding:
    lock = project / "requirements.lock"
    if not lock.exists():
        return Finding(False, "requirements.lock is missing: clone the project again, or run `make lock`")
    wrong = differing_packages(lock.read_text(encoding="utf-8"))
    if wrong:
        some = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        return Finding(False, f"packages differ from requirements.lock ({some}): run `rm -r .venv && make run`")
    return Finding(True, "packages match requirements.lock")


def _settings(project: Path) -> Finding:
    try:
        check(read_params(project / "params.yaml"))
    except BessemerError as error:
        return Finding(False, str(error))
    return Finding(True, "params.yaml is complete and within bounds")


def _git(project: Path) -> Finding:
    inside = any((parent / ".git").exists() for parent in (project, *project.parents))
    if inside and shutil.which("git") is None:
        return Finding(False, "this is a git checkout, but git is not installed: install it")
    return Finding(
        True,
        "git is installed"
        if inside
        else "not a git checkout: DVC runs without git, and runs are recorded without a commit",
    )


def _dvc(project: Path) -> Finding:
    try:
        stages = graph.read(project)
    except BessemerError as error:
        return Finding(False, str(error))
    return Finding(True, f"DVC reads {len(stages)} stages")


def _disk(project: Path) -> Finding:
    free = shutil.disk_usage(project).free / 1e9
    good = free >= NEEDED_DISK_GB
    return Finding(good, f"{free:.0f} GB of disk free" + ("" if good else f": {NEEDED_DISK_GB:.0f} GB are needed"))


def _cores(project: Path) -> Finding:
    cores = available_cores()
    few = cores < 2
    return Finding(True, f"{cores} cores" + (": sufficient, at half the speed of two cores" if few else ""), note=few)


def _processor(project: Path) -> Finding:
    flags = CPU_INFO.read_text(encoding="utf-8").split() if CPU_INFO.exists() else []
    slow = "sse2" in flags and "avx512bw" not in flags  # an x86 processor without bfloat16 matrix products in torch
    text = "no AVX-512: bfloat16 matrix products are computed in float32, so bfloat16 training is not faster"
    return Finding(
        True, text if slow else "the processor supports bfloat16 matrix products, as far as can be detected", note=slow
    )


def _memory(project: Path) -> Finding:
    import psutil

    free = psutil.virtual_memory().available / 1e9
    good = free >= NEEDED_MEMORY_GB
    return Finding(
        good, f"{free:.0f} GB of memory free" + ("" if good else f": up to {NEEDED_MEMORY_GB:.0f} GB are used")
    )
