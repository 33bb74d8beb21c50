"""Reward models and what they say of held-out responses, in a process of its own.

`benchmarks/reward.py` starts it as `python -m benchmarks.reward_run FILE`, in the project whose data it reads:
one model on the project's rankings, or one for each fold of the request's, on a model that is fetched for them.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from benchmarks import harness
from benchmarks.mixing_run import job_of
from tasks import reward
from tasks.common import tables
from tasks.common.evaluation.scoring import Scorer
from tasks.common.modelling.frozen import Frozen
from tasks.common.settings import Numerics
from tasks.common.sources import archived_model
from tasks.common.sources.archived_model import Checkpoint
from tasks.common.stage import write_json


def main() -> None:
    """Train, and write metrics, and scores where there are folds."""
    request = harness.read_request()
    config = reward.Config.model_validate(request["reward"])
    if request["rows"] is None:
        found = {"metrics": reward.run(config, job_of(reward, "policy", config, request))}
    else:
        found = folds(config, request)
    write_json(Path(request["result"]), found)


def folds(config: reward.Config, request: dict[str, Any]) -> dict[str, Any]:
    """Train a model for each fold on the rows of all others; return what it says of the fold's, and processor time."""
    started, scratch = time.process_time(), Path(request["scratch"])
    archived_model.write(Checkpoint.model_validate(request["checkpoint"]), scratch / "checkpoint")
    numerics = Numerics.model_validate(request["numerics"])
    scores: list[tuple[str, float]] = []
    for fold in sorted(set(request["folds"])):
        job = job_of(reward, "policy", config, {**request, "scratch": str(scratch / str(fold))})
        job = replace(job, inputs={"model": scratch / "checkpoint", "rankings": scratch / f"rankings-{fold}"})
        rows = [
            {**row, "split": "heldout" if other == fold else "train"}
            for row, other in zip(request["rows"], request["folds"], strict=True)
        ]
        tables.write(rows, job.inputs["rankings"], tables.schema("rankings"))
        (scratch / str(fold)).mkdir()
        with patch.object(reward, "Frozen", Remembered):
            reward.run(config, job)
        scorer = Scorer.load(job.outputs["model"], numerics)
        scorer = replace(scorer, frozen=Remembered(scorer.model, scorer.tokenizer, numerics))
        asked = {text: row["prompt"] for row in rows if row["split"] == "heldout" for text in row["responses"]}
        scores += zip(asked, scorer.score([(prompt, text) for text, prompt in asked.items()]), strict=True)
    return {"scores": scores, "processor_minutes": (time.process_time() - started) / 60}


class Remembered(Frozen):
    """A frozen model that all folds put their heads on: what it makes of a response is worked out once for all."""

    known: ClassVar[dict[tuple[int, ...], Any]] = {}

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.states = self.known


if __name__ == "__main__":
    main()
