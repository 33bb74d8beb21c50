"""Run benchmarks: all by `make bench` or `python -m benchmarks`, one by `make bench-NAME` or its name as argument.

Each writes `benchmarks/results/NAME.json`, on a machine with a GPU `NAME-GPU.json`. `--trial` measures briefly and
writes nothing; use it to test a benchmark, or on a busy machine, whose figures must not be recorded.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from benchmarks import harness, machine
from tasks.common.settings import BessemerError

NAMES = (
    "pretrain", "speed", "optimizers", "mixing", "medquad", "lora_memory", "reward", "ppo", "seeds", "alternatives",
    "curation", "data", "sources", "serve", "ranking", "pipeline",
)  # fmt: skip
OPTIONAL_NAMES = ("gpu", "gpu_profile", "multi_gpu_profile")  # need GPUs, so they run only if they are named


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, by default all; return 1 if one of them failed."""
    options = _options(arguments)
    failed = []
    for name in options.names or NAMES:
        try:
            _run(name, trial=options.trial)
        except BessemerError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure against peers.")
    known = (*NAMES, *OPTIONAL_NAMES)
    help = f"one of {', '.join(known)}; default: all but {', '.join(OPTIONAL_NAMES)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=help)
    parser.add_argument("--trial", action="store_true", help="measure briefly and write no result file")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"unknown benchmark: {', '.join(unknown)}; known are {', '.join(known)}")
    return options


def _run(name: str, *, trial: bool) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    print(f"{name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
    module.check()
    surroundings = machine.surroundings(module.threads())
    measured: harness.Measurements = module.measure(trial=trial)
    harness.print_results(measured)
    if not trial:
        file = "-".join([name, *surroundings["hardware"].get("gpu", "").lower().split()])
        print(f"  -> {harness.write(name, measured, surroundings, file=file).relative_to(harness.ROOT)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
