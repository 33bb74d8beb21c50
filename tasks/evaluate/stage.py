"""Evaluate one model for the scorecard: every evaluation of `evaluations` that applies to it.

Run as `python -m tasks.evaluate ENTRY`. An entry of `evaluate` names a model and how it replies; the section
`evaluations` names what is measured of the models (`evaluations.py` lists the kinds). The kind of model and the tables
that have rows decide which evaluations apply: a figure that does not apply is absent, with the reason, never an error.
Results are kept (`results.py`), so that a new evaluation measures no old one again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.common import tables
from tasks.common.evaluation.results import ResultStore
from tasks.common.harness.job import Job, Link, StageError
from tasks.evaluate.evaluation import Evaluation, Facts, Result, Row, Rows, answer_row, model_kind_of
from tasks.evaluate.evaluations import AnyEvaluation, default_evaluations
from tasks.evaluate.harness import FOLDER as EVALUATION_FOLDER
from tasks.evaluate.subject import Config, Subject
from tasks.evaluate.toxicity import FOLDER as TOXICITY_FOLDER

__all__ = ["AnyEvaluation", "Config", "Facts", "default_evaluations", "model_kind_of"]  # for checks of settings

INPUTS = {
    "model": "{config.model}",
    "corpus": "data/validate/corpus",
    "instructions": "data/validate/instructions",
    "rankings": "data/validate/rankings",
    "tokenizer": "data/tokenize/tokenizer",
    "shards": "data/tokenize/shards",
    "toxicity": TOXICITY_FOLDER.as_posix(),
    "evaluation": EVALUATION_FOLDER.as_posix(),
}
OUTPUTS = {"answers": "data/evaluate/{key}/answers"}
SECTIONS = ("evaluations",)

TEXT_COLUMNS = (
    "id",
    "entity",
    "split",
    "kind",
    "evaluation",
    "question",
    "reply",
    "extracted",
    "reference",
    "seen_text",
)
NUMBER_COLUMNS = (
    "reward", "judge_score", "toxicity", "chrf", "rouge_l", "nats", "tokens", "text_nats", "bytes", "top",
    "chosen_nats", "rejected_nats", "absolute_error",
)  # fmt: skip
SAMPLED = "sampled"


def graph_inputs(config: Config, links: Sequence[Link]) -> dict[str, str]:
    """Return the reward models that score replies: for each role the first in `params.yaml`."""
    found: dict[str, str] = {}
    for link in links:
        if link.stage == "reward":
            found.setdefault(link.role, link.folder)
    return found


def run(config: Config, job: Job) -> dict[str, Any]:
    """Evaluate the job's model; return its figures and write every answer as a row."""
    subject = Subject(config, job, ResultStore.for_job(job))
    if subject.kind not in ("causal", "masked", "classifier"):
        raise StageError(f"evaluate.{job.key}.model: {subject.path} contains no causal, masked or classifier model.")
    evaluations: Mapping[str, Evaluation] = job.sections["evaluations"]
    applicable = {name: one for name, one in evaluations.items() if one.is_for(str(job.key), subject.kind)}
    results = {name: _measure(name, one, subject) for name, one in applicable.items()}
    _write_answers(_answer_rows(results, subject), job.outputs["answers"])
    figures: Row = {}
    for name, result in results.items():
        figures |= result.figures if name == applicable[name].KIND else {name: result.figures}
    described = {name: _describe(applicable[name], result) for name, result in results.items()}
    return {"model": job.key, "kind": subject.kind, **subject.size, **figures, "evaluations": described}


def _measure(name: str, evaluation: Evaluation, subject: Subject) -> Result:
    """Return an evaluation's result: a stored one, or a measured one."""
    settings: Row = evaluation.model_dump(mode="json", exclude={"models"})
    if evaluation.USES_REPLIES:
        settings["replies"] = subject.config.model_dump(mode="json", exclude={"model"})
    if versions := evaluation.versions():
        settings["versions"] = versions
    inputs = ["model", *evaluation.inputs()]
    if subject.config.sources is not None and "instructions" in inputs:
        settings["sources"] = subject.config.sources
    stored = subject.store.get({"evaluation": settings}, inputs, lambda: vars(evaluation.measure(subject)))
    result = Result(**stored)
    for row in result.rows:
        row["evaluation"] = name
    return result


def _describe(evaluation: Evaluation, result: Result) -> Row:
    """Return what the scorecard keeps of an evaluation besides its figures."""
    described = {"kind": evaluation.KIND, "applies_to": evaluation.APPLIES_TO, "means": result.means}
    return {**described, **result.details, **({"absent": result.absent} if result.absent else {})}


def _answer_rows(results: Mapping[str, Result], subject: Subject) -> Rows:
    """Return the rows of all evaluations, and the sampled replies with the columns that they gave them."""
    rows = [row for result in results.values() for row in result.rows]
    columns = [result.sampled for result in results.values() if result.sampled is not None]
    if not columns:
        return rows
    sampled = subject.samples
    scores = {column: values for found in columns for column, values in found.items()}
    for index, (row, text) in enumerate(zip(sampled.rows, sampled.texts, strict=True)):
        own = {column: values[index] for column, values in scores.items()}
        rows.append(answer_row(row, SAMPLED, text, **own))
    return rows


def _write_answers(rows: Sequence[Row], path: Path) -> None:
    import pyarrow as pa

    text = [(name, pa.string()) for name in TEXT_COLUMNS]
    numbers = [(name, pa.float64()) for name in NUMBER_COLUMNS]
    tables.write(rows, path, pa.schema([*text, ("correct", pa.bool_()), *numbers]))
