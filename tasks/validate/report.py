"""The report of `validate`: an HTML page that works offline, Markdown for Prefect, and JSON.

DVC tracks all three, so their bytes are deterministic: no dates and no run ids.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.common.harness.records import write_json
from tasks.validate.page import PAGE
from tasks.validate.summary import Reason, Summary

MAX_NAMED_PARTS = 5  # sources and languages of a reason in the Markdown
# Label by least alpha; the bounds are Krippendorff's.
ALPHA_LABELS = ((0.8, "reliable"), (0.667, "tentative"), (-math.inf, "low agreement"))
JUDGEMENT_HEADER = (
    "| source | judged by | rankings | Krippendorff's α | longer preferred | rating–length r |",
    "| --- | --- | ---: | ---: | ---: | ---: |",
)
RankingFigures = Mapping[str, Mapping[str, Mapping[str, Any]]]  # figures by source and kind of judgement


def write(summaries: Sequence[Summary], ranking_figures: RankingFigures, folder: Path) -> None:
    """Write `index.html`, `validation.md`, `validation.json` and `changed.jsonl` into the report's folder."""
    folder.mkdir(parents=True)
    plain = [{key: value for key, value in asdict(summary).items() if key != "changes"} for summary in summaries]
    plain = [{**item, "judgements": ranking_figures} if item["table"] == "rankings" else item for item in plain]
    write_json(folder / "validation.json", plain)
    lines = (json.dumps(asdict(changed)) for summary in summaries for changed in summary.changes)
    (folder / "changed.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "validation.md").write_text(render_markdown(summaries, ranking_figures), encoding="utf-8")
    (folder / "index.html").write_text(render_page(summaries, ranking_figures), encoding="utf-8")


def render_page(summaries: Sequence[Summary], ranking_figures: RankingFigures) -> str:
    """Return the report as an HTML page."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    judgement_rows = make_judgement_rows(ranking_figures)
    return environment.from_string(PAGE).render(
        summaries=summaries,
        judgement_rows=judgement_rows,
        sizes=sorted({size for row in judgement_rows for size in row["responses"]}, key=int),
        failed=sum(summary.failed for summary in summaries),
        checked=sum(len(summary.verdicts) for summary in summaries),
        rejected=sum(summary.rejected for summary in summaries),
        marked=sum(summary.marked_rows for summary in summaries),
        shortened=sum(summary.shortened_rows for summary in summaries),
        empty=[summary.table for summary in summaries if summary.lacks_rows],
    )


def make_judgement_rows(ranking_figures: RankingFigures) -> list[dict[str, Any]]:
    """Return the figures of the rankings as table rows, each with its unit of agreement and a label of its alpha."""
    rows = [
        {"source": source, "judged_by": judged_by.replace("-", "−"), **figures}
        for source, kinds in ranking_figures.items()
        for judged_by, figures in kinds.items()
    ]
    return [
        {
            **row,
            "unit": "pair" if row["judged_by"] == "ranks" else "response",
            "label": next(label for least, label in ALPHA_LABELS if (row["alpha"] or 0) >= least),
        }
        for row in rows
    ]


def render_markdown(summaries: Sequence[Summary], ranking_figures: RankingFigures) -> str:
    """Return the short report in Markdown, which the Prefect UI shows as an artifact."""
    lines = ["| table | read | kept | rejected | expectations met |", "| --- | ---: | ---: | ---: | ---: |"]
    for item in summaries:
        met = f"{len(item.verdicts) - item.failed} of {len(item.verdicts)}"
        lines.append(f"| {item.table} | {item.read:,} | {item.kept:,} | {item.rejected:,} | {met} |")
    for item in summaries:
        found = render_table_lines(item)
        lines += ["", f"**{item.table}**", "", *found] if found else []
    if ranking_figures:
        lines += ["", "**judgements of the rankings**", "", *JUDGEMENT_HEADER]
    for row in make_judgement_rows(ranking_figures):
        longer = "–" if row["longer_preferred"] is None else f"{row['longer_preferred']:.1%}"
        alpha, r = ("–" if row[name] is None else f"{row[name]:.2f}" for name in ("alpha", "rating_length_correlation"))
        lines.append(f"| {row['source']} | {row['judged_by']} | {row['rankings']:,} | {alpha} | {longer} | {r} |")
    return "\n".join(lines) + "\n"


def render_table_lines(item: Summary) -> list[str]:
    """Return what Markdown says of a table: rejections, changes, languages and failed expectations."""
    lines = ["- **no row of this table is kept**"] if item.lacks_rows else []
    lines += [
        f"- rejected {format_row_count(reason.count)}: {reason.reason}{name_parts(reason)}" for reason in item.reasons
    ]
    marks = ", ".join(f"{count:,} × {kind}" for kind, count in item.marked.items())
    lines += [f"- marked in {format_row_count(item.marked_rows)}: {marks}"] if marks else []
    removed = ", ".join(f"{count:,} of the {role}" for role, count in item.removed.items())
    lines += [f"- messages removed in {format_row_count(item.shortened_rows)}: {removed}"] if removed else []
    lines += [
        f"- language {rows.language}: {rows.kept:,} kept, {rows.rejected:,} rejected; {rows.rules}"
        for rows in item.languages
    ]
    failed = [verdict for verdict in item.verdicts if not verdict.success]
    return [*lines, *(f"- **not met**: {verdict.description} (found {verdict.observed})" for verdict in failed)]


def name_parts(reason: Reason) -> str:
    """Return the sources and languages with the most rows of a reason, in brackets: ` (wiki de 12, blog 3)`."""
    named = [f"{' '.join(filter(None, (part.source, part.language)))} {part.count:,}" for part in reason.rejected]
    more = ["…"] if len(named) > MAX_NAMED_PARTS else []
    return f" ({', '.join([*named[:MAX_NAMED_PARTS], *more])})"


def format_row_count(count: int) -> str:
    """Return `1 row`, `2 rows`."""
    return f"{count:,} row{'s' * (count != 1)}"
