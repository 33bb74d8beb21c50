"""What people think of the answers: rankings, and in tables of their own thumbs, flags and skipped questions.

One SQLite file in a folder: `data/feedback` beside this code, or the one that `BESSEMER_FEEDBACK` names (a container
mounts a volume there). What a call acknowledges by returning is on disk: every change is a transaction of its own in
WAL mode with `synchronous=FULL`. A change carries an id made by whoever sends it, so that one sent again after a lost
connection is there once. Several processes may have the file open.

Only answers that this endpoint gave can be judged; they are kept here with the model that gave them, and a ranking
names them by their ids. A ranking is marked with the export that takes it, so that each is exported once.
"""

import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving import feedback_tables
from serving.errors import InputError
from serving.judgements import Answer, FeedbackError, Opinion, Ranking, check_id, check_opinion, check_ranks
from serving.package import ROOT

VARIABLE = "BESSEMER_FEEDBACK"
FILE = "feedback.sqlite3"
WAIT_SECONDS = 30  # for another process that writes

Message = Mapping[str, str]


def feedback_folder() -> Path:
    """Return the folder of the store, whether or not it is there."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).resolve() if chosen else ROOT / "data" / "feedback"


class Store:
    """An open store, shared by the threads of this process; its folder and tables are made where there are none."""

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or feedback_folder()) / FILE
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FeedbackError(
                f"The folder {self.path.parent} for people's rankings cannot be made ({error.strerror}); {VARIABLE} "
                "names another."
            ) from None
        with self._told():
            self._connection = sqlite3.connect(
                self.path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._make_tables()
            self.id = str(self._connection.execute("SELECT id FROM store").fetchone()[0])

    def _make_tables(self) -> None:
        with self.change() as change:
            [found] = change.execute("PRAGMA user_version").fetchone()
            if found > feedback_tables.VERSION:
                raise FeedbackError(
                    f"{self.path} was written by a newer Bessemer (tables of version {found}, this one knows "
                    f"{feedback_tables.VERSION}); start that one, or name another folder in {VARIABLE}."
                )
            for statement in feedback_tables.statements(found):
                change.execute(statement)
            if found == 0:
                change.execute("INSERT INTO store VALUES (?)", (new_id(),))

    def close(self) -> None:
        """Close the file; it needs no closing to be whole."""
        self._connection.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn SQLite's failures into a sentence."""
        try:
            yield
        except sqlite3.Error as error:
            raise FeedbackError(
                f"{self.path} cannot be used ({error}), so nothing was saved. Mend it, then retry."
            ) from (error)

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """A transaction: on disk when the block ends, undone where it raises."""
        with self._lock, self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        """Return what a query finds."""
        with self._lock, self._told():
            return self._connection.execute(query, values).fetchall()

    def add_answers(self, prompt: Sequence[Message], given: Sequence[tuple[str, str, float, int | None]]) -> list[str]:
        """Keep answers (text, model tag, temperature, seed) to one prompt and return their ids, in order."""
        rows = [(new_id(), packed_prompt(prompt), *answer, now()) for answer in given]
        with self.change() as change:
            change.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        return [row[0] for row in rows]

    def answer(self, identifier: str) -> Answer:
        """Return an answer that was kept; raise InputError where there is none."""
        found = self.rows("SELECT * FROM answers WHERE id = ?", (identifier,))
        if not found:
            raise InputError(
                f'There is no answer "{identifier[:64]}" here: only answers that this endpoint gave can be judged.',
                field="answers", code="unknown_answer", status=404,
            )  # fmt: skip
        row = found[0]
        return Answer(**{**row, "prompt": json.loads(row["prompt"])})

    def add_ranking(self, identifier: str, answers: Sequence[str], ranks: Sequence[int], annotator: str) -> Ranking:
        """Keep a ranking of answers by their ids and return it; sent again under the same id it is there once.

        Gaps in the ranks are closed (1, 3, 3 is kept as 1, 2, 2). Raise InputError where it is none.
        """
        check_id("id", identifier)
        check_id("annotator", annotator)
        check_ranks(answers, ranks)
        shown = [self.answer(answer) for answer in answers]
        prompts = {packed(answer.prompt) for answer in shown}
        if len(prompts) > 1:
            raise InputError(
                f"The {len(shown)} answers belong to {len(prompts)} prompts: rank answers to one and the same prompt.",
                field="answers",
            )
        if len({" ".join(answer.text.split()) for answer in shown}) < len(shown):
            raise InputError(
                "Two of the answers say the same, so there is nothing to rank between them.", field="answers"
            )
        order = sorted(set(ranks))
        row = (
            identifier, prompts.pop(), packed([answer.text for answer in shown]),
            packed([order.index(rank) + 1 for rank in ranks]), packed([answer.model for answer in shown]),
            packed(list(answers)), annotator,
        )  # fmt: skip
        with self.change() as change:
            change.execute(
                "INSERT INTO rankings (id, prompt, responses, ranks, models, answers, annotator, created)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING", (*row, now()),
            )  # fmt: skip
            [kept] = change.execute("SELECT * FROM rankings WHERE id = ?", (identifier,)).fetchall()
        _check_same(kept, row, ("id", "prompt", "responses", "ranks", "models", "answers", "annotator"))
        return _ranking(kept)

    def withdraw(self, identifier: str, annotator: str) -> Ranking:
        """Take back one's own ranking and return it; done twice it is done once. Exports take it no more."""
        check_id("annotator", annotator)
        with self.change() as change:
            kept = change.execute("SELECT * FROM rankings WHERE id = ?", (identifier,)).fetchone()
            if kept is None or kept["annotator"] != annotator:
                raise InputError(
                    f'There is no ranking "{identifier[:64]}" of yours here.', field="id", code="unknown", status=404
                )
            if kept["export"] is not None:
                raise InputError(
                    "This ranking has been exported to the training data already, so it can't be taken back here.",
                    field="id", code="exported", status=409,
                )  # fmt: skip
            change.execute("UPDATE rankings SET withdrawn = ? WHERE id = ? AND withdrawn IS NULL", (now(), identifier))
        return _ranking(kept)

    def add_opinion(self, identifier: str, answer: str, opinion: str, annotator: str, note: str = "") -> Opinion:
        """Keep a thumb or a flag and return it; sent again under the same id it is there once."""
        check_id("id", identifier)
        check_id("annotator", annotator)
        check_opinion(opinion, note)
        about = self.answer(answer)
        row = (identifier, answer, packed(about.prompt), about.text, about.model, opinion, note, annotator)
        with self.change() as change:
            change.execute(
                "INSERT INTO opinions (id, answer, prompt, response, model, opinion, note, annotator, created)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING", (*row, now()),
            )  # fmt: skip
            [kept] = change.execute("SELECT * FROM opinions WHERE id = ?", (identifier,)).fetchall()
        _check_same(kept, row, ("id", "answer", "prompt", "response", "model", "opinion", "note", "annotator"))
        return _opinion(kept)

    def rankings(self) -> list[Ranking]:
        """Return the rankings that stand, in the order of their row numbers."""
        return [_ranking(row) for row in self.rows("SELECT * FROM rankings WHERE withdrawn IS NULL ORDER BY number")]

    def rankings_of(self, export: int | None) -> list[Ranking]:
        """Return the rankings that stand and that an export has taken (None: that none has), in that order."""
        query = "SELECT * FROM rankings WHERE export IS ? AND withdrawn IS NULL ORDER BY number"
        return [_ranking(row) for row in self.rows(query, (export,))]

    def opinions(self) -> list[Opinion]:
        """Return thumbs and flags in the order of their row numbers."""
        return [_opinion(row) for row in self.rows("SELECT * FROM opinions ORDER BY number")]

    def begin_export(self, numbers: Sequence[int]) -> int:
        """Mark rankings, by their row numbers, as taken by a new export, and return its number.

        From then on they cannot be taken back; what was taken back before is left out.
        """
        with self.change() as change:
            export = change.execute("INSERT INTO exports (created) VALUES (?)", (now(),)).lastrowid
            assert export is not None
            change.executemany(
                "UPDATE rankings SET export = ? WHERE number = ? AND export IS NULL AND withdrawn IS NULL",
                [(export, number) for number in numbers],
            )
        return export

    def unwritten_export(self) -> int | None:
        """Return the number of an export that was begun and whose file nobody said to be written."""
        found = self.rows("SELECT number FROM exports WHERE written IS NULL ORDER BY number LIMIT 1")
        return int(found[0]["number"]) if found else None

    def end_export(self, export: int) -> None:
        """Note that an export's file is written."""
        with self.change() as change:
            change.execute("UPDATE exports SET written = ? WHERE number = ?", (now(), export))


def new_id() -> str:
    """Return an id that nobody can guess."""
    return secrets.token_urlsafe(16)


def _check_same(kept: sqlite3.Row, row: Sequence[str], columns: Sequence[str]) -> None:
    """Refuse other content under an id that is taken."""
    if any(kept[column] != value for column, value in zip(columns, row, strict=True)):
        raise InputError(
            f'Something else is saved under the id "{kept["id"]}" already: send this under an id of its own.',
            field="id", code="id_taken", status=409,
        )  # fmt: skip


def _ranking(row: sqlite3.Row) -> Ranking:
    parts = {name: json.loads(row[name]) for name in ("prompt", "responses", "ranks", "models")}
    return Ranking(**parts, **{name: row[name] for name in ("number", "id", "annotator", "created")})


def _opinion(row: sqlite3.Row) -> Opinion:
    plain = ("number", "id", "response", "model", "opinion", "note", "annotator", "created")
    return Opinion(prompt=json.loads(row["prompt"]), **{name: row[name] for name in plain})


def packed(value: Any) -> str:
    """Return a value as it stands in the tables: equal values as equal texts."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def packed_prompt(prompt: Sequence[Message]) -> str:
    """Return a conversation as it stands in the tables."""
    return packed([{"role": turn["role"], "content": turn["content"]} for turn in prompt])


def now() -> str:
    """Return the moment as it stands in the tables."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
