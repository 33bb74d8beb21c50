"""Stage `validate`: refuse bad rows with their reason, then hold each table to its Great Expectations suite.

Run as `python -m tasks.validate`. What is refused is bad by itself (`checks.py`) or has no place in training text
(`curation.py`). Clean tables, refused rows (with a column `reason`) and a report for people are left behind; the rows
read are the rows kept and the rows refused. A table is read twice, batch by batch: once to judge, once to write. What
is held of it meanwhile is some hundred bytes a row, never its texts.

A failed suite stops the run; the report about it is then kept at `data/.failed/validate/`, because outputs are moved
into place only where a stage is complete.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common import stage, tables
from tasks.common.stage import Job, StageError
from tasks.common.validation import checks, report, suites
from tasks.common.validation.curation import Curation, Curator, Look
from tasks.common.validation.judgements import CONTRADICTION, Contradictions, Judgements
from tasks.common.validation.report import Marked, Shown, Summary

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

NUMERICS = False  # no model computes here
INPUTS = {table: f"data/ingest/{table}" for table in tables.TABLES}
OUTPUTS = {
    **{table: f"data/validate/{table}" for table in tables.TABLES},
    "refused": "data/validate/refused",
    "report": "data/validate/report",
}
FAILED = Path("data/.failed/validate")
READING_ORDER = ("instructions", "corpus", "rankings")  # what is asked on the held-out side is looked for in the corpus


class Config(checks.Limits):
    """Settings of `validate`."""

    curate: Curation


@dataclass
class Judged:
    """What is known of a table's rows once all of them were read; their texts are not kept."""

    look: Look
    reasons: list[str | None] = field(default_factory=list)
    seen: "list[pa.Table]" = field(default_factory=list)  # what the suites look at, of all rows

    def frame(self) -> "pd.DataFrame":
        """Return what the suites look at, of the rows without a reason against them; what was packed is let go."""
        packed, self.seen = self.seen, []
        return suites.frame_of(packed, [reason is None for reason in self.reasons])


def run(config: Config, job: Job) -> dict[str, Any]:
    """Check rows, write clean and refused tables, run the suites, write the report; raise StageError if one fails."""
    from tqdm import tqdm

    curator = Curator(config.curate)
    summaries: dict[str, Summary] = {}
    judgements = Judgements()
    failures: list[str] = []
    for table in tqdm(READING_ORDER, desc="validate", unit="table"):
        judged = judge(table, job.inputs[table], config, curator.look_at(table))
        frame, told = judged.frame(), judged.reasons
        shown = split_off(table, judged, len(frame), job, judgements)
        share = (len(told) - len(frame)) / max(len(told), 1)
        verdicts = suites.run(table, frame, share, config) if len(frame) else []
        summaries[table] = report.summarise(table, frame, told, shown, verdicts)
        failures += [failure(verdict, job, told) for verdict in verdicts if not verdict.success]
        failures += [] if len(frame) else [empty_message(table, told)]
    in_order = [summaries[table] for table in tables.TABLES]
    ranked = judgements.figures()
    report.write(in_order, ranked, job.outputs["report"])
    if failures:
        keep_failed(job)
        remedy = f"Mend the sources, or the limits under `validate` in params.yaml. The report is {FAILED}/index.html."
        said = ["the data does not meet its expectations.", *failures, remedy]
        raise StageError("\n".join(said))
    for summary in in_order:
        if summary.refused:
            print(
                f"{summary.refused} rows of {summary.table} were refused; the report and data/validate/refused say why"
            )
    return {**figures(in_order), "rankings": ranked}


def judge(table: str, path: Path, config: Config, look: Look) -> Judged:
    """Read a table once and return what is to become of each row."""
    check_schema(table, tables.schema_of(path))
    judged, before = Judged(look, seen=[suites.seen_of(table, [])]), set[bytes]()
    contradictions = Contradictions()
    for batch in tables.batches(path):
        rows = look.mark(batch.to_pylist())
        found, reasons = checks.judge(table, rows, config, before)
        reasons = look.judge(rows, found, reasons)
        if table == "rankings":
            for number, (row, reason) in enumerate(zip(rows, reasons, strict=True), len(judged.reasons)):
                if reason is None:
                    contradictions.add(number, row)
        judged.reasons += reasons
        judged.seen.append(suites.seen_of(table, found))
    before.clear()  # the larger half of what is held, and there is more to hold while rows are compared
    for position, reason in {**dict.fromkeys(contradictions.settle(), CONTRADICTION), **look.settle()}.items():
        judged.reasons[position] = reason
    return judged


def check_schema(table: str, found: "pa.Schema") -> None:
    """Raise StageError where columns or types are not the table's."""
    expected = tables.schema(table)
    if not found.equals(expected):
        wanted, got = ({field.name: str(field.type) for field in schema} for schema in (expected, found))
        differ = [f"{name}: expected {wanted.get(name, 'no such column')}, found {got.get(name, 'none')}"
                  for name in {**wanted, **got} if wanted.get(name) != got.get(name)]  # fmt: skip
        told = "; ".join(differ) or f"expected the order {', '.join(wanted)}, found {', '.join(got)}"
        raise StageError(f"table {table} has another schema: {told}. Run `dvc repro -f ingest` to write it anew.")


def split_off(table: str, judged: Judged, kept: int, job: Job, judgements: Judgements) -> Shown:
    """Read a table again, write its kept rows (marked, where they were) and its refused ones; return some to show.

    The rankings that are kept are counted among the judgements.
    """
    import pyarrow as pa

    schema = tables.schema(table)
    of_refused = schema.append(pa.field("reason", pa.string()))
    shown, start = Shown(kept), 0
    with (
        tables.Writer(job.outputs[table], schema) as clean,
        tables.Writer(job.outputs["refused"] / table, of_refused) as refused,
    ):
        for batch in tables.batches(job.inputs[table]):
            reasons = judged.reasons[start : start + batch.num_rows]
            rows = batch.append_column("reason", pa.array(reasons, pa.string()))
            good, bad = rows.filter(rows["reason"].is_null()), rows.filter(rows["reason"].is_valid())
            numbers = [number for number, reason in enumerate(reasons, start) if reason is None]
            good = marked(good.drop_columns("reason"), numbers, judged.look, shown)
            clean.write(good)
            for row in good.to_pylist() if table == "rankings" else ():
                judgements.add(row)
            refused.write(bad)
            shown.take(table, good, bad, judged.look)
            start += batch.num_rows
    return shown


def marked(rows: "pa.Table", positions: Sequence[int], look: Look, shown: Shown) -> "pa.Table":
    """Return rows that stand at these positions of their table, with personal data marked where there was some."""
    import pyarrow as pa

    changed = {number: look.marks[position] for number, position in enumerate(positions) if position in look.marks}
    if not changed:
        return rows
    content = rows.to_pylist()
    for number, marks in changed.items():
        shown.marks.append(Marked(look.table, content[number]["id"], dict(sorted(marks.items()))))
        content[number] = look.marked(content[number])
    return pa.Table.from_pylist(content, rows.schema)


def empty_message(table: str, reasons: Sequence[str | None]) -> str:
    """Say why nothing is left of a table."""
    return (
        f"table {table} is empty after validation: {len(reasons)} rows came in, none was kept "
        f"({most_frequent(reasons) or 'the sources gave none'}). Mend the sources."
    )


def most_frequent(reasons: Sequence[str | None]) -> str:
    """Return the three most frequent reasons against rows, and how many rows each has."""
    told = Counter(filter(None, reasons)).most_common(3)
    return "; ".join(f"{count} × {reason}" for reason, count in told)


def failure(verdict: suites.Verdict, job: Job, reasons: Sequence[str | None]) -> str:
    """Return a failed expectation with its suite, what was found, and three rows that show it.

    Where rows were refused, the reasons against all of the table say more than three of them.
    """
    clean, refused = job.outputs[verdict.suite], job.outputs["refused"] / verdict.suite
    content = refused if verdict.shows_refused and tables.count(refused) else clean
    positions = verdict.rows or range(suites.EXAMPLES)
    examples = [report.line(row) for row in tables.rows_at(content, positions)]
    head = f'suite {verdict.suite}, expectation "{verdict.says}" ({verdict.type}): found {verdict.observed}.'
    kind = "Rows that show it" if verdict.rows else "The first rows"
    if content is refused:
        kind = f"Refused rows ({most_frequent(reasons)})"
    return "\n".join([head, f"  {kind}:", *(f"    {example}" for example in examples)])


def keep_failed(job: Job) -> None:
    """Keep the report and the refused rows of a failed run outside the tracked outputs, for the person who mends it."""
    shutil.rmtree(FAILED, ignore_errors=True)
    shutil.copytree(job.outputs["report"], FAILED)
    shutil.copytree(job.outputs["refused"], FAILED / "refused")


def figures(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Return the stage's figures: rows kept and refused, why, and personal data marked by kind."""
    counts = {f"{item.table}_{name}_rows": count for item in summaries
              for name, count in (("kept", item.kept), ("refused", item.refused))}  # fmt: skip
    return {
        **counts,
        "expectations_met": sum(verdict.success for item in summaries for verdict in item.verdicts),
        "refused": {item.table: {reason.reason: reason.count for reason in item.reasons} for item in summaries},
        "marked": {item.table: {"rows": item.marked_rows, **item.marked} for item in summaries},
    }


if __name__ == "__main__":
    stage.main("tasks.validate")
