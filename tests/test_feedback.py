"""The store of rankings and opinions: what it acknowledges is on disk and there once, and nothing else gets in."""

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
from serving.feedback import VARIABLE, Store, feedback_folder
from serving.judgements import FeedbackError
from tests.serving_fixtures import ROOT

PROMPT = [{"role": "user", "content": "What is the capital of Peru?"}]
TEXTS = ("Lima.", "The capital is Lima.", "It is Cuzco.")
WHO, ELSE = "annotator-one", "annotator-two"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "feedback")
    yield opened
    opened.close()


def shown(store: Store, *texts: str, prompt: Any = PROMPT) -> list[str]:
    return store.add_answers(prompt, [(text, f"model-{at}", 0.8, at) for at, text in enumerate(texts)])


def test_a_ranking_is_kept_with_all_that_the_table_wants(store: Store, tmp_path: Path) -> None:
    answers = shown(store, *TEXTS)
    given = store.add_ranking("ranking-1", answers, [1, 1, 3], WHO)
    [kept] = Store(tmp_path / "feedback").rankings()
    assert kept == given
    assert (kept.number, kept.prompt, kept.responses) == (1, PROMPT, list(TEXTS))
    assert (kept.ranks, kept.models) == ([1, 1, 2], ["model-0", "model-1", "model-2"])
    assert (kept.annotator, kept.created[-6:]) == (WHO, "+00:00")


def test_the_same_post_again_is_there_once_and_another_under_its_id_is_refused(store: Store) -> None:
    answers = shown(store, *TEXTS)
    first = store.add_ranking("ranking-1", answers, [1, 2, 3], WHO)
    assert store.add_ranking("ranking-1", answers, [1, 2, 3], WHO) == first
    with pytest.raises(InputError, match="Something else is saved") as refused:
        store.add_ranking("ranking-1", answers, [3, 2, 1], WHO)
    assert refused.value.status == 409
    assert store.rankings() == [first]


def test_an_export_takes_what_still_stands_and_nobody_took(store: Store) -> None:
    answers = shown(store, *TEXTS)
    for at in range(1, 6):
        store.add_ranking(f"ranking-{at}", answers, [1, 2, 3], WHO)
    store.withdraw("ranking-4", WHO)
    first = store.begin_export([1, 4])
    assert store.unwritten_export() == first
    store.end_export(first)
    assert store.unwritten_export() is None
    second = store.begin_export([1, 3])  # one of them is taken already
    assert second != first
    numbers = [[ranking.number for ranking in store.rankings_of(export)] for export in (first, second, None)]
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


def test_a_store_of_the_first_version_keeps_what_it_holds(tmp_path: Path) -> None:
    """What it had exported, up to a row, stays exported; what came after waits."""
    with sqlite3.connect(tmp_path / "feedback.sqlite3") as old:
        old.executescript(OLD_TABLES)
        for number in range(1, 6):
            row = (f"ranking-{number}", "[]", "[]", "[]", "[]", "[]", WHO, "then")
            old.execute(f"INSERT INTO rankings VALUES (NULL, {', '.join('?' * len(row))}, NULL)", row)
    old.close()
    for _ in range(2):  # the second time there is nothing left to change
        store = Store(tmp_path)
        assert store.id == "the-old-store"
        assert store.unwritten_export() is None
        numbers = [[ranking.number for ranking in store.rankings_of(export)] for export in (1, 2, None)]
        assert numbers == [[1, 2], [3], [4, 5]]
        with pytest.raises(InputError, match="exported to the training data"):
            store.withdraw("ranking-3", WHO)
        store.close()
    assert Store(tmp_path).begin_export([4]) == 3


def test_a_ranking_is_taken_back_by_its_maker_until_it_is_exported(store: Store) -> None:
    answers = shown(store, *TEXTS)
    for name in ("ranking-1", "ranking-2"):
        store.add_ranking(name, answers, [1, 2, 3], WHO)
    with pytest.raises(InputError, match=r"no ranking .* of yours"):
        store.withdraw("ranking-2", ELSE)
    assert store.withdraw("ranking-2", WHO) == store.withdraw("ranking-2", WHO)
    assert [ranking.id for ranking in store.rankings()] == ["ranking-1"]
    export = store.begin_export([1])
    with pytest.raises(InputError, match="exported to the training data"):
        store.withdraw("ranking-1", WHO)
    assert [ranking.id for ranking in store.rankings_of(export)] == ["ranking-1"]


@pytest.mark.parametrize(
    ("answers", "ranks", "sentence"),
    [
        ([0, 1, 2], [1, 2], "3 answers need 3 ranks; got 2"),
        ([0, 1, 2], [1, 2, 4], "at most 3; got 1, 2, 4"),
        ([0, 1, 2], [2, 2, 3], "from 1, the best"),
        ([0], [1], "2 to 6 answers; 1 were sent"),
        ([0, 0], [1, 2], "stands in the ranking twice"),
        ([0, 3], [1, 2], "belong to 2 prompts"),
        ([0, 4], [1, 2], "say the same"),
        ([0, 5], [1, 2], "There is no answer"),
    ],
)
def test_what_is_no_ranking_is_refused_with_a_sentence(
    store: Store, answers: list[int], ranks: list[int], sentence: str
) -> None:
    ids = [
        *shown(store, *TEXTS),
        *shown(store, "Paris.", prompt=[{"role": "user", "content": "And of France?"}]),
        *shown(store, "Lima. "),
        "never-given-by-anyone",
    ]
    with pytest.raises(InputError, match=sentence):
        store.add_ranking("ranking-1", [ids[at] for at in answers], ranks, WHO)
    assert store.rankings() == []


@pytest.mark.parametrize(("identifier", "annotator"), [("short", WHO), ("ranking-1", "<b>bold</b>"), ("a" * 65, WHO)])
def test_ids_have_a_form(store: Store, identifier: str, annotator: str) -> None:
    with pytest.raises(InputError, match='8 to 64 letters, digits, "-" or "_"'):
        store.add_ranking(identifier, shown(store, *TEXTS), [1, 2, 3], annotator)


def test_thumbs_and_flags_are_a_table_of_their_own(store: Store) -> None:
    [answer] = shown(store, TEXTS[0])
    up = store.add_opinion("opinion-1", answer, "up", WHO)
    assert store.add_opinion("opinion-1", answer, "up", WHO) == up
    flag = store.add_opinion("opinion-2", answer, "flag", WHO, note="It is rude.")
    assert store.opinions() == [up, flag]
    assert (flag.prompt, flag.response, flag.model, flag.note) == (PROMPT, TEXTS[0], "model-0", "It is rude.")
    assert store.rankings() == []
    with pytest.raises(InputError, match='one of up, down, none, flag, unflag; got "sideways"'):
        store.add_opinion("opinion-3", answer, "sideways", WHO)
    with pytest.raises(InputError, match="501 characters; 500 are allowed"):
        store.add_opinion("opinion-3", answer, "flag", WHO, note="x" * 501)


WRITER = """
import sys
from pathlib import Path
from serving.feedback import Store
store = Store(Path(sys.argv[1]))
answers = store.add_answers([{"role": "user", "content": "Which?"}], [(t, "m", 1.0, 0) for t in ("a", "b", "c")])
for number in range(1_000_000):
    identifier = f"{sys.argv[2]}-{number:08}"
    store.add_ranking(identifier, answers, [1, 2, 3], "annotator-one")
    print(identifier, flush=True)
"""


def test_every_acknowledged_ranking_survives_kill_9_once(tmp_path: Path) -> None:
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
            # What was printed until then counts too; a line cut short was not acknowledged.
            rest = writer.stdout.read()
            acknowledged += rest[: rest.rfind("\n") + 1].split()
            assert writer.wait() == -signal.SIGKILL
            writer.stdout.close()
    kept = [ranking.id for ranking in Store(folder).rankings()]
    assert len(acknowledged) >= 80
    assert set(acknowledged) <= set(kept)
    assert len(set(kept)) == len(kept)


def test_threads_and_stores_write_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(Store, [tmp_path / "feedback"] * 4))
    assert len({store.id for store in stores}) == 1
    answers = shown(stores[0], *TEXTS)

    def rank(at: int) -> None:
        stores[at % 4].add_ranking(f"ranking-{at // 2}", answers, [1, 2, 3], WHO)  # each is sent twice

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(rank, range(80)))
    assert sorted(ranking.id for ranking in stores[0].rankings()) == sorted(f"ranking-{at}" for at in range(40))


def test_a_full_disk_is_told_and_what_was_acknowledged_stays(store: Store) -> None:
    answers = shown(store, *TEXTS)
    store.add_ranking("ranking-0", answers, [1, 2, 3], WHO)
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    acknowledged = ["ranking-0"]
    with pytest.raises(FeedbackError, match=r"disk is full.*nothing was saved"):  # noqa: PT012
        for at in range(1, 1000):
            store.add_ranking(f"ranking-{at}", answers, [1, 2, 3], WHO)
            acknowledged.append(f"ranking-{at}")
    store._connection.execute("PRAGMA max_page_count = 100000")
    assert [ranking.id for ranking in store.rankings()] == acknowledged
    assert store.add_ranking("ranking-later", answers, [1, 2, 3], WHO).number == len(acknowledged) + 1


def test_commits_wait_for_the_disk(store: Store) -> None:
    assert store._connection.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    assert store._connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_a_file_that_cannot_be_used_is_told(tmp_path: Path) -> None:
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
    with pytest.raises(FeedbackError, match=VARIABLE):
        Store(tmp_path / "file" / "below")


def test_the_folder_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert feedback_folder() == tmp_path
    monkeypatch.delenv(VARIABLE)
    assert feedback_folder() == ROOT / "data/feedback"
    ignored = subprocess.run(["git", "check-ignore", "-q", "data/feedback/x"], cwd=ROOT, env=os.environ, check=False)
    assert ignored.returncode == 0
