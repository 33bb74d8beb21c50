"""The profile `multi-gpu` from text to the endpoint on all GPUs of a machine: time, training speed, memory, quality.

Run as `make bench-multi_gpu_profile` or `python -m benchmarks multi_gpu_profile`. `--trial` without several GPUs tests
the script with the profile's CPU-sized twin.
"""

from benchmarks import profile_run
from benchmarks.harness import Measurements
from benchmarks.profile_twin import read_profile

PROFILE, MIN_GPUS = "multi-gpu", 2


def check() -> None:
    """Check nothing: `measure` counts the GPUs, because a trial needs none."""


def threads() -> int:
    """Return the threads of one stage."""
    return int(read_profile(PROFILE)["numerics"]["threads"])


def measure(*, trial: bool) -> Measurements:
    """Run the profile in a fresh project."""
    return profile_run.measure(PROFILE, MIN_GPUS, trial=trial)
