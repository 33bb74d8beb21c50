"""Train reward models and score held-out responses.

`benchmarks/reward.py` runs it as `python -m benchmarks.reward_run FILE`, in the project whose data it reads. It trains
one model on the project's rankings, or one per fold of the request's rows, on a checkpoint that it downloads.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from benchmarks import harness
from benchmarks.mixing_run import make_job
from tasks.common import tables
from tasks.common.harness.records import write_json
from tasks.common.reward.frozen import FrozenBackbone
from tasks.common.reward.scoring import Scorer
from tasks.common.settings import Numerics
from tasks.ingest import archived_model
from tasks.ingest.archived_model import Checkpoint
from tasks.reward import stage as reward


def main() -> None:
    """Train, and write the metrics or, with folds, the scores."""
    request = harness.read_request()
    config = reward.Config.model_validate(request["reward"])
    if request["rows"] is None:
        found = {"metrics": reward.run(config, make_job(reward, "train", config, request))}
    else:
        found = cross_validate(config, request)
    write_json(Path(request["result"]), found)


def cross_validate(config: reward.Config, request: dict[str, Any]) -> dict[str, Any]:
    """Train one model per fold on the other folds' rows; return the scores of the held-out rows, and the CPU time."""
    started, scratch = time.process_time(), Path(request["scratch"])
    archived_model.write(Checkpoint.model_validate(request["checkpoint"]), scratch / "checkpoint")
    numerics = Numerics.model_validate(request["numerics"])
    scores: list[tuple[str, float]] = []
    for fold in sorted(set(request["folds"])):
        job = make_job(reward, "train", config, {**request, "scratch": str(scratch / str(fold))})
        job = replace(job, inputs={"model": scratch / "checkpoint", "rankings": scratch / f"rankings-{fold}"})
        rows = [
            {**row, "split": "heldout" if other == fold else "train"}
            for row, other in zip(request["rows"], request["folds"], strict=True)
        ]
        tables.write(rows, job.inputs["rankings"], tables.schema("rankings"))
        (scratch / str(fold)).mkdir()
        with patch.object(reward, "FrozenBackbone", CachedFrozen):
            reward.run(config, job)
        scorer = Scorer.load(job.outputs["model"], numerics)
        scorer = replace(scorer, frozen=CachedFrozen(scorer.model, scorer.tokenizer, numerics))
        prompts = {text: row["prompt"] for row in rows if row["split"] == "heldout" for text in row["responses"]}
        scores += zip(prompts, scorer.score([(prompt, text) for text, prompt in prompts.items()]), strict=True)
    return {"scores": scores, "processor_minutes": (time.process_time() - started) / 60}


class CachedFrozen(FrozenBackbone):
    """A frozen backbone whose states are cached across folds, so that each response is computed once."""

    known: ClassVar[dict[tuple[int, ...], Any]] = {}

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.states = self.known


if __name__ == "__main__":
    main()
