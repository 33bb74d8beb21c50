"""The feedback store: durability, exactly-once storage, exports, withdrawal and validation."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving.errors import InputError
from serving.feedback.judgements import FeedbackError
from serving.feedback.store import FEEDBACK_VARIABLE, Store, feedback_folder
from tests.serving_fixtures import ROOT

PROMPT = [{"role": "user", "content": "What is the capital of Peru?"}]
TEXTS = ("Lima.", "The capital is Lima.", "It is Cuzco.")
ANNOTATOR, OTHER_ANNOTATOR = "annotator-one", "annotator-two"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    feedback_store = Store(tmp_path / "feedback")
    yield feedback_store
    feedback_store.close()


def add_answers(store: Store, *texts: str, prompt: Any = PROMPT) -> list[str]:
    return store.add_answers(prompt, [(text, f"model-{at}", 0.8, at) for at, text in enumerate(texts)])


def test_add_ranking_stores_all_fields(store: Store, tmp_path: Path) -> None:
    answers = add_answers(store, *TEXTS)
    number = store.add_ranking("ranking-1", answers, [1, 1, 3], ANNOTATOR)
    [ranking] = Store(tmp_path / "feedback").rankings()
    assert ranking == number
    assert (ranking.number, ranking.prompt, ranking.responses) == (1, PROMPT, list(TEXTS))
    assert (ranking.ranks, ranking.models) == ([1, 1, 2], ["model-0", "model-1", "model-2"])
    assert (ranking.annotator, ranking.created[-6:]) == (ANNOTATOR, "+00:00")


def test_add_ranking_repeated_is_stored_once_and_reused_id_raises(store: Store) -> None:
    answers = add_answers(store, *TEXTS)
    first = store.add_ranking("ranking-1", answers, [1, 2, 3], ANNOTATOR)
    assert store.add_ranking("ranking-1", answers, [1, 2, 3], ANNOTATOR) == first
    with pytest.raises(InputError, match="already in use with other content") as failure:
        store.add_ranking("ranking-1", answers, [3, 2, 1], ANNOTATOR)
    assert failure.value.status == 409
    assert store.rankings() == [first]


def test_export_skips_withdrawn_and_exported_rankings(store: Store) -> None:
    answers = add_answers(store, *TEXTS)
    for at in range(1, 6):
        store.add_ranking(f"ranking-{at}", answers, [1, 2, 3], ANNOTATOR)
    store.withdraw("ranking-4", ANNOTATOR)
    first = store.begin_export([1, 4])
    assert store.unfinished_export() == first
    store.end_export(first)
    assert store.unfinished_export() is None
    second = store.begin_export([1, 3])  # ranking 1 is already exported
    assert second != first
    numbers = [[ranking.number for ranking in store.rankings_by_export(export)] for export in (first, second, None)]
    assert numbers == [[1], [3], [2, 5]]


OLD_TABLES = """
CREATE TABLE store (id TEXT NOT NULL);
INSERT INTO store VALUES ('the-old-store');
CREATE TABLE rankings (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, responses TEXT NOT NULL,
  ranks TEXT NOT NULL, models TEXT NOT NULL, answers TEXT NOT NULL, annotator TEXT NOT NULL, created TEXT NOT NULL,
  withdrawn TEXT
);
CREATE TABLE exports (through INTEGER NOT NULL, created TEXT NOT NULL);
INSERT INTO exports VALUES (2, 'monday'), (3, 'tuesday');
PRAGMA user_version = 1;
"""


def test_version_1_store_is_migrated_with_its_rows(tmp_path: Path) -> None:
    """Rows up to the exported row number stay exported; later rows are waiting."""
    with sqlite3.connect(tmp_path / "feedback.sqlite3") as old:
        old.executescript(OLD_TABLES)
        for number in range(1, 6):
            row = (f"ranking-{number}", "[]", "[]", "[]", "[]", "[]", ANNOTATOR, "then")
            old.execute(f"INSERT INTO rankings VALUES (NULL, {', '.join('?' * len(row))}, NULL)", row)
    old.close()
    for _ in range(2):  # the second time the store is already migrated
        store = Store(tmp_path)
        assert store.id == "the-old-store"
        assert store.unfinished_export() is None
        numbers = [[ranking.number for ranking in store.rankings_by_export(export)] for export in (1, 2, None)]
        assert numbers == [[1, 2], [3], [4, 5]]
        with pytest.raises(InputError, match="exported to the training data"):
            store.withdraw("ranking-3", ANNOTATOR)
        store.close()
    assert Store(tmp_path).begin_export([4]) == 3


def test_withdraw_own_ranking_until_exported(store: Store) -> None:
    answers = add_answers(store, *TEXTS)
    for name in ("ranking-1", "ranking-2"):
        store.add_ranking(name, answers, [1, 2, 3], ANNOTATOR)
    with pytest.raises(InputError, match=r"no ranking .* of yours"):
        store.withdraw("ranking-2", OTHER_ANNOTATOR)
    assert store.withdraw("ranking-2", ANNOTATOR) == store.withdraw("ranking-2", ANNOTATOR)
    assert [ranking.id for ranking in store.rankings()] == ["ranking-1"]
    export = store.begin_export([1])
    with pytest.raises(InputError, match="exported to the training data"):
        store.withdraw("ranking-1", ANNOTATOR)
    assert [ranking.id for ranking in store.rankings_by_export(export)] == ["ranking-1"]


@pytest.mark.parametrize(
    ("answers", "ranks", "sentence"),
    [
        ([0, 1, 2], [1, 2], "3 answers need 3 ranks; got 2"),
        ([0, 1, 2], [1, 2, 4], "at most 3; got 1, 2, 4"),
        ([0, 1, 2], [2, 2, 3], "from 1, the best"),
        ([0], [1], "2 to 6 answers; 1 were sent"),
        ([0, 0], [1, 2], "contains one answer twice"),
        ([0, 3], [1, 2], "belong to 2 prompts"),
        ([0, 4], [1, 2], "are equal"),
        ([0, 5], [1, 2], "There is no answer"),
    ],
)
def test_add_ranking_invalid_raises(store: Store, answers: list[int], ranks: list[int], sentence: str) -> None:
    ids = [
        *add_answers(store, *TEXTS),
        *add_answers(store, "Paris.", prompt=[{"role": "user", "content": "And of France?"}]),
        *add_answers(store, "Lima. "),
        "never-given-by-anyone",
    ]
    with pytest.raises(InputError, match=sentence):
        store.add_ranking("ranking-1", [ids[at] for at in answers], ranks, ANNOTATOR)
    assert store.rankings() == []


@pytest.mark.parametrize(
    ("identifier", "annotator"), [("short", ANNOTATOR), ("ranking-1", "<b>bold</b>"), ("a" * 65, ANNOTATOR)]
)
def test_malformed_ids_raise(store: Store, identifier: str, annotator: str) -> None:
    with pytest.raises(InputError, match='8 to 64 letters, digits, "-" or "_"'):
        store.add_ranking(identifier, add_answers(store, *TEXTS), [1, 2, 3], annotator)


def test_thumbs_and_flags_are_stored_separately_from_rankings(store: Store) -> None:
    [answer] = add_answers(store, TEXTS[0])
    up = store.add_opinion("opinion-1", answer, "up", ANNOTATOR)
    assert store.add_opinion("opinion-1", answer, "up", ANNOTATOR) == up
    flag = store.add_opinion("opinion-2", answer, "flag", ANNOTATOR, note="It is rude.")
    assert store.opinions() == [up, flag]
    assert (flag.prompt, flag.response, flag.model, flag.note) == (PROMPT, TEXTS[0], "model-0", "It is rude.")
    assert store.rankings() == []
    with pytest.raises(InputError, match='one of up, down, none, flag, unflag; got "sideways"'):
        store.add_opinion("opinion-3", answer, "sideways", ANNOTATOR)
    with pytest.raises(InputError, match="501 characters; 500 are allowed"):
        store.add_opinion("opinion-3", answer, "flag", ANNOTATOR, note="x" * 501)


WRITER = """
import sys
from pathlib import Path
from serving.feedback.store import Store
store = Store(Path(sys.argv[1]))
answers = store.add_answers([{"role": "user", "content": "Which?"}], [(t, "m", 1.0, 0) for t in ("a", "b", "c")])
for number in range(1_000_000):
    identifier = f"{sys.argv[2]}-{number:08}"
    store.add_ranking(identifier, answers, [1, 2, 3], "annotator-one")
    print(identifier, flush=True)
"""


def test_confirmed_rankings_survive_sigkill_exactly_once(tmp_path: Path) -> None:
    folder = tmp_path / "feedback"
    acknowledged: list[str] = []
    for turn in ("first", "second"):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(folder), f"{turn}-{at}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
            )
            for at in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            acknowledged += [writer.stdout.readline().strip() for _ in range(20)]
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            assert writer.stdout is not None
            # Lines printed until then count too; an incomplete line was not confirmed.
            rest = writer.stdout.read()
            acknowledged += rest[: rest.rfind("\n") + 1].split()
            assert writer.wait() == -signal.SIGKILL
            writer.stdout.close()
    stored = [ranking.id for ranking in Store(folder).rankings()]
    assert len(acknowledged) >= 80
    assert set(acknowledged) <= set(stored)
    assert len(set(stored)) == len(stored)


def test_threads_and_stores_write_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(Store, [tmp_path / "feedback"] * 4))
    assert len({store.id for store in stores}) == 1
    answers = add_answers(stores[0], *TEXTS)

    def rank(at: int) -> None:
        stores[at % 4].add_ranking(f"ranking-{at // 2}", answers, [1, 2, 3], ANNOTATOR)  # each is sent twice

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(rank, range(80)))
    assert sorted(ranking.id for ranking in stores[0].rankings()) == sorted(f"ranking-{at}" for at in range(40))


def test_full_disk_raises_and_confirmed_rankings_remain(store: Store) -> None:
    answers = add_answers(store, *TEXTS)
    store.add_ranking("ranking-0", answers, [1, 2, 3], ANNOTATOR)
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    acknowledged = ["ranking-0"]
    with pytest.raises(FeedbackError, match=r"disk is full.*nothing was saved"):  # noqa: PT012
        for at in range(1, 1000):
            store.add_ranking(f"ranking-{at}", answers, [1, 2, 3], ANNOTATOR)
            acknowledged.append(f"ranking-{at}")
    store._connection.execute("PRAGMA max_page_count = 100000")
    assert [ranking.id for ranking in store.rankings()] == acknowledged
    assert store.add_ranking("ranking-later", answers, [1, 2, 3], ANNOTATOR).number == len(acknowledged) + 1


def test_commits_are_synced_to_disk(store: Store) -> None:
    assert store._connection.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    assert store._connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_unusable_store_file_raises(tmp_path: Path) -> None:
    (tmp_path / "feedback.sqlite3").write_bytes(b"no database at all, but long enough to be read as one" * 40)
    with pytest.raises(FeedbackError, match=r"feedback\.sqlite3 cannot be used .*nothing was saved"):
        Store(tmp_path)
    newer = Store(tmp_path / "newer")
    newer.close()
    with sqlite3.connect(newer.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(FeedbackError, match="newer Bessemer"):
        Store(tmp_path / "newer")
    (tmp_path / "file").write_text("")
    with pytest.raises(FeedbackError, match=FEEDBACK_VARIABLE):
        Store(tmp_path / "file" / "below")


def test_feedback_folder_is_read_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FEEDBACK_VARIABLE, str(tmp_path))
    assert feedback_folder() == tmp_path
    monkeypatch.delenv(FEEDBACK_VARIABLE)
    assert feedback_folder() == ROOT / "data/feedback"
    ignored = subprocess.run(["git", "check-ignore", "-q", "data/feedback/x"], cwd=ROOT, env=os.environ, check=False)
    assert ignored.returncode == 0
