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
from tasks.validate import checks, report, suites, summary
from tasks.validate.curation import Curation, Curator, TableFilter
from tasks.validate.judgements import CONTRADICTION_REASON, Contradictions, JudgementStatistics
from tasks.validate.preparation import Changes
from tasks.validate.summary import RowLog, Summary

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
    invalid: int = 0  # rows rejected because they are invalid by themselves, copies not counted
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
        log = write_tables(table, checked, len(frame), job, statistics)
        verdicts = suites.run(table, frame, checked.invalid / len(reasons), config) if len(frame) else []
        summaries[table] = summary.summarize(table, frame, len(reasons), checked.invalid, log, verdicts, config)
        failures += [describe_failure(verdict, job, reasons) for verdict in verdicts if not verdict.success]
        failures += [] if len(frame) else describe_empty_table(table, reasons, config)
    in_order = [summaries[table] for table in tables.TABLES]
    ranking_figures = statistics.figures()
    report.write(in_order, ranking_figures, job.outputs["report"])
    if failures:
        save_failed_report(job)
        report_note = f"The report is {FAILED_FOLDER}/index.html."
        raise StageError("\n".join(["the data does not meet its expectations.", *failures, report_note]))
    print_changes(in_order)
    return {**figures(in_order), "rankings": ranking_figures}


def print_changes(summaries: Sequence[Summary]) -> None:
    """Print what was rejected and removed, one line a table, and what personal data was marked, in one line."""
    for item in summaries:
        if item.rejected:
            reasons = Counter({reason.reason: reason.count for reason in item.reasons})
            print(
                f"{item.rejected} of {item.read} rows of {item.table} were rejected ({format_top_reasons(reasons)}); "
                "the report and data/validate/rejected list them"
            )
        if item.removed:
            print(
                f"{item.shortened_rows} rows of {item.table} lost a message that no answer follows, or an empty system "
                "message; data/validate/report/changed.jsonl lists them"
            )
    marked = [
        f"{', '.join(f'{count} {kind}' for kind, count in item.marked.items())} in {item.marked_rows} of {item.table}"
        for item in summaries
        if item.marked
    ]
    if marked:
        print(
            f"personal data was replaced by placeholders (validate.curate.personal): {'; '.join(marked)} (rows); "
            "data/validate/report/changed.jsonl lists the rows"
        )


def check_table(table: str, path: Path, config: Config, table_filter: TableFilter) -> CheckedTable:
    """Read a table once and return the rejection reason of each row (None for a row that is kept)."""
    check_schema(table, tables.schema_of(path))
    checked = CheckedTable(table_filter, suite_tables=[suites.make_suite_table(table, [])])
    contradictions, seen = Contradictions(), set[bytes]()
    for batch in tables.batches(path):
        rows = table_filter.prepare_batch(batch.to_pylist())
        features, reasons = checks.check_rows(table, rows, config, seen)
        checked.invalid += sum(reason not in (None, checks.DUPLICATE_ROW_REASON) for reason in reasons)
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


def write_tables(table: str, checked: CheckedTable, kept: int, job: Job, statistics: JudgementStatistics) -> RowLog:
    """Read a table again and write its kept rows, as they were prepared, and its rejected rows, as they were read.

    Kept rankings are added to `statistics`. Return what the report needs of single rows.
    """
    import pyarrow as pa

    schema = tables.schema(table)
    rejected_schema = schema.append(pa.field("reason", pa.string()))
    log, start = RowLog(checked.table_filter, kept), 0
    with (
        tables.Writer(job.outputs[table], schema) as clean,
        tables.Writer(job.outputs["rejected"] / table, rejected_schema) as rejected,
    ):
        for batch in tables.batches(job.inputs[table]):
            reasons = checked.reasons[start : start + batch.num_rows]
            rows = batch.append_column("reason", pa.array(reasons, pa.string()))
            good, bad = rows.filter(rows["reason"].is_null()), rows.filter(rows["reason"].is_valid())
            kept_at = [position for position, reason in enumerate(reasons, start) if reason is None]
            good = change_kept_rows(good.drop_columns("reason"), kept_at, checked.table_filter, log)
            clean.write(good)
            for row in good.to_pylist() if table == "rankings" else ():
                statistics.add(row)
            rejected.write(bad)
            log.add_kept(good, kept_at)
            log.add_rejected(bad, [position for position, reason in enumerate(reasons, start) if reason is not None])
            start += batch.num_rows
    return log


def change_kept_rows(rows: "pa.Table", positions: Sequence[int], table_filter: TableFilter, log: RowLog) -> "pa.Table":
    """Return the rows at these positions of their table as they were prepared, and add their changes to the log."""
    import pyarrow as pa

    changed = {
        number: table_filter.changes[position]
        for number, position in enumerate(positions)
        if position in table_filter.changes
    }
    if not changed:
        return rows
    content = rows.to_pylist()
    for number, changes in changed.items():
        log.add_change(content[number], changes)
        content[number] = table_filter.prepare(content[number], Changes())
    return pa.Table.from_pylist(content, rows.schema)


def describe_empty_table(table: str, reasons: Sequence[str | None], limits: checks.Limits) -> list[str]:
    """Return the message for a table of which no row is kept; none for a table that has no rows and needs none."""
    if reasons:
        return [
            f"table {table} is empty after validation: {len(reasons)} rows read, none kept "
            f"({format_top_reasons(Counter(filter(None, reasons)))}). Correct the sources, or what rejects the rows."
        ]
    least: int = getattr(limits.min_rows, table)
    if least:
        return [
            f"table {table} has no rows, but validate.min_rows.{table} asks for {least:,}: list a source of "
            f"{table} in `ingest.sources`, or lower the limit."
        ]
    return []


def format_top_reasons(counts: Counter[str]) -> str:
    """Return the three most frequent rejection reasons with their numbers of rows."""
    return "; ".join(f"{count} × {reason}" for reason, count in counts.most_common(3))


def describe_failure(verdict: suites.Verdict, job: Job, reasons: Sequence[str | None]) -> str:
    """Return the message for a failed expectation: its suite, what was found, what to do, and three example rows.

    If the expectation is about rejected rows, the most frequent reasons of the table are added.
    """
    clean, rejected = job.outputs[verdict.suite], job.outputs["rejected"] / verdict.suite
    path = rejected if verdict.shows_rejected and tables.count(rejected) else clean
    positions = verdict.rows or range(suites.MAX_EXAMPLES)
    examples = [summary.format_row(row) for row in tables.rows_at(path, positions)]
    remedy = (
        f"Correct the sources, or change validate.{verdict.setting}." if verdict.setting else "Correct the sources."
    )
    head = f'suite {verdict.suite}, expectation "{verdict.description}" ({verdict.type}): found {verdict.observed}.'
    title = "Rows that do not meet it" if verdict.rows else "The first rows"
    if path is rejected:
        title = f"Rejected rows ({format_top_reasons(Counter(filter(None, reasons)))})"
    return "\n".join([f"{head} {remedy}", f"  {title}:", *(f"    {example}" for example in examples)])


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
        "shortened": {item.table: item.shortened_rows for item in summaries},
    }
