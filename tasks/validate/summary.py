"""What the report of `validate` says about a table: its rows, rejections, changes, languages and limits."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tasks.validate.checks import FEATURES, Limits
from tasks.validate.curation import TableFilter
from tasks.validate.languages import rules_of
from tasks.validate.preparation import Changes
from tasks.validate.suites import MAX_EXAMPLES, Verdict

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SAMPLE_ROWS = 6
LINE_CHARACTERS = 220
LENGTH_LIMITS = {
    "corpus": "max_text_characters", "instructions": "max_message_characters", "rankings": "max_message_characters",
}  # fmt: skip


@dataclass(frozen=True)
class RejectedRows:
    """Number of rows of one source and language that were rejected for one reason."""

    source: str
    language: str | None
    count: int


@dataclass(frozen=True)
class Reason:
    """A rejection reason, the number of rows rejected for it, by source and language, and some of them."""

    reason: str
    count: int
    rejected: tuple[RejectedRows, ...]
    examples: tuple[str, ...]


@dataclass(frozen=True)
class SourceRows:
    """Rows of a clean table that come from one source, by split."""

    source: str
    train: int
    heldout: int


@dataclass(frozen=True)
class LanguageRows:
    """Documents in one language (`und`: not known) that curation kept and rejected, and the rules that applied."""

    language: str
    kept: int
    rejected: int
    rules: str


@dataclass(frozen=True)
class LimitInUse:
    """A limit on a table, its value (None for no limit), where the value comes from, and what was found."""

    setting: str
    value: float | None
    origin: str
    found: str


@dataclass(frozen=True)
class ChangedRow:
    """A kept row that was changed: the number of marks of each kind, and the roles of removed messages."""

    table: str
    id: str
    found: dict[str, int]
    removed: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """The contents of the report on one table."""

    table: str
    read: int
    kept: int
    invalid: int
    rejected: int
    reasons: tuple[Reason, ...]
    languages: tuple[LanguageRows, ...]
    limits: tuple[LimitInUse, ...]
    sources: tuple[SourceRows, ...]
    characters: dict[str, int]
    samples: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    marked: dict[str, int]
    removed: dict[str, int]
    changes: tuple[ChangedRow, ...]

    @property
    def marked_rows(self) -> int:
        """Number of kept rows with marked personal data."""
        return sum(bool(row.found) for row in self.changes)

    @property
    def shortened_rows(self) -> int:
        """Number of kept rows from which a message was removed."""
        return sum(bool(row.removed) for row in self.changes)

    @property
    def lacks_rows(self) -> bool:
        """Whether no row is kept although there were some, or a limit asks for some."""
        asked = any(limit.setting.startswith("min_rows") and limit.value for limit in self.limits)
        return not self.kept and (self.read > 0 or asked)

    @property
    def failed(self) -> int:
        """Number of expectations that were not met."""
        return sum(not verdict.success for verdict in self.verdicts)


@dataclass
class RowLog:
    """What the report needs of single rows: examples, counts of rejections and languages, and the changed rows."""

    table_filter: TableFilter
    kept: int
    samples: list[str] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    rejections: Counter[tuple[str, str, str | None]] = field(default_factory=Counter)  # by reason, source, language
    languages: Counter[tuple[str, bool]] = field(default_factory=Counter)  # by language, whether kept
    changes: list[ChangedRow] = field(default_factory=list)
    kept_seen: int = 0  # kept rows added so far

    def add_kept(self, rows: "pa.Table", positions: Sequence[int]) -> None:
        """Count the kept rows of a batch, and sample them at equal distances."""
        step = max(self.kept // SAMPLE_ROWS, 1)
        chosen = range(-self.kept_seen % step, rows.num_rows, step)[: SAMPLE_ROWS - len(self.samples)]
        self.samples += [format_row(row) for row in rows_at(rows, chosen)]
        self.kept_seen += rows.num_rows
        found = (self.table_filter.language_of(position) for position in positions)
        self.languages.update((language, True) for language in found if language)

    def add_rejected(self, rows: "pa.Table", positions: Sequence[int]) -> None:
        """Count the rejected rows of a batch by reason, source and language; the first of each are examples."""
        columns = (rows["reason"].to_pylist(), rows["source"].to_pylist(), positions)
        for number, (reason, source, position) in enumerate(zip(*columns, strict=True)):
            language = self.table_filter.language_of(position)
            self.rejections[reason, source or "", language] += 1
            if language:
                self.languages[language, False] += 1
            if len(self.examples[reason]) < MAX_EXAMPLES:
                (row,) = rows_at(rows, [number])
                # Rejected rows are stored unmarked, but the page must not show personal data.
                text = FEATURES[self.table_filter.table](self.table_filter.prepare(row, Changes()))["text"]
                self.examples[reason].append(shorten(f"{row['id']}: {text}"))

    def add_change(self, row: Mapping[str, Any], changes: Changes) -> None:
        """Add what was changed in a kept row."""
        found = dict(sorted(changes.marks.items()))
        self.changes.append(ChangedRow(self.table_filter.table, row["id"], found, tuple(changes.removed)))


def summarize(
    table: str, frame: "pd.DataFrame", read: int, invalid: int, log: RowLog, verdicts: Sequence[Verdict],
    limits: Limits,
) -> Summary:  # fmt: skip
    """Return the summary of a table with `read` rows, of which `invalid` are invalid by themselves."""
    counts = Counter(zip(frame["source"], frame["split"], strict=True)) if len(frame) else Counter()
    lengths = frame["characters"] if len(frame) else [0]
    return Summary(
        table=table,
        read=read,
        kept=len(frame),
        invalid=invalid,
        rejected=read - len(frame),
        reasons=_summarize_reasons(log),
        languages=_summarize_languages(log),
        limits=_summarize_limits(table, frame, invalid / max(read, 1), limits),
        sources=tuple(
            SourceRows(source, counts[source, "train"], counts[source, "heldout"])
            for source in sorted({source for source, _ in counts})
        ),
        characters={
            "shortest": int(min(lengths)),
            "mean": round(float(sum(lengths)) / max(len(frame), 1)),
            "longest": int(max(lengths)),
        },
        samples=tuple(log.samples),
        verdicts=tuple(verdicts),
        marked=dict(sorted(sum((Counter(row.found) for row in log.changes), Counter[str]()).items())),
        removed=dict(sorted(Counter(role for row in log.changes for role in row.removed).items())),
        changes=tuple(log.changes),
    )


def _summarize_reasons(log: RowLog) -> tuple[Reason, ...]:
    """Return the rejection reasons, the most frequent first."""
    rows: dict[str, list[RejectedRows]] = defaultdict(list)
    for (reason, source, language), count in sorted(log.rejections.items(), key=lambda item: (-item[1], str(item[0]))):
        rows[reason].append(RejectedRows(source, language, count))
    found = (
        Reason(reason, sum(part.count for part in parts), tuple(parts), tuple(log.examples[reason]))
        for reason, parts in rows.items()
    )
    return tuple(sorted(found, key=lambda reason: (-reason.count, reason.reason)))


def _summarize_languages(log: RowLog) -> tuple[LanguageRows, ...]:
    """Return the languages of the documents, the most frequent first; () if no filter depends on them."""
    found = [
        LanguageRows(code, log.languages[code, True], log.languages[code, False], rules_of(code).describe())
        for code in sorted({code for code, _ in log.languages})
    ]
    return tuple(sorted(found, key=lambda rows: -(rows.kept + rows.rejected)))


def _summarize_limits(
    table: str, frame: "pd.DataFrame", invalid_share: float, limits: Limits
) -> tuple[LimitInUse, ...]:
    """Return the limits of a table with what was found; the length limit comes first."""
    setting = LENGTH_LIMITS[table]
    column = "characters" if table == "corpus" else "longest"
    longest = int(frame[column].max()) if len(frame) else 0
    found = {
        setting: f"longest kept: {longest:,} characters",
        "max_rejected_share": f"invalid: {invalid_share:.1%} of the rows",
        f"min_rows.{table}": f"kept: {len(frame):,} rows",
    }
    return tuple(_limit_in_use(setting, limits, text) for setting, text in found.items())


def _limit_in_use(setting: str, limits: Limits, found: str) -> LimitInUse:
    """Return a limit by its path under `validate`; what is not in params.yaml is a default."""
    group, _, name = setting.rpartition(".")
    owner = getattr(limits, group) if group else limits
    origin = "params.yaml" if name in owner.model_fields_set else "default"
    return LimitInUse(setting, getattr(owner, name), origin, found)


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
