"""One fine-tuning and its evaluation, in a process of their own.

`benchmarks/mixing.py` starts it as `python -m benchmarks.mixing_run FILE`, in the project whose data it reads.
"""

from pathlib import Path
from typing import Any

from benchmarks import harness
from tasks import evaluate, finetune
from tasks.common.settings import Checkpoints, Numerics, Settings
from tasks.common.stage import Job, declared_inputs, declared_outputs, write_json

SEED = 1


def job_of(module: Any, key: str | None, config: Settings, request: dict[str, Any], seed: int = SEED) -> Job:
    """Return a stage's job on the project's data that writes into the scratch folder."""
    scratch = Path(request["scratch"])
    outputs = {name: scratch / name for name in declared_outputs(module, key)}
    inputs = {name: Path(path) for name, path in declared_inputs(module, key, config).items()}
    checkpoints = Checkpoints(url=str(scratch / "checkpoints"), every_seconds=1e9)
    stage = module.__name__.rpartition(".")[2]
    return Job(
        stage, key, inputs, outputs, seed, Numerics.model_validate(request["numerics"]), "benchmark", checkpoints
    )


def main() -> None:
    """Tune, evaluate, and write the evaluation's figures."""
    request = harness.read_request()
    tuning = finetune.Config.model_validate(request["finetune"])
    job = job_of(finetune, None, tuning, request)
    finetune.run(tuning, job)
    asking = evaluate.Config.model_validate(request["evaluate"])
    sheet = job_of(evaluate, "tuned", asking, request)
    sheet.inputs["model"] = job.outputs["model"]
    write_json(Path(request["result"]), evaluate.run(asking, sheet))


if __name__ == "__main__":
    main()
