"""Distributed training: starting torchrun, its workers, and how they end with their launcher."""

import ctypes
import logging
import os
import signal
import time
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from tasks.common.harness.job import StageError, stage_name, stage_of
from tasks.common.settings import Numerics

LAUNCHER_PID = "BESSEMER_LAUNCHER"  # environment variable with the process id of torchrun, set in its workers
LAUNCHER_TIMEOUT_S = 10.0  # seconds for the launcher to notice that another process has ended


def wait_for_launcher() -> None:
    """Wait until the launcher ends this process, so that only the process at fault reports an error.

    Returns if the launcher does not: then the error occurred only in this process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(LAUNCHER_TIMEOUT_S)


def lost_peer(error: Exception) -> bool:
    """Return whether an error says that another process of the run has closed its connection, as by its end."""
    texts = ("by peer", "Broken pipe", "remote process exit")  # of gloo and, the last one, of NCCL
    return LAUNCHER_PID in os.environ and any(text in str(error) for text in texts)


def die_with_launcher(launcher: int) -> None:
    """Have the kernel kill this process when its launcher ends for any reason (Linux); otherwise it would be orphaned.

    Raises SystemExit if the launcher has ended already.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:  # Linux only
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != launcher:
        raise SystemExit(f"the launcher of this process, process {launcher}, has ended")


def rank() -> int:
    """Return this process's rank; rank 0 writes the outputs."""
    return int(os.environ.get("RANK", "0"))


def launch_processes(module: ModuleType, key: str | None, numerics: Numerics) -> None:
    """Become torchrun if the settings ask for several processes and no launcher has started them; else return.

    Raises StageError if the number of started processes differs from the settings, or exceeds this machine's devices.
    """
    processes, name = numerics.parallel.processes, stage_name(stage_of(module), key)
    started = "RANK" in os.environ
    if not getattr(module, "PARALLEL", False):
        if started:
            raise StageError(f"{name} does not train and runs in one process: start it without a launcher.")
        return
    size = int(os.environ.get("WORLD_SIZE", "1")) if started else processes
    if size != processes:
        raise StageError(
            f"{size} processes were started, but numerics.parallel.processes is {processes}: make them equal. The "
            "number is part of the model's identity because it changes the order of sums."
        )
    check_device_count(int(os.environ.get("LOCAL_WORLD_SIZE", size)) if started else processes, numerics.device)
    if processes > 1 and not started:
        os.environ["OMP_NUM_THREADS"] = str(numerics.threads)
        _torchrun(name, processes, [module.__name__.removesuffix(".stage"), *([key] if key else [])])


def _torchrun(name: str, processes: int, command: Sequence[str]) -> NoReturn:
    """Run a module in several processes under torchrun and exit with their status and their messages only."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # torchrun would log every failure twice
    os.environ[LAUNCHER_PID] = str(os.getpid())
    try:
        run.main(["--standalone", f"--nproc-per-node={processes}", "-m", *command])
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            killed = f"was killed by {signal.Signals(-failure.exitcode).name}; the run can be resumed"
            raise SystemExit(f"{name}: process {number} of {processes} {killed}.") from None
        raise SystemExit(failure.exitcode) from None
    except SignalException:
        raise SystemExit(130) from None
    raise SystemExit(0)


def check_device_count(processes: int, device: str) -> None:
    """Raise StageError for more processes on this machine than it has GPUs or, on a CPU, cores.

    `threads` is not checked: more threads than cores are slow, but they allow a model of a larger machine to be
    reproduced here.
    """
    if processes == 1:
        return  # `torch_setup.prepare_torch` checks the device of a single process
    if device == "cuda":
        import torch

        found, what = torch.cuda.device_count(), "GPUs"
    else:
        found, what = len(os.sched_getaffinity(0)), "cores"
    if processes > found:
        raise StageError(
            f"{processes} processes should train on this machine, which has {found} {what} available, but each process "
            f"needs one of its own: set numerics.parallel.processes to {max(found, 1)} or less, or start torchrun on "
            "several machines (docs/guides/distributed.md#several-machines)."
        )
