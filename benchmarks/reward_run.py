"""One reward model and what it says of the held-out responses, in a process of its own.

`benchmarks/reward.py` starts it as `python -m benchmarks.reward_run FILE`, in the project whose encoder it starts from.
"""

from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.mixing_run import job_of
from tasks import reward
from tasks.common import tables
from tasks.common.evaluation.scoring import Scorer
from tasks.common.settings import Numerics
from tasks.common.stage import write_json


def main() -> None:
    """Train on the rows of the request, or of the project, and write metrics and scores."""
    request = harness.read_request()
    config = reward.Config.model_validate(request["reward"])
    job = job_of(reward, "policy", config, request)
    rows = request["rows"]
    if rows is not None:
        job.inputs["rankings"] = Path(request["scratch"], "rankings")
        tables.write(rows, job.inputs["rankings"], tables.schema("rankings"))
    metrics = reward.run(config, job)
    scorer = Scorer.load(job.outputs["model"], Numerics.model_validate(request["numerics"]))
    asked: dict[str, Any] = {
        text: row["prompt"] for row in rows or () if row["split"] == "heldout" for text in row["responses"]
    }
    scores = scorer.score([(prompt, text) for text, prompt in asked.items()])
    told = metrics.get("ranked_only") or metrics["gap_at_least_1"]
    found = {"metrics": metrics, "scores": list(zip(asked, scores, strict=True)), "told": told}
    write_json(Path(request["result"]), found)


if __name__ == "__main__":
    main()
