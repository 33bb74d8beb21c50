"""One alignment, by whatever algorithm and seed it is told, and its evaluation.

Run as `python -m benchmarks.alignment_run FILE`, by `benchmarks/seeds.py` and `benchmarks/alternatives.py`, in the
project whose data it reads.
"""

import time
from pathlib import Path

from benchmarks import harness
from benchmarks.mixing_run import job_of
from tasks import compare, evaluate, ppo
from tasks.common import tables
from tasks.common.stage import write_json

TUNED = Path("data/evaluate/tuned/answers")


def main() -> None:
    """Align, evaluate, and write both stages' figures, with the wins over the tuned model and the time of aligning."""
    request = harness.read_request()
    settings = ppo.Config.model_validate(request["ppo"])
    job = job_of(ppo, None, settings, request, request["seed"])
    started = time.perf_counter()
    learnt = ppo.run(settings, job)
    seconds = round(time.perf_counter() - started, 1)
    asking = evaluate.Config.model_validate(request["evaluate"])
    sheet = job_of(evaluate, "policy", asking, request)
    sheet.inputs["model"] = job.outputs["model"]
    figures = evaluate.run(asking, sheet)
    answers = [tables.read(path).to_pylist() for path in (TUNED, sheet.outputs["answers"])]
    wins = compare.win_rate(answers[0], answers[1])
    write_json(Path(request["result"]), {**learnt, **figures, **wins, "seconds": seconds})


if __name__ == "__main__":
    main()
