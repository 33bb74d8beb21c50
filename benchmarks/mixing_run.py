"""One fine-tuning run and its evaluation.

`benchmarks/mixing.py` runs it as `python -m benchmarks.mixing_run FILE`, in the project whose data it reads.
"""

from pathlib import Path
from typing import Any

from benchmarks import harness
from tasks.common.harness.job import Job, declared_inputs, declared_outputs, stage_of
from tasks.common.harness.records import write_json
from tasks.common.model_graph import links_of
from tasks.common.params_file import sections_of
from tasks.common.raw_params import read_params
from tasks.common.settings import Checkpoints, Numerics, Settings
from tasks.evaluate import stage as evaluate
from tasks.finetune import stage as finetune

SEED = 1


def make_job(module: Any, key: str | None, config: Settings, request: dict[str, Any], seed: int = SEED) -> Job:
    """Return a stage's job that reads the project's data and writes into the request's scratch folder."""
    scratch = Path(request["scratch"])
    outputs = {name: scratch / name for name in declared_outputs(module, key)}
    declared = declared_inputs(module, key, config, links_of(read_params()))
    inputs = {name: Path(path) for name, path in declared.items()}
    checkpoints = Checkpoints(url=str(scratch / "checkpoints"), every_seconds=1e9)
    stage = stage_of(module)
    numerics = Numerics.model_validate(request["numerics"])
    sections = sections_of(module, read_params(), key)
    return Job(stage, key, inputs, outputs, seed, numerics, "benchmark", checkpoints, sections=sections)


def main() -> None:
    """Fine-tune, evaluate, and write the evaluation's metrics."""
    request = harness.read_request()
    tuning = finetune.Config.model_validate(request["finetune"])
    job = make_job(finetune, "chat", tuning, request)
    finetune.run(tuning, job)
    evaluate_settings = evaluate.Config.model_validate(request["evaluate"])
    evaluate_job = make_job(evaluate, "tuned", evaluate_settings, request)
    evaluate_job.inputs["model"] = job.outputs["model"]
    write_json(Path(request["result"]), evaluate.run(evaluate_settings, evaluate_job))


if __name__ == "__main__":
    main()
