"""Run one alignment with a given algorithm and seed, and its evaluation.

`benchmarks/seeds.py` and `benchmarks/alternatives.py` run it as `python -m benchmarks.alignment_run FILE`, in the
project whose data it reads.
"""

import time
from pathlib import Path

from benchmarks import harness
from benchmarks.mixing_run import make_job
from tasks.align import stage as align
from tasks.common import tables
from tasks.common.harness.records import write_json
from tasks.compare import preferences
from tasks.evaluate import stage as evaluate

TUNED_ANSWERS = Path("data/evaluate/tuned/answers")


def main() -> None:
    """Align and evaluate; write both stages' metrics, the win rate over the tuned model, and the alignment time."""
    request = harness.read_request()
    settings = align.Config.model_validate(request["align"])
    job = make_job(align, "policy", settings, request, request["seed"])
    started = time.perf_counter()
    align_metrics = align.run(settings, job)
    seconds = round(time.perf_counter() - started, 1)
    evaluate_settings = evaluate.Config.model_validate(request["evaluate"])
    evaluate_job = make_job(evaluate, "policy", evaluate_settings, request)
    evaluate_job.inputs["model"] = job.outputs["model"]
    figures = evaluate.run(evaluate_settings, evaluate_job)
    answers = [tables.read(path).to_pylist() for path in (TUNED_ANSWERS, evaluate_job.outputs["answers"])]
    pairs = preferences.pair_replies(answers[0], answers[1])
    wins = preferences.win_rate(pairs, preferences.by_score(pairs))
    write_json(Path(request["result"]), {**align_metrics, **figures, **wins, "seconds": seconds})


if __name__ == "__main__":
    main()
