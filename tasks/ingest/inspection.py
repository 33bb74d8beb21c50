"""What a file, a folder or a glob contains, as `ingest` would read it: format, table, columns, rows, lengths, problems.

Only the first rows of each file are read, and of a folder with many files some of them, so that an answer takes
seconds. Nothing here needs the stage or its settings.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tasks.ingest import file_lists
from tasks.ingest.reading import Reading, Rejection
from tasks.ingest.row_loading import RowOptions, UnknownColumnsError, load_file
from tasks.ingest.source_files import SourceFile, UnreadableFile
from tasks.ingest.source_settings import PARAGRAPH_FORMATS

MAX_ROWS = 5000  # read of a file
MAX_FILES = 200  # read of a folder, evenly spread
KEPT_ROWS = 5
MAX_PROBLEMS = 10


@dataclass(frozen=True)
class Inspection:
    """What was found at a path. Lengths are in characters, of documents or of all texts of a row."""

    path: str
    files: int
    size: int  # bytes of all files
    formats: Mapping[str, int]  # number of files by format, such as `md` or `openai (jsonl)`
    tables: Mapping[str, int]  # number of usable rows by table, of those read
    columns: tuple[str, ...]  # of the first rows, as the file calls them
    mapped: Mapping[str, str]  # columns of the table or format that were taken from others: `output` from `response`
    rows_read: int
    rows_rejected: int
    estimated_rows: int  # of all files; exact if everything was read
    mean_characters: float
    max_characters: int
    first_rows: tuple[Mapping[str, Any], ...]  # usable ones, as rows of their table
    texts: tuple[str, ...]  # of the rows read, to detect their language
    problems: tuple[str, ...]  # sentences: files that cannot be read, the first rejected rows, encodings
    answers: Mapping[str, int]  # number of conversations by their last answer: of labelled texts, the classes
    unknown_columns: bool  # whether the columns of a file are in no known form

    @property
    def table(self) -> str | None:
        """The table of most rows: corpus, instructions, rankings, facts or ratings; None if no row is usable."""
        return max(self.tables, key=lambda name: self.tables[name]) if self.tables else None


def inspect(path: Path, options: RowOptions | None = None, max_rows: int = MAX_ROWS) -> Inspection:
    """Return what a file, folder or glob contains; `options` are those that the source would have.

    What cannot be read is in `problems`; nothing is raised.
    """
    root = path if path.is_dir() else path.parent
    while file_lists.GLOB_CHARACTERS.intersection(root.name):
        root = root.parent
    names, is_one = file_lists.find(root, path.relative_to(root).as_posix())
    step = max(1.0, len(names) / MAX_FILES)
    chosen = [names[int(number * step)] for number in range(min(len(names), MAX_FILES))]
    found = _Findings(max_rows)
    options = options or RowOptions()
    if is_one:
        options = replace(options, paragraph_formats=PARAGRAPH_FORMATS)
    for name in chosen:
        found.read(SourceFile(root / name, name, is_sampled=True), options)
    sizes = {name: (root / name).stat().st_size for name in names}
    return found.summarize(str(path), sizes, chosen)


class _Findings:
    """Reads files up to a number of rows and collects what is in them."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows, self.rows_read, self.rejected = max_rows, 0, 0
        self.formats, self.tables, self.answers = Counter[str](), Counter[str](), Counter[str]()
        self.columns: dict[str, None] = {}
        self.mapped: dict[str, str] = {}
        self.rows: list[Mapping[str, Any]] = []
        self.lengths: list[int] = []
        self.texts: list[str] = []
        self.problems: list[str] = []
        self.estimate, self.bytes_covered, self.unknown_columns = 0.0, 0, False

    def read(self, file: SourceFile, options: RowOptions) -> None:
        """Read the first rows of a file."""
        limited = _LimitedReading(file, self.max_rows)
        reading = limited.reading
        try:
            unusable = load_file(file, options, reading)
        except UnreadableFile as error:
            unusable = str(error)
            self.unknown_columns |= isinstance(error, UnknownColumnsError)
        limited.add_others()
        self.problems += [unusable] if unusable else [item.reason for item in limited.rejections[:1]]
        self.problems += [f"{file.label}: {note}" for note in file.notes]
        self.formats += reading.formats
        self.tables += limited.tables
        self.answers += limited.answers
        self.columns |= dict.fromkeys(reading.columns)
        self.mapped |= reading.mapped
        self.rows += limited.rows[: KEPT_ROWS - len(self.rows)]
        self.lengths += map(len, limited.texts)
        self.texts += limited.texts
        self.rows_read, self.rejected = self.rows_read + reading.rows_read, self.rejected + reading.rejections
        self.estimate += limited.estimate_rows()
        self.bytes_covered += file.path.stat().st_size

    def summarize(self, path: str, sizes: Mapping[str, int], chosen: list[str]) -> Inspection:
        """Return the findings; rows of the files that were not read are estimated from their sizes."""
        size = sum(sizes.values())
        share = size / self.bytes_covered if self.bytes_covered else 1.0
        none = [f"{path}: expected a file, a folder with files or a pattern of files, found none"]
        problems = self.problems if sizes else none
        return Inspection(
            path, len(sizes), size, dict(self.formats), dict(self.tables), tuple(self.columns), self.mapped,
            self.rows_read, self.rejected, round(self.estimate * share),
            sum(self.lengths) / len(self.lengths) if self.lengths else 0.0, max(self.lengths, default=0),
            tuple(self.rows), tuple(self.texts), tuple(dict.fromkeys(problems))[:MAX_PROBLEMS],
            dict(self.answers), self.unknown_columns,
        )  # fmt: skip


@dataclass
class _Collector:
    """A sink that calls a function with each item."""

    call: Callable[[Any], None]

    def append(self, item: Any) -> None:
        """Pass the item on."""
        self.call(item)


@dataclass
class _LimitedReading:
    """A reading that stops after a number of rows."""

    file: SourceFile
    max_rows: int
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tables: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    rejections: list[Rejection] = field(default_factory=list)
    bytes_read: int = 0

    def __post_init__(self) -> None:
        tables = ("instructions", "rankings")
        self.reading = Reading(
            "inspected", "",
            prose=_Collector(lambda text: self._add("corpus", {"text": text}, text)),
            rows={name: _Collector(partial(self._add_finished, name)) for name in tables},
            rejected=_Collector(self._reject),
        )  # fmt: skip

    def add_others(self) -> None:
        """Add the facts and the rated texts, which a reading keeps itself."""
        for fact in self.reading.facts:
            self._add("facts", vars(fact), fact.value)
        for rated in self.reading.rated:
            self._add("ratings", vars(rated), rated.text)

    def _add_finished(self, table: str, row: Mapping[str, Any]) -> None:
        if table == "instructions":
            self.answers[row["messages"][-1]["content"]] += 1
        self._add(table, row, _text_of(row))

    def _add(self, table: str, row: Mapping[str, Any], text: str) -> None:
        self.tables[table] += 1
        self.rows += [row] if len(self.rows) < KEPT_ROWS else []
        self.texts.append(text)
        self._stop_at_limit()

    def _reject(self, rejection: Rejection) -> None:
        self.rejections.append(rejection)
        self._stop_at_limit()

    def _stop_at_limit(self) -> None:
        self.bytes_read = self.file.bytes_read
        self.reading.limit_reached = len(self.texts) + len(self.rejections) >= self.max_rows

    def estimate_rows(self) -> float:
        """Return the number of rows of the whole file, by the bytes that were read of it."""
        count = len(self.texts) + len(self.rejections)
        if not self.reading.limit_reached:
            return count
        if "parquet" in str(self.reading.formats):
            import pyarrow.parquet as pq

            return int(pq.read_metadata(self.file.path).num_rows)
        return count * self.file.path.stat().st_size / self.bytes_read if self.bytes_read else count


def _text_of(row: Mapping[str, Any]) -> str:
    turns = row["messages"] if "messages" in row else row["prompt"]
    return "\n".join([*(turn["content"] for turn in turns), *row.get("responses", ())])
