"""What `validate` found, for people and machines: a page that needs no internet, markdown for Prefect, and JSON.

All three hold deterministic bytes: no dates and no run ids, because DVC tracks them.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.stage import write_json
from tasks.common.validation.checks import FEATURES
from tasks.common.validation.curation import Look
from tasks.common.validation.page import PAGE
from tasks.common.validation.suites import EXAMPLES, Verdict

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SAMPLES = 6
LINE_CHARACTERS = 220
RELIABLE = ((0.8, "reliable"), (0.667, "tentative"), (-math.inf, "people differ"))  # least alpha: Krippendorff's bounds
JUDGED = (
    "| source | judged by | rankings | Krippendorff's α | the longer is preferred | rating and length, r |",
    "| --- | --- | ---: | ---: | ---: | ---: |",
)
Ranked = Mapping[str, Mapping[str, Mapping[str, Any]]]  # figures by source and by how its rankings were judged


@dataclass(frozen=True)
class Reason:
    """Why rows were refused, how many, and a few of them."""

    reason: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class SourceRows:
    """Rows that one source gave a clean table."""

    source: str
    train: int
    heldout: int


@dataclass(frozen=True)
class Marked:
    """A kept row in which personal data was marked, and how much of each kind."""

    table: str
    id: str
    found: dict[str, int]


@dataclass(frozen=True)
class Summary:
    """Everything that is told about one table."""

    table: str
    read: int
    kept: int
    refused: int
    reasons: tuple[Reason, ...]
    sources: tuple[SourceRows, ...]
    characters: dict[str, int]
    samples: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    marked: dict[str, int]
    marks: tuple[Marked, ...]

    @property
    def marked_rows(self) -> int:
        """Number of kept rows in which something was marked."""
        return len(self.marks)

    @property
    def failed(self) -> int:
        """Number of expectations that were not met."""
        return sum(not verdict.success for verdict in self.verdicts)


@dataclass
class Shown:
    """Some of a table's rows for people to see, and which of the kept ones had personal data marked."""

    kept: int
    samples: list[str] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    marks: list[Marked] = field(default_factory=list)
    passed: int = 0  # kept rows seen so far

    def take(self, table: str, clean: "pa.Table", refused: "pa.Table", look: Look) -> None:
        """See a batch: of the kept rows some at equal distances, of the refused ones the first for each reason."""
        step = max(self.kept // SAMPLES, 1)
        places = range(-self.passed % step, clean.num_rows, step)[: SAMPLES - len(self.samples)]
        self.samples += [line(row) for row in rows_at(clean, places)]
        self.passed += clean.num_rows
        for number, reason in enumerate(refused["reason"].to_pylist()):
            if len(self.refused[reason]) < EXAMPLES:
                (row,) = rows_at(refused, [number])
                text = FEATURES[table](look.marked(row))["text"]  # the page must not spread what is marked elsewhere
                self.refused[reason].append(shorten(f"{row['id']}: {text}"))


def summarise(
    table: str, frame: "pd.DataFrame", reasons: Sequence[str | None], shown: Shown, verdicts: Sequence[Verdict]
) -> Summary:
    """Count a table's rows by source and split, its refusals by reason, and what was marked; add rows to show."""
    told = Counter(reason for reason in reasons if reason is not None)
    counts = Counter(zip(frame["source"], frame["split"], strict=True)) if len(frame) else Counter()
    lengths = frame["characters"] if len(frame) else [0]
    return Summary(
        table=table,
        read=len(reasons),
        kept=len(frame),
        refused=told.total(),
        reasons=tuple(
            Reason(reason, count, tuple(shown.refused[reason]))
            for reason, count in sorted(told.items(), key=lambda item: (-item[1], item[0]))
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
        samples=tuple(shown.samples),
        verdicts=tuple(verdicts),
        marked=dict(sorted(sum((Counter(item.found) for item in shown.marks), Counter[str]()).items())),
        marks=tuple(shown.marks),
    )


def rows_at(content: "pa.Table", positions: Iterable[int]) -> list[dict[str, Any]]:
    """Return the rows at some positions of a table."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = content.take(pa.array(positions, pa.int64())).to_pylist()
    return rows


def line(row: Mapping[str, Any]) -> str:
    """Return a row of any table as one line that a person can read."""
    if "responses" in row:
        asked = " ".join(message["content"] or "" for message in row["prompt"] or [])
        judged = row["ranks"] or [round(sum(given) / len(given), 2) if given else None for given in row["scores"] or []]
        text = f"{asked} → " + " | ".join(f"[{mark}] {text}" for mark, text in _paired(judged, row["responses"] or []))
    elif "messages" in row:
        text = " → ".join(message["content"] or "" for message in row["messages"] or [])
    else:
        text = row["text"] or ""
    refused = f" [{row['reason']}]" if "reason" in row else ""
    return f"{row['id']} ({row['split']}){refused}: {shorten(text)}"


def _paired(judged: Sequence[Any], responses: Sequence[str]) -> list[tuple[Any, str]]:
    marks = [*judged, *[None] * len(responses)]
    return [(marks[number], response) for number, response in enumerate(responses)]


def shorten(text: str) -> str:
    """Return a text as one line of bounded length; what a terminal or a page cannot show is written as its code."""
    flat = " ".join(text.split())
    shown = "".join(sign if sign.isprintable() else f"\\u{ord(sign):04x}" for sign in flat)
    return shown if len(shown) <= LINE_CHARACTERS else f"{shown[: LINE_CHARACTERS - 1]}…"


def write(summaries: Sequence[Summary], ranked: Ranked, folder: Path) -> None:
    """Write `index.html`, `validation.md`, `validation.json` and `marked.jsonl` into the report's folder."""
    folder.mkdir(parents=True)
    plain = [{key: value for key, value in asdict(summary).items() if key != "marks"} for summary in summaries]
    plain = [{**item, "judgements": ranked} if item["table"] == "rankings" else item for item in plain]
    write_json(folder / "validation.json", plain)
    lines = (json.dumps(asdict(marked)) for summary in summaries for marked in summary.marks)
    (folder / "marked.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "validation.md").write_text(markdown(summaries, ranked), encoding="utf-8")
    (folder / "index.html").write_text(page(summaries, ranked), encoding="utf-8")


def page(summaries: Sequence[Summary], ranked: Ranked) -> str:
    """Return the page."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    judged = judged_rows(ranked)
    return environment.from_string(PAGE).render(
        summaries=summaries,
        judged=judged,
        sizes=sorted({size for row in judged for size in row["responses"]}, key=int),
        failed=sum(summary.failed for summary in summaries),
        checked=sum(len(summary.verdicts) for summary in summaries),
        refused=sum(summary.refused for summary in summaries),
        marked=sum(summary.marked_rows for summary in summaries),
        empty=[summary.table for summary in summaries if not summary.kept],
    )


def judged_rows(ranked: Ranked) -> list[dict[str, Any]]:
    """Return the figures of the rankings as rows of a table, each with what it is about and what its alpha means."""
    rows = [
        {"source": source, "judged_by": judged.replace("-", "−"), **figures}
        for source, ways in ranked.items()
        for judged, figures in ways.items()
    ]
    return [
        {
            **row,
            "unit": "pair" if row["judged_by"] == "ranks" else "response",
            "says": next(says for least, says in RELIABLE if (row["alpha"] or 0) >= least),
        }
        for row in rows
    ]


def markdown(summaries: Sequence[Summary], ranked: Ranked) -> str:
    """Return the short form that the Prefect UI shows as an artifact."""
    lines = ["| table | read | kept | refused | expectations met |", "| --- | ---: | ---: | ---: | ---: |"]
    for item in summaries:
        met = f"{len(item.verdicts) - item.failed} of {len(item.verdicts)}"
        lines.append(f"| {item.table} | {item.read:,} | {item.kept:,} | {item.refused:,} | {met} |")
    for item in summaries:
        failed = [verdict for verdict in item.verdicts if not verdict.success]
        if item.reasons or failed or item.marked or not item.kept:
            lines += ["", f"**{item.table}**", ""]
        lines += [] if item.kept else ["- **nothing is left of this table**"]
        lines += [f"- refused {rows_of(reason.count)}: {reason.reason}" for reason in item.reasons]
        marks = ", ".join(f"{count:,} × {kind}" for kind, count in item.marked.items())
        lines += [f"- marked in {rows_of(item.marked_rows)}: {marks}"] if marks else []
        lines += [f"- **not met**: {verdict.says} (found {verdict.observed})" for verdict in failed]
    if ranked:
        lines += ["", "**how the rankings were judged**", "", *JUDGED]
    for row in judged_rows(ranked):
        longer = "–" if row["longer_preferred"] is None else f"{row['longer_preferred']:.1%}"
        alpha, r = ("–" if row[name] is None else f"{row[name]:.2f}" for name in ("alpha", "rating_length_correlation"))
        lines.append(f"| {row['source']} | {row['judged_by']} | {row['rankings']:,} | {alpha} | {longer} | {r} |")
    return "\n".join(lines) + "\n"


def rows_of(count: int) -> str:
    """Return `1 row`, `2 rows`."""
    return f"{count:,} row{'s' * (count != 1)}"
