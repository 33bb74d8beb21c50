"""Measure against peers: `make bench` or `python -m benchmarks` runs all, `make bench-NAME` or a name behind it one.

Each leaves `benchmarks/results/NAME.json`, on a machine with a GPU `NAME-GPU.json`. `--trial` measures briefly and
writes nothing: it is for trying the benchmarks themselves, or a busy machine, whose figures must not pass for a record.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from benchmarks import harness, machine
from tasks.common.settings import BessemerError

NAMES = (
    "pretrain", "speed", "optimizers", "mixing", "medquad", "lora_memory", "reward", "ppo", "seeds", "alternatives",
    "curation", "data", "serve", "ranking", "pipeline",
)  # fmt: skip
ELSEWHERE = ("gpu",)  # takes a machine of its own, so it is run where it is named


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that were named; return 1 where one of them could not be measured."""
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
    known = (*NAMES, *ELSEWHERE)
    help = f"one of {', '.join(known)}; all but {', '.join(ELSEWHERE)} where none is named"
    parser.add_argument("names", nargs="*", metavar="NAME", help=help)
    parser.add_argument("--trial", action="store_true", help="measure briefly and write no result file")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    return options


def _run(name: str, *, trial: bool) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    print(f"{name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
    module.check()
    around = machine.surroundings(module.threads())
    measured: harness.Measured = module.measure(trial=trial)
    harness.show(measured)
    if not trial:
        file = "-".join([name, *around["hardware"].get("gpu", "").lower().split()])
        print(f"  -> {harness.write(name, measured, around, file=file).relative_to(harness.ROOT)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
