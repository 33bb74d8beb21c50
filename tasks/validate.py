"""Stage `validate`: refuse bad rows with their reason, then hold each table to its Great Expectations suite.

Run as `python -m tasks.validate`. Clean tables, refused rows (with a column `reason`) and a report for people are left
behind; the rows read are the rows kept and the rows refused. A failed suite stops the run; the report about it is then
kept at `data/.failed/validate/`, because outputs are moved into place only where a stage is complete.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common import checks, stage, suites, tables, validation_report
from tasks.common.stage import Job, StageError
from tasks.common.validation_report import Summary

if TYPE_CHECKING:
    import pyarrow as pa

INPUTS = {table: f"data/ingest/{table}" for table in tables.TABLES}
OUTPUTS = {
    **{table: f"data/validate/{table}" for table in tables.TABLES},
    "refused": "data/validate/refused",
    "report": "data/validate/report",
}
FAILED = Path("data/.failed/validate")


class Config(checks.Limits):
    """Settings of `validate`."""


def run(config: Config, job: Job) -> dict[str, Any]:
    """Check rows, write clean and refused tables, run the suites, write the report; raise StageError if one fails."""
    from tqdm import tqdm

    summaries: list[Summary] = []
    failures: list[str] = []
    for table in tqdm(tables.TABLES, desc="validate", unit="table"):
        content = tables.read(job.inputs[table])
        check_schema(table, content)
        found, reasons = checks.judge(table, content.to_pylist(), config)
        clean, refused = split_off(table, content, reasons, job)
        kept = [features for features, reason in zip(found, reasons, strict=True) if reason is None]
        checks.add_sides(kept)
        verdicts = suites.run(table, kept, refused.num_rows / len(found), config) if kept else []
        summaries.append(validation_report.summarise(table, clean, found, reasons, verdicts))
        failures += [failure(verdict, clean, refused) for verdict in verdicts if not verdict.success]
        failures += [] if kept else [empty_message(table, reasons)]
    validation_report.write(summaries, job.outputs["report"])
    if failures:
        keep_failed(job)
        told = ["the data does not meet its expectations.", *failures, f"The report is {FAILED}/index.html."]
        raise StageError("\n".join(told))
    return figures(summaries)


def check_schema(table: str, content: "pa.Table") -> None:
    """Raise StageError where columns or types are not the table's."""
    expected = tables.schema(table)
    if not content.schema.equals(expected):
        wanted, got = ({field.name: str(field.type) for field in schema} for schema in (expected, content.schema))
        differ = [f"{name}: expected {wanted.get(name, 'no such column')}, found {got.get(name, 'none')}"
                  for name in {**wanted, **got} if wanted.get(name) != got.get(name)]  # fmt: skip
        told = "; ".join(differ) or f"expected the order {', '.join(wanted)}, found {', '.join(got)}"
        raise StageError(f"table {table} has another schema: {told}. Run `dvc repro -f ingest` to write it anew.")


def split_off(table: str, content: "pa.Table", reasons: Sequence[str | None], job: Job) -> "tuple[pa.Table, pa.Table]":
    """Write the kept and the refused rows and return both."""
    import pyarrow as pa

    reason = pa.array(reasons, pa.string())
    clean = content.filter(reason.is_null())
    refused = content.append_column("reason", reason).filter(reason.is_valid())
    tables.write(clean, job.outputs[table], content.schema)
    tables.write(refused, job.outputs["refused"] / table, refused.schema)
    return clean, refused


def empty_message(table: str, reasons: Sequence[str | None]) -> str:
    """Say why nothing is left of a table."""
    told = "; ".join(f"{count} × {reason}" for reason, count in Counter(reasons).most_common(3))
    return (
        f"table {table} is empty after validation: {len(reasons)} rows came in, none was kept "
        f"({told or 'the sources gave none'}). Mend the sources."
    )


def failure(verdict: suites.Verdict, clean: "pa.Table", refused: "pa.Table") -> str:
    """Return a failed expectation with its suite, what was found, and three rows that show it."""
    content = refused if verdict.shows_refused and refused.num_rows else clean
    positions = verdict.rows or range(min(suites.EXAMPLES, content.num_rows))
    examples = [validation_report.line(row) for row in validation_report.rows_at(content, positions)]
    head = f'suite {verdict.suite}, expectation "{verdict.says}" ({verdict.type}): found {verdict.observed}.'
    kind = "Rows that show it" if verdict.rows else "Refused rows" if content is refused else "The first rows"
    return "\n".join([head, f"  {kind}:", *(f"    {example}" for example in examples)])


def keep_failed(job: Job) -> None:
    """Keep the report and the refused rows of a failed run outside the tracked outputs, for the person who mends it."""
    shutil.rmtree(FAILED, ignore_errors=True)
    shutil.copytree(job.outputs["report"], FAILED)
    shutil.copytree(job.outputs["refused"], FAILED / "refused")


def figures(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Return the stage's figures."""
    counts = {f"{item.table}_{name}_rows": count for item in summaries
              for name, count in (("kept", item.kept), ("refused", item.refused))}  # fmt: skip
    return {**counts, "expectations_met": sum(verdict.success for item in summaries for verdict in item.verdicts)}


if __name__ == "__main__":
    stage.main("tasks.validate")
