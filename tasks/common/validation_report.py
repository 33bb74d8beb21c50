"""What `validate` found, for people and machines: a page that needs no internet, markdown for Prefect, and JSON.

All three hold deterministic bytes: no dates and no run ids, because DVC tracks them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.checks import Features
from tasks.common.stage import write_json
from tasks.common.suites import EXAMPLES, Verdict
from tasks.common.validation_page import PAGE

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLES = 6
LINE_CHARACTERS = 220


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

    @property
    def failed(self) -> int:
        """Number of expectations that were not met."""
        return sum(not verdict.success for verdict in self.verdicts)


def summarise(
    table: str, clean: "pa.Table", found: Sequence[Features], reasons: Sequence[str | None], verdicts: Sequence[Verdict]
) -> Summary:
    """Count a table's rows by source and split, its refusals by reason, and pick rows to show."""
    refused: dict[str, list[str]] = defaultdict(list)
    sides: dict[str, Counter[str]] = defaultdict(Counter)
    lengths: list[int] = []
    for features, reason in zip(found, reasons, strict=True):
        if reason is None:
            sides[features["source"]][features["split"]] += 1
            lengths.append(len(features["text"]))
        else:
            refused[reason].append(shorten(f"{features['id']}: {features['text']}"))
    step = max(clean.num_rows // SAMPLES, 1)
    shown = rows_at(clean, range(0, clean.num_rows, step)[:SAMPLES])
    told = sorted(refused.items(), key=lambda item: (-len(item[1]), item[0]))
    return Summary(
        table=table,
        read=len(found),
        kept=len(lengths),
        refused=len(found) - len(lengths),
        reasons=tuple(Reason(reason, len(rows), tuple(rows[:EXAMPLES])) for reason, rows in told),
        sources=tuple(SourceRows(source, sides[source]["train"], sides[source]["heldout"]) for source in sorted(sides)),
        characters={
            "shortest": min(lengths, default=0),
            "mean": round(sum(lengths) / max(len(lengths), 1)),
            "longest": max(lengths, default=0),
        },
        samples=tuple(line(row) for row in shown),
        verdicts=tuple(verdicts),
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


def write(summaries: Sequence[Summary], folder: Path) -> None:
    """Write `index.html`, `validation.md` and `validation.json` into the report's folder."""
    folder.mkdir(parents=True)
    write_json(folder / "validation.json", [asdict(summary) for summary in summaries])
    (folder / "validation.md").write_text(markdown(summaries), encoding="utf-8")
    (folder / "index.html").write_text(page(summaries), encoding="utf-8")


def page(summaries: Sequence[Summary]) -> str:
    """Return the page."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment.from_string(PAGE).render(
        summaries=summaries,
        failed=sum(summary.failed for summary in summaries),
        checked=sum(len(summary.verdicts) for summary in summaries),
        refused=sum(summary.refused for summary in summaries),
        empty=[summary.table for summary in summaries if not summary.kept],
    )


def markdown(summaries: Sequence[Summary]) -> str:
    """Return the short form that the Prefect UI shows as an artifact."""
    lines = ["| table | read | kept | refused | expectations met |", "| --- | ---: | ---: | ---: | ---: |"]
    for item in summaries:
        met = f"{len(item.verdicts) - item.failed} of {len(item.verdicts)}"
        lines.append(f"| {item.table} | {item.read:,} | {item.kept:,} | {item.refused:,} | {met} |")
    for item in summaries:
        failed = [verdict for verdict in item.verdicts if not verdict.success]
        if item.reasons or failed or not item.kept:
            lines += ["", f"**{item.table}**", ""]
        lines += [] if item.kept else ["- **nothing is left of this table**"]
        lines += [f"- refused {rows_of(reason.count)}: {reason.reason}" for reason in item.reasons]
        lines += [f"- **not met**: {verdict.says} (found {verdict.observed})" for verdict in failed]
    return "\n".join(lines) + "\n"


def rows_of(count: int) -> str:
    """Return `1 row`, `2 rows`."""
    return f"{count:,} row{'s' * (count != 1)}"
