"""People's rankings become files for the next run: each once, whole or not at all, wherever the export is cut off."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows import commands, rankings
from serving.feedback import VARIABLE, Store
from tasks.common.settings import BessemerError
from tasks.common.sources.kinds import Rankings, read_source
from tasks.common.sources.reading import Reading
from tests.conftest import ROOT

PROMPT = [{"role": "user", "content": "What is the capital of Peru?"}]
MODELS = ("aaaa-1111", "bbbb-2222")
ANN, BOB = "annotator-ann", "annotator-bob"


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project's folders and the sources of its params.yaml, with nothing ranked yet."""
    (tmp_path / "data/sources/rankings").mkdir(parents=True)
    (tmp_path / "params.yaml").write_text((ROOT / "profiles/smoke.yaml").read_text())
    return tmp_path


@pytest.fixture
def store(project: Path) -> Iterator[Store]:
    """The store of the project's endpoint."""
    opened = Store(project / "data/feedback")
    yield opened
    opened.close()


def rank(store: Store, number: int, ranks: tuple[int, ...] = (1, 2), annotator: str = ANN) -> list[str]:
    """Have somebody rank two answers that bear a number; return the answers' ids."""
    texts = [f"It is Lima, answer {number}.", f"Lima, obviously, answer {number}."]
    answers = store.add_answers(PROMPT, [(text, model, 0.7, None) for text, model in zip(texts, MODELS, strict=True)])
    store.add_ranking(f"ranking-{number}-{annotator}-{'-'.join(map(str, ranks))}", answers, ranks, annotator)
    return answers


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def files(project: Path) -> list[str]:
    return sorted(path.name for path in (project / "data/sources/rankings").iterdir())


def test_new_rankings_become_the_next_file_and_none_comes_twice(project: Path, store: Store) -> None:
    rank(store, 1)
    rank(store, 2, (2, 1))
    assert rankings.waiting(project) == rankings.Waiting(2, {})
    first = rankings.export(project)
    assert first is not None
    assert (first.path, first.rankings) == (project / "data/sources/rankings/000001.parquet", 2)
    content = first.path.read_bytes()
    assert rankings.export(project) is None
    rank(store, 3, (1, 1))
    second = rankings.export(project)
    assert second is not None
    assert [row["ranks"] for row in rows(second.path)] == [[1, 1]]
    assert files(project) == ["000001.parquet", "000002.parquet"]
    assert first.path.read_bytes() == content
    assert rankings.waiting(project) == rankings.Waiting(0, {})
    assert rankings.exported(project) == [first.path, second.path]


def test_what_is_written_is_what_ingest_reads(project: Path, store: Store) -> None:
    rank(store, 1, (2, 1))
    rank(store, 2, (1, 1), BOB)
    assert rankings.export(project)
    reading = Reading("people", "MIT")
    source = Rankings(kind="rankings", name="people", licence="MIT", path="rankings")
    read_source(source, project / "data/sources", reading)
    first, second = reading.rows["rankings"]
    assert first["prompt"] == PROMPT
    assert first["responses"] == ["It is Lima, answer 1.", "Lima, obviously, answer 1."]
    assert (first["ranks"], second["ranks"]) == ([2, 1], [1, 1])
    assert first["models"] == list(MODELS)
    assert reading.refusals == 0


def test_a_file_does_not_tell_what_would_let_one_speak_for_another(project: Path, store: Store) -> None:
    rank(store, 1)
    rank(store, 2)
    rank(store, 3, annotator=BOB)
    export = rankings.export(project)
    assert export is not None
    people = [row["annotator"] for row in rows(export.path)]
    assert people[0] == people[1] != people[2]
    assert ANN.encode() not in export.path.read_bytes()


def test_withdrawn_and_flagged_ones_stay_out(project: Path, store: Store) -> None:
    rank(store, 1)
    rank(store, 2)
    third, fourth = rank(store, 3), rank(store, 4)
    store.withdraw("ranking-2-annotator-ann-1-2", ANN)
    store.add_opinion("opinion-1", third[0], "flag", BOB)
    store.add_opinion("opinion-4", third[0], "up", BOB)  # which takes no flag back
    store.add_opinion("opinion-2", fourth[1], "flag", BOB)
    store.add_opinion("opinion-3", fourth[1], "unflag", BOB)  # taken back
    assert rankings.waiting(project) == rankings.Waiting(2, {"flagged answer": 1})
    export = rankings.export(project)
    assert export is not None
    assert (export.rankings, export.left_out) == (2, {"flagged answer": 1})
    assert [row["responses"][0][-2:-1] for row in rows(export.path)] == ["1", "4"]


def test_what_validate_would_refuse_stays_out_and_is_told(project: Path, store: Store) -> None:
    rank(store, 1)
    bad = ("half a \ufffd character", "<|end|> of it", "x" * 1001)
    for number, text in enumerate(bad):
        answers = store.add_answers(PROMPT, [(text, "aaaa-1111", 1.0, None), ("Lima.", "aaaa-1111", 1.0, None)])
        store.add_ranking(f"ranking-bad-{number}", answers, (2, 1), ANN)
    export = rankings.export(project)
    assert export is not None
    assert export.rankings == 1
    assert export.left_out == {
        "damaged encoding": 1,
        "the text holds <|end|>, which is reserved for the chat template": 1,
        "a message or a response longer than 1000 characters": 1,
    }
    assert rankings.export(project) is None


def test_flagged_ones_alone_wait_until_the_flag_is_taken_back(project: Path, store: Store) -> None:
    answers = rank(store, 1)
    store.add_opinion("opinion-1", answers[0], "flag", BOB)
    assert rankings.export(project) is None
    assert rankings.waiting(project) == rankings.Waiting(0, {"flagged answer": 1})
    store.add_opinion("opinion-2", answers[0], "unflag", BOB)
    assert rankings.export(project) is not None


def test_a_flagged_one_waits_while_others_go(project: Path, store: Store) -> None:
    answers = rank(store, 1)
    rank(store, 2)
    store.add_opinion("opinion-1", answers[0], "flag", BOB)
    assert rankings.export(project) is not None
    store.add_opinion("opinion-2", answers[0], "unflag", BOB)
    assert rankings.waiting(project) == rankings.Waiting(1, {})
    second = rankings.export(project)
    assert second is not None
    assert [row["responses"][0] for row in rows(second.path)] == ["It is Lima, answer 1."]


def test_who_ranks_the_same_answers_again_has_the_last_word(project: Path, store: Store) -> None:
    rank(store, 1, (1, 2))
    rank(store, 1, (2, 1))
    rank(store, 1, (1, 2), BOB)
    replaced = {"ranked again by the same person": 1}
    assert rankings.waiting(project) == rankings.Waiting(2, replaced)
    export = rankings.export(project)
    assert export is not None
    assert (export.rankings, export.left_out) == (2, replaced)
    assert [row["ranks"] for row in rows(export.path)] == [[2, 1], [1, 2]]
    assert rankings.waiting(project) == rankings.Waiting(0, {})


def test_a_file_put_there_by_hand_keeps_its_name(project: Path, store: Store) -> None:
    by_hand = project / "data/sources/rankings/000007.parquet"
    by_hand.write_bytes(b"mine")
    (project / "data/sources/rankings/others.parquet").write_bytes(b"mine")
    rank(store, 1)
    export = rankings.export(project)
    assert export is not None
    assert export.path.name == "000008.parquet"
    assert by_hand.read_bytes() == b"mine"


def test_nothing_ranked_leaves_nothing_behind(project: Path) -> None:
    assert rankings.waiting(project) == rankings.Waiting(0, {})
    assert rankings.export(project) is None
    assert files(project) == []
    assert not (project / "data/feedback").exists()


def test_without_a_source_of_rankings_nothing_is_marked(project: Path, store: Store) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("kind: rankings", "kind: files"))
    rank(store, 1)
    with pytest.raises(BessemerError, match="lists no source of kind `rankings`"):
        rankings.export(project)
    assert len(store.rankings_of(None)) == 1


KILLED = """
import os, sys
from pathlib import Path
from flows import rankings
from serving import feedback

def dies(*arguments, **named):
    os._exit(9)

point = sys.argv[1]
if point == "before the store marks":
    feedback.Store.begin_export = dies
elif point == "before the file is written":
    rankings._write = dies
elif point == "before the file is moved":
    Path.replace = lambda self, to: dies() if self.suffix == ".parquet" else os.replace(self, to)
elif point == "before its end":
    feedback.Store.end_export = dies
rankings.export(Path())
"""
POINTS = (
    "before the store marks",
    "before the file is written",
    "before the file is moved",
    "before its end",
)


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_every_ranking_is_exported_once(project: Path, store: Store, point: str) -> None:
    rank(store, 1)
    rank(store, 2)
    killed = subprocess.run([sys.executable, "-c", KILLED, point], cwd=project, check=False)
    assert killed.returncode == 9
    rank(store, 3)
    assert rankings.waiting(project).rankings == 3
    while rankings.export(project):
        pass
    found = [row["responses"][0] for name in files(project) for row in rows(project / "data/sources/rankings" / name)]
    assert sorted(found) == [f"It is Lima, answer {number}." for number in (1, 2, 3)]
    assert rankings.waiting(project).rankings == 0
    assert list((project / rankings.WORK).iterdir()) == []


def test_a_cut_off_export_of_another_store_is_that_stores(
    project: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank(store, 1)
    subprocess.run([sys.executable, "-c", KILLED, POINTS[1]], cwd=project, check=False)
    other = Store(tmp_path / "other")
    rank(other, 2)
    other.close()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other"))
    first = rankings.export(project)
    monkeypatch.delenv(VARIABLE)
    second = rankings.export(project)
    assert first is not None
    assert second is not None
    assert [rows(export.path)[0]["responses"][0][-2] for export in (first, second)] == ["2", "1"]


def test_two_exports_at_once_take_each_ranking_once(project: Path, store: Store) -> None:
    for number in range(1, 31):
        rank(store, number)
    code = "from pathlib import Path; from flows import rankings; rankings.export(Path())"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=project) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert files(project) == ["000001.parquet"]
    assert len(rows(project / "data/sources/rankings/000001.parquet")) == 30


def test_the_command_says_what_was_written_and_what_to_do_next(
    project: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.export_rankings(project)
    assert "No new rankings: nothing to export." in capsys.readouterr().out
    answers = rank(store, 1)
    rank(store, 2)
    store.add_opinion("opinion-1", answers[0], "flag", BOB)
    commands.export_rankings(project)
    told = " ".join(capsys.readouterr().out.split())
    assert "1 new ranking written to data/sources/rankings/000001.parquet; 1 left out (flagged answer: 1)." in told
    assert "bessemer run" in told
