"""Put what is served into one plain folder: INT8 models, tokenizers, candidate names, and where it all came from.

Run as `python -m tasks.package`. It refuses where a gate failed. The identity of the package is the recipes and the
bytes of the two models in it; their parents are inside, and every stage's record stands in `provenance.json`.
"""

import json
import shutil
from typing import Any

from pydantic import Field

from tasks.common import identity, stage, tables
from tasks.common.settings import Settings
from tasks.common.stage import Job, StageError

RECORDS = (
    "ingest", "validate", "tokenize", "pretrain/clm", "pretrain/mlm", "finetune", "reward/policy",
    "reward/judge", "ppo", "prune", "quantize/policy", "quantize/encoder", "evaluate/base", "evaluate/tuned",
    "evaluate/policy", "evaluate/pruned", "evaluate/int8", "evaluate/encoder", "evaluate/encoder-int8", "compare",
)  # fmt: skip
NUMERICS = False  # no model computes here
INPUTS = {
    "policy": "data/quantize/policy/model",
    "encoder": "data/quantize/encoder/model",
    "corpus": "data/validate/corpus",
    "sources": "data/ingest/sources.json",
    "evaluation": "metrics/evaluate.json",
} | {f"record of {name}": f"data/{name}/record.json" for name in RECORDS}
OUTPUTS = {name: f"data/package/{name}" for name in ("policy", "encoder", "provenance.json")}


class Config(Settings):
    """Settings of the package."""

    refuse_failed_gates: bool = Field(description="Whether a failed gate stops the chain here")


def run(config: Config, job: Job) -> dict[str, Any]:
    """Write the package and return its model tag; raise StageError where a gate failed."""
    evaluation, sources = (
        json.loads(job.inputs[name].read_text(encoding="utf-8")) for name in ("evaluation", "sources")
    )
    failed = [gate for gate in evaluation["gates"] if not gate["passed"]]
    if failed and config.refuse_failed_gates:
        reasons = "; ".join(f"{gate['name']}: {gate['value']} against a limit of {gate['limit']}" for gate in failed)
        raise StageError(
            f"{len(failed)} of {len(evaluation['gates'])} gates failed, so nothing was packaged: {reasons}. "
            "See metrics/evaluate.json; train longer, or change compare.gates in params.yaml if the limit is wrong."
        )
    records = [json.loads(job.inputs[f"record of {name}"].read_text(encoding="utf-8")) for name in RECORDS]
    served = [record for record in records if record["stage"].startswith("quantize@")]
    recipe, content = (identity.hash_json([record[part] for record in served]) for part in ("recipe", "content"))
    tag = identity.tag(recipe, content)
    for name in ("policy", "encoder"):
        shutil.copytree(job.inputs[name], job.outputs[name])
    corpus = tables.read(job.inputs["corpus"], "train").column("names").to_pylist()
    names = sorted({name for row in corpus for name in row})
    if not names:
        raise StageError(
            "no text of the corpus holds a name, so nothing could stand in a [MASK]'s place; add a source of facts "
            "to ingest.sources."
        )
    stage.write_json(job.outputs["encoder"] / "names.json", names)
    stage.write_json(job.outputs["provenance.json"], {
        "model": tag, "recipe": recipe, "content": content, "stages": records, "sources": sources,
        "evaluation": evaluation,
    })  # fmt: skip
    size = sum(path.stat().st_size for name in ("policy", "encoder") for path in job.outputs[name].iterdir())
    return {"model": tag, "bytes": size, "names": len(names), "gates_failed": len(failed)}


if __name__ == "__main__":
    stage.main("tasks.package")
