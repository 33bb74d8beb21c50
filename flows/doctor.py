"""`bessemer doctor`: is this machine and this folder fit for a run? Every line is good, a note, or says what to do."""

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
from tasks.common.settings import BessemerError, check, read_params

NEEDED_DISK_GB = 3.0
NEEDED_MEMORY_GB = 4.0
CPU_INFO = Path("/proc/cpuinfo")
PORTS = {3000: "the endpoint (`bessemer serve --port` takes another)", 4200: "Prefect's page (`bessemer ui --port`)"}


@dataclass(frozen=True)
class Finding:
    """One line of the examination. A note is worth knowing and stands in nobody's way."""

    good: bool
    text: str
    note: bool = False


def examine(project: Path) -> Iterator[Finding]:
    """Yield what was found, one thing after another."""
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
    for one in checks:
        yield one(project)
    for port, what in PORTS.items():
        taken = _taken(port)
        text = f"port {port} is in use; it is meant for {what}" if taken else f"port {port} is free"
        yield Finding(True, text, note=taken)


def _taken(port: int) -> bool:
    try:
        check_port(port, HOST, "")
    except ServingError:
        return True
    return False


def differing(lock: str) -> list[str]:
    """Return the packages that are not installed as the lock has them; local build tags (`+cpu`) do not count."""
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
        return Finding(False, "requirements.lock is missing: clone the project again whole, or `make lock`")
    wrong = differing(lock.read_text(encoding="utf-8"))
    if wrong:
        some = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        return Finding(False, f"packages differ from requirements.lock ({some}): `rm -r .venv && make run`")
    return Finding(True, "packages are those of requirements.lock")


def _settings(project: Path) -> Finding:
    try:
        check(read_params(project / "params.yaml"))
    except BessemerError as error:
        return Finding(False, str(error))
    return Finding(True, "params.yaml is complete and within bounds")


def _git(project: Path) -> Finding:
    inside = any((parent / ".git").exists() for parent in (project, *project.parents))
    if inside and shutil.which("git") is None:
        return Finding(False, "this is a git checkout, but the command git is missing: install it")
    return Finding(True, "git is there" if inside else "no git: DVC is told so, and runs are recorded without a commit")


def _dvc(project: Path) -> Finding:
    try:
        stages = graph.read(project)
    except BessemerError as error:
        return Finding(False, str(error))
    return Finding(True, f"DVC knows {len(stages)} stages")


def _disk(project: Path) -> Finding:
    free = shutil.disk_usage(project).free / 1e9
    good = free >= NEEDED_DISK_GB
    return Finding(good, f"{free:.0f} GB of disk free" + ("" if good else f": {NEEDED_DISK_GB:.0f} GB are needed"))


def _cores(project: Path) -> Finding:
    cores = available_cores()
    few = cores < 2
    return Finding(True, f"{cores} cores" + (": it works, at half the speed of two" if few else ""), note=few)


def _processor(project: Path) -> Finding:
    flags = CPU_INFO.read_text(encoding="utf-8").split() if CPU_INFO.exists() else []
    slow = "sse2" in flags and "avx512bw" not in flags  # an x86 processor on which torch has no products of bfloat16
    text = "no AVX-512: products of bfloat16 are computed in float32, and training is as slow as that"
    return Finding(True, text if slow else "the processor multiplies bfloat16, as far as is known here", note=slow)


def _memory(project: Path) -> Finding:
    import psutil

    free = psutil.virtual_memory().available / 1e9
    good = free >= NEEDED_MEMORY_GB
    return Finding(
        good, f"{free:.0f} GB of memory free" + ("" if good else f": up to {NEEDED_MEMORY_GB:.0f} GB are used")
    )
