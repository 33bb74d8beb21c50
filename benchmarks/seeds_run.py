"""One alignment by PPO with a seed of its own and its evaluation: `python -m benchmarks.seeds_run FILE`.

`benchmarks/seeds.py` starts it, in the project whose data it reads.
"""

from pathlib import Path

from benchmarks import harness
from benchmarks.mixing_run import job_of
from tasks import evaluate, ppo
from tasks.common.stage import write_json


def main() -> None:
    """Align, evaluate, and write both stages' figures."""
    request = harness.read_request()
    settings = ppo.Config.model_validate(request["ppo"])
    job = job_of(ppo, None, settings, request, request["seed"])
    learnt = ppo.run(settings, job)
    asking = evaluate.Config.model_validate(request["evaluate"])
    sheet = job_of(evaluate, "policy", asking, request)
    sheet.inputs["model"] = job.outputs["model"]
    write_json(Path(request["result"]), {**learnt, **evaluate.run(asking, sheet)})


if __name__ == "__main__":
    main()
