"""The profile `gpu` from text to the endpoint on one GPU: time, training speed, memory and quality.

Run as `make bench-gpu_profile` or `python -m benchmarks gpu_profile`. `--trial` without a GPU tests the script with the
profile's CPU-sized twin.
"""

from benchmarks import profile_run
from benchmarks.harness import Measurements
from benchmarks.profile_twin import read_profile

PROFILE, MIN_GPUS = "gpu", 1


def check() -> None:
    """Check nothing: `measure` checks for a GPU, because a trial needs none."""


def threads() -> int:
    """Return the threads of one stage."""
    return int(read_profile(PROFILE)["numerics"]["threads"])


def measure(*, trial: bool) -> Measurements:
    """Run the profile in a fresh project."""
    return profile_run.measure(PROFILE, MIN_GPUS, trial=trial)
