"""Stage `validate`: reject invalid rows with a reason, then check each table with its Great Expectations suite.

Run as `python -m tasks.validate`. A row is rejected because it is invalid by itself (`checks.py`), or because it does
not belong in training text (`curation.py`). The stage writes clean tables, rejected rows (with a column `reason`) and a
report; the rows read are the rows kept and the rows rejected. A table is read twice, batch by batch: first to check its
rows, then to write them. In between, some hundred bytes a row stay in memory, and never its text.

If a suite fails, the run stops. Its report is kept at `data/.failed/validate/`, because the outputs of an incomplete
stage are discarded.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common import tables
from tasks.common.harness.job import Job, StageError
from tasks.validate import checks, report, suites
from tasks.validate.curation import Curation, Curator, TableFilter
from tasks.validate.judgements import CONTRADICTION_REASON, Contradictions, JudgementStatistics
from tasks.validate.report import ExampleRows, MarkedRow, Summary

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

NUMERICS = False  # no model computes here
INPUTS = {table: f"data/ingest/{table}" for table in tables.TABLES}
OUTPUTS = {
    **{table: f"data/validate/{table}" for table in tables.TABLES},
    "rejected": "data/validate/rejected",
    "report": "data/validate/report",
}
FAILED_FOLDER = Path("data/.failed/validate")
READING_ORDER = ("instructions", "corpus", "rankings")  # the corpus is searched for held-out instructions


class Config(checks.Limits):
    """Settings of `validate`."""

    curate: Curation = Curation()


@dataclass
class CheckedTable:
    """The rejection reason of each row of a table, and the columns that the suites read; the texts are not kept."""

    table_filter: TableFilter
    reasons: list[str | None] = field(default_factory=list)
    suite_tables: "list[pa.Table]" = field(default_factory=list)  # of all rows, one a batch

    def pop_frame(self) -> "pd.DataFrame":
        """Return the frame of the kept rows for the suites, and free the tables that it is made from."""
        suite_tables, self.suite_tables = self.suite_tables, []
        return suites.make_kept_frame(suite_tables, [reason is None for reason in self.reasons])


def run(config: Config, job: Job) -> dict[str, Any]:
    """Check rows, write clean and rejected tables, run the suites and write the report.

    Raise StageError if a suite fails or no row of a table is kept.
    """
    from tqdm import tqdm

    curator = Curator(config.curate)
    summaries: dict[str, Summary] = {}
    statistics = JudgementStatistics()
    failures: list[str] = []
    for table in tqdm(READING_ORDER, desc="validate", unit="table"):
        checked = check_table(table, job.inputs[table], config, curator.make_table_filter(table))
        frame, reasons = checked.pop_frame(), checked.reasons
        examples = write_tables(table, checked, len(frame), job, statistics)
        share = (len(reasons) - len(frame)) / max(len(reasons), 1)
        verdicts = suites.run(table, frame, share, config) if len(frame) else []
        summaries[table] = report.summarize(table, frame, reasons, examples, verdicts)
        failures += [describe_failure(verdict, job, reasons) for verdict in verdicts if not verdict.success]
        if reasons and not len(frame):  # a table without any rows is allowed: no stage may need it
            failures.append(describe_empty_table(table, reasons))
    in_order = [summaries[table] for table in tables.TABLES]
    ranking_figures = statistics.figures()
    report.write(in_order, ranking_figures, job.outputs["report"])
    if failures:
        save_failed_report(job)
        remedy = (
            "Correct the sources, or the limits under `validate` in params.yaml. "
            f"The report is {FAILED_FOLDER}/index.html."
        )
        raise StageError("\n".join(["the data does not meet its expectations.", *failures, remedy]))
    for summary in in_order:
        if summary.rejected:
            print(
                f"{summary.rejected} rows of {summary.table} were rejected; the report and data/validate/rejected "
                "give the reasons"
            )
    return {**figures(in_order), "rankings": ranking_figures}


def check_table(table: str, path: Path, config: Config, table_filter: TableFilter) -> CheckedTable:
    """Read a table once and return the rejection reason of each row (None for a row that is kept)."""
    check_schema(table, tables.schema_of(path))
    checked = CheckedTable(table_filter, suite_tables=[suites.make_suite_table(table, [])])
    contradictions, seen = Contradictions(), set[bytes]()
    for batch in tables.batches(path):
        rows = table_filter.mark_batch(batch.to_pylist())
        features, reasons = checks.check_rows(table, rows, config, seen)
        reasons = table_filter.filter_batch(rows, features, reasons)
        if table == "rankings":
            for position, (row, reason) in enumerate(zip(rows, reasons, strict=True), len(checked.reasons)):
                if reason is None:
                    contradictions.add(position, row)
        checked.reasons += reasons
        checked.suite_tables.append(suites.make_suite_table(table, features))
    seen.clear()  # the larger half of the memory in use; comparing rows needs more
    found = {**dict.fromkeys(contradictions.find_positions(), CONTRADICTION_REASON), **table_filter.compare_rows()}
    for position, reason in found.items():
        checked.reasons[position] = reason
    return checked


def check_schema(table: str, found: "pa.Schema") -> None:
    """Raise StageError if columns or types differ from those of the table."""
    expected = tables.schema(table)
    if not found.equals(expected):
        wanted, got = ({field.name: str(field.type) for field in schema} for schema in (expected, found))
        differences = [f"{name}: expected {wanted.get(name, 'no such column')}, found {got.get(name, 'none')}"
                       for name in {**wanted, **got} if wanted.get(name) != got.get(name)]  # fmt: skip
        message = "; ".join(differences) or f"expected the order {', '.join(wanted)}, found {', '.join(got)}"
        raise StageError(f"table {table} has another schema: {message}. Run `dvc repro -f ingest` to write it again.")


def write_tables(
    table: str, checked: CheckedTable, kept: int, job: Job, statistics: JudgementStatistics
) -> ExampleRows:
    """Read a table again, write its kept rows (with personal data marked) and its rejected rows; return examples.

    Kept rankings are added to `statistics`.
    """
    import pyarrow as pa

    schema = tables.schema(table)
    rejected_schema = schema.append(pa.field("reason", pa.string()))
    examples, start = ExampleRows(kept), 0
    with (
        tables.Writer(job.outputs[table], schema) as clean,
        tables.Writer(job.outputs["rejected"] / table, rejected_schema) as rejected,
    ):
        for batch in tables.batches(job.inputs[table]):
            reasons = checked.reasons[start : start + batch.num_rows]
            rows = batch.append_column("reason", pa.array(reasons, pa.string()))
            good, bad = rows.filter(rows["reason"].is_null()), rows.filter(rows["reason"].is_valid())
            positions = [position for position, reason in enumerate(reasons, start) if reason is None]
            good = mark_kept_rows(good.drop_columns("reason"), positions, checked.table_filter, examples)
            clean.write(good)
            for row in good.to_pylist() if table == "rankings" else ():
                statistics.add(row)
            rejected.write(bad)
            examples.add_batch(table, good, bad, checked.table_filter)
            start += batch.num_rows
    return examples


def mark_kept_rows(
    rows: "pa.Table", positions: Sequence[int], table_filter: TableFilter, examples: ExampleRows
) -> "pa.Table":
    """Return the rows at these positions of their table with personal data marked, and add the marks to `examples`."""
    import pyarrow as pa

    marks_by_row = {
        number: table_filter.marks[position]
        for number, position in enumerate(positions)
        if position in table_filter.marks
    }
    if not marks_by_row:
        return rows
    content = rows.to_pylist()
    for number, marks in marks_by_row.items():
        examples.marks.append(MarkedRow(table_filter.table, content[number]["id"], dict(sorted(marks.items()))))
        content[number] = table_filter.mark_uncounted(content[number])
    return pa.Table.from_pylist(content, rows.schema)


def describe_empty_table(table: str, reasons: Sequence[str | None]) -> str:
    """Return the message for a table of which no row is kept."""
    return (
        f"table {table} is empty after validation: {len(reasons)} rows read, none kept "
        f"({format_top_reasons(reasons) or 'the sources have none'}). Correct the sources."
    )


def format_top_reasons(reasons: Sequence[str | None]) -> str:
    """Return the three most frequent rejection reasons with their numbers of rows."""
    top = Counter(filter(None, reasons)).most_common(3)
    return "; ".join(f"{count} × {reason}" for reason, count in top)


def describe_failure(verdict: suites.Verdict, job: Job, reasons: Sequence[str | None]) -> str:
    """Return the message for a failed expectation: its suite, what was found, and three example rows.

    If the expectation is about rejected rows, the most frequent reasons of the table are added.
    """
    clean, rejected = job.outputs[verdict.suite], job.outputs["rejected"] / verdict.suite
    path = rejected if verdict.shows_rejected and tables.count(rejected) else clean
    positions = verdict.rows or range(suites.MAX_EXAMPLES)
    examples = [report.format_row(row) for row in tables.rows_at(path, positions)]
    head = f'suite {verdict.suite}, expectation "{verdict.description}" ({verdict.type}): found {verdict.observed}.'
    title = "Rows that do not meet it" if verdict.rows else "The first rows"
    if path is rejected:
        title = f"Rejected rows ({format_top_reasons(reasons)})"
    return "\n".join([head, f"  {title}:", *(f"    {example}" for example in examples)])


def save_failed_report(job: Job) -> None:
    """Copy the report and the rejected rows of a failed run to a folder outside the outputs that DVC tracks."""
    shutil.rmtree(FAILED_FOLDER, ignore_errors=True)
    shutil.copytree(job.outputs["report"], FAILED_FOLDER)
    shutil.copytree(job.outputs["rejected"], FAILED_FOLDER / "rejected")


def figures(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Return the metrics of the stage: rows kept, rows rejected by reason, and personal data marked by kind."""
    counts = {f"{item.table}_{name}_rows": count for item in summaries
              for name, count in (("kept", item.kept), ("rejected", item.rejected))}  # fmt: skip
    return {
        **counts,
        "expectations_met": sum(verdict.success for item in summaries for verdict in item.verdicts),
        "rejected": {item.table: {reason.reason: reason.count for reason in item.reasons} for item in summaries},
        "marked": {item.table: {"rows": item.marked_rows, **item.marked} for item in summaries},
    }
