"""The report of `validate`: an HTML page that works offline, Markdown for Prefect, and JSON.

DVC tracks all three, so their bytes are deterministic: no dates and no run ids.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.harness.records import write_json
from tasks.validate.checks import FEATURES
from tasks.validate.curation import TableFilter
from tasks.validate.page import PAGE
from tasks.validate.suites import MAX_EXAMPLES, Verdict

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SAMPLE_ROWS = 6
LINE_CHARACTERS = 220
# Label by least alpha; the bounds are Krippendorff's.
ALPHA_LABELS = ((0.8, "reliable"), (0.667, "tentative"), (-math.inf, "low agreement"))
JUDGEMENT_HEADER = (
    "| source | judged by | rankings | Krippendorff's α | longer preferred | rating–length r |",
    "| --- | --- | ---: | ---: | ---: | ---: |",
)
RankingFigures = Mapping[str, Mapping[str, Mapping[str, Any]]]  # figures by source and kind of judgement


@dataclass(frozen=True)
class Reason:
    """A rejection reason, the number of rows rejected for it, and some of them."""

    reason: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class SourceRows:
    """Rows of a clean table that come from one source, by split."""

    source: str
    train: int
    heldout: int


@dataclass(frozen=True)
class MarkedRow:
    """A kept row in which personal data was marked, and the number of marks of each kind."""

    table: str
    id: str
    found: dict[str, int]


@dataclass(frozen=True)
class Summary:
    """The contents of the report on one table."""

    table: str
    read: int
    kept: int
    rejected: int
    reasons: tuple[Reason, ...]
    sources: tuple[SourceRows, ...]
    characters: dict[str, int]
    samples: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    marked: dict[str, int]
    marks: tuple[MarkedRow, ...]

    @property
    def marked_rows(self) -> int:
        """Number of kept rows with marked personal data."""
        return len(self.marks)

    @property
    def failed(self) -> int:
        """Number of expectations that were not met."""
        return sum(not verdict.success for verdict in self.verdicts)


@dataclass
class ExampleRows:
    """Example rows of a table for the report, and the kept rows with marked personal data."""

    kept: int
    samples: list[str] = field(default_factory=list)
    rejected: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    marks: list[MarkedRow] = field(default_factory=list)
    kept_seen: int = 0  # kept rows added so far

    def add_batch(self, table: str, clean: "pa.Table", rejected: "pa.Table", table_filter: TableFilter) -> None:
        """Sample a batch: kept rows at equal distances, and the first rejected rows of each reason."""
        step = max(self.kept // SAMPLE_ROWS, 1)
        positions = range(-self.kept_seen % step, clean.num_rows, step)[: SAMPLE_ROWS - len(self.samples)]
        self.samples += [format_row(row) for row in rows_at(clean, positions)]
        self.kept_seen += clean.num_rows
        for number, reason in enumerate(rejected["reason"].to_pylist()):
            if len(self.rejected[reason]) < MAX_EXAMPLES:
                (row,) = rows_at(rejected, [number])
                # Rejected rows are stored unmarked, but the page must not show personal data.
                text = FEATURES[table](table_filter.mark_uncounted(row))["text"]
                self.rejected[reason].append(shorten(f"{row['id']}: {text}"))


def summarize(
    table: str, frame: "pd.DataFrame", reasons: Sequence[str | None], examples: ExampleRows, verdicts: Sequence[Verdict]
) -> Summary:
    """Count the rows of a table by source and split, its rejections by reason and its marks by kind; add examples."""
    rejections = Counter(reason for reason in reasons if reason is not None)
    counts = Counter(zip(frame["source"], frame["split"], strict=True)) if len(frame) else Counter()
    lengths = frame["characters"] if len(frame) else [0]
    return Summary(
        table=table,
        read=len(reasons),
        kept=len(frame),
        rejected=rejections.total(),
        reasons=tuple(
            Reason(reason, count, tuple(examples.rejected[reason]))
            for reason, count in sorted(rejections.items(), key=lambda item: (-item[1], item[0]))
        ),
        sources=tuple(
            SourceRows(source, counts[source, "train"], counts[source, "heldout"])
            for source in sorted({source for source, _ in counts})
        ),
        characters={
            "shortest": int(min(lengths)),
            "mean": round(float(sum(lengths)) / max(len(frame), 1)),
            "longest": int(max(lengths)),
        },
        samples=tuple(examples.samples),
        verdicts=tuple(verdicts),
        marked=dict(sorted(sum((Counter(item.found) for item in examples.marks), Counter[str]()).items())),
        marks=tuple(examples.marks),
    )


def rows_at(content: "pa.Table", positions: Iterable[int]) -> list[dict[str, Any]]:
    """Return the rows at some positions of a table."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = content.take(pa.array(positions, pa.int64())).to_pylist()
    return rows


def format_row(row: Mapping[str, Any]) -> str:
    """Return a row of any table as one readable line."""
    if "responses" in row:
        prompt = " ".join(message["content"] or "" for message in row["prompt"] or [])
        scores = [round(sum(ratings) / len(ratings), 2) if ratings else None for ratings in row["scores"] or []]
        judged = _pair_with_responses(row["ranks"] or scores, row["responses"] or [])
        text = f"{prompt} → " + " | ".join(f"[{judgement}] {response}" for judgement, response in judged)
    elif "messages" in row:
        text = " → ".join(message["content"] or "" for message in row["messages"] or [])
    else:
        text = row["text"] or ""
    reason = f" [{row['reason']}]" if "reason" in row else ""
    return f"{row['id']} ({row['split']}){reason}: {shorten(text)}"


def _pair_with_responses(judgements: Sequence[Any], responses: Sequence[str]) -> list[tuple[Any, str]]:
    """Return (judgement, response) for each response; None stands for a missing judgement."""
    padded = [*judgements, *[None] * len(responses)]
    return [(padded[number], response) for number, response in enumerate(responses)]


def shorten(text: str) -> str:
    """Return a text as one line of at most LINE_CHARACTERS; characters that are not printable become escape codes."""
    flat = " ".join(text.split())
    escaped = "".join(character if character.isprintable() else f"\\u{ord(character):04x}" for character in flat)
    return escaped if len(escaped) <= LINE_CHARACTERS else f"{escaped[: LINE_CHARACTERS - 1]}…"


def write(summaries: Sequence[Summary], ranking_figures: RankingFigures, folder: Path) -> None:
    """Write `index.html`, `validation.md`, `validation.json` and `marked.jsonl` into the report's folder."""
    folder.mkdir(parents=True)
    plain = [{key: value for key, value in asdict(summary).items() if key != "marks"} for summary in summaries]
    plain = [{**item, "judgements": ranking_figures} if item["table"] == "rankings" else item for item in plain]
    write_json(folder / "validation.json", plain)
    lines = (json.dumps(asdict(marked)) for summary in summaries for marked in summary.marks)
    (folder / "marked.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
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
        empty=[summary.table for summary in summaries if not summary.kept],
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
        failed = [verdict for verdict in item.verdicts if not verdict.success]
        if item.reasons or failed or item.marked or not item.kept:
            lines += ["", f"**{item.table}**", ""]
        lines += [] if item.kept else ["- **no row of this table is kept**"]
        lines += [f"- rejected {format_row_count(reason.count)}: {reason.reason}" for reason in item.reasons]
        marks = ", ".join(f"{count:,} × {kind}" for kind, count in item.marked.items())
        lines += [f"- marked in {format_row_count(item.marked_rows)}: {marks}"] if marks else []
        lines += [f"- **not met**: {verdict.description} (found {verdict.observed})" for verdict in failed]
    if ranking_figures:
        lines += ["", "**judgements of the rankings**", "", *JUDGEMENT_HEADER]
    for row in make_judgement_rows(ranking_figures):
        longer = "–" if row["longer_preferred"] is None else f"{row['longer_preferred']:.1%}"
        alpha, r = ("–" if row[name] is None else f"{row[name]:.2f}" for name in ("alpha", "rating_length_correlation"))
        lines.append(f"| {row['source']} | {row['judged_by']} | {row['rankings']:,} | {alpha} | {longer} | {r} |")
    return "\n".join(lines) + "\n"


def format_row_count(count: int) -> str:
    """Return `1 row`, `2 rows`."""
    return f"{count:,} row{'s' * (count != 1)}"
