"""Export of rankings: each is exported exactly once, wherever the export is interrupted."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows import commands, rankings
from serving.feedback.store import FEEDBACK_VARIABLE, Store
from tasks.common.settings import BessemerError
from tasks.ingest.reading import Reading
from tasks.ingest.source_reading import read_source
from tasks.ingest.source_settings import Rankings
from tests.conftest import ROOT

PROMPT = [{"role": "user", "content": "What is the capital of Peru?"}]
MODELS = ("aaaa-1111", "bbbb-2222")
ANN, BOB = "annotator-ann", "annotator-bob"


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FEEDBACK_VARIABLE, raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder with a source of rankings in its params.yaml, and no rankings yet."""
    (tmp_path / "data/sources/rankings").mkdir(parents=True)
    (tmp_path / "params.yaml").write_text((ROOT / "profiles/smoke.yaml").read_text())
    return tmp_path


@pytest.fixture
def store(project: Path) -> Iterator[Store]:
    """The store of the project's endpoint."""
    feedback_store = Store(project / "data/feedback")
    yield feedback_store
    feedback_store.close()


def rank(store: Store, number: int, ranks: tuple[int, ...] = (1, 2), annotator: str = ANN) -> list[str]:
    """Add a ranking of two answers with a number in their texts; return the ids of the answers."""
    texts = [f"It is Lima, answer {number}.", f"Lima, obviously, answer {number}."]
    answers = store.add_answers(PROMPT, [(text, model, 0.7, None) for text, model in zip(texts, MODELS, strict=True)])
    store.add_ranking(f"ranking-{number}-{annotator}-{'-'.join(map(str, ranks))}", answers, ranks, annotator)
    return answers


def rows(path: Path) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return table


def files(project: Path) -> list[str]:
    return sorted(path.name for path in (project / "data/sources/rankings").iterdir())


def test_export_writes_new_rankings_once(project: Path, store: Store) -> None:
    rank(store, 1)
    rank(store, 2, (2, 1))
    assert rankings.count_pending(project) == rankings.PendingRankings(2, {})
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
    assert rankings.count_pending(project) == rankings.PendingRankings(0, {})
    assert rankings.exported_files(project) == [first.path, second.path]


def test_ingest_reads_an_exported_file(project: Path, store: Store) -> None:
    rank(store, 1, (2, 1))
    rank(store, 2, (1, 1), BOB)
    assert rankings.export(project)
    found: list[dict[str, Any]] = []
    reading = Reading("people", "MIT", rows={"rankings": found})
    source = Rankings(kind="rankings", name="people", licence="MIT", path="rankings")
    read_source(source, project / "data/sources", reading)
    first, second = found
    assert first["prompt"] == PROMPT
    assert first["responses"] == ["It is Lima, answer 1.", "Lima, obviously, answer 1."]
    assert (first["ranks"], second["ranks"]) == ([2, 1], [1, 1])
    assert first["models"] == list(MODELS)
    assert reading.rejections == 0


def test_an_exported_file_contains_pseudonyms(project: Path, store: Store) -> None:
    rank(store, 1)
    rank(store, 2)
    rank(store, 3, annotator=BOB)
    export = rankings.export(project)
    assert export is not None
    people = [row["annotator"] for row in rows(export.path)]
    assert people[0] == people[1] != people[2]
    assert ANN.encode() not in export.path.read_bytes()


def test_withdrawn_and_flagged_rankings_are_not_exported(project: Path, store: Store) -> None:
    rank(store, 1)
    rank(store, 2)
    third, fourth = rank(store, 3), rank(store, 4)
    store.withdraw("ranking-2-annotator-ann-1-2", ANN)
    store.add_opinion("opinion-1", third[0], "flag", BOB)
    store.add_opinion("opinion-4", third[0], "up", BOB)  # does not remove the flag
    store.add_opinion("opinion-2", fourth[1], "flag", BOB)
    store.add_opinion("opinion-3", fourth[1], "unflag", BOB)  # removes the flag
    assert rankings.count_pending(project) == rankings.PendingRankings(2, {"flagged answer": 1})
    export = rankings.export(project)
    assert export is not None
    assert (export.rankings, export.rejected) == (2, {"flagged answer": 1})
    assert [row["responses"][0][-2:-1] for row in rows(export.path)] == ["1", "4"]


def test_invalid_rankings_are_rejected_with_a_reason(project: Path, store: Store) -> None:
    rank(store, 1)
    invalid = ("half a \ufffd character", "x" * 1001)
    for number, text in enumerate(invalid):
        answers = store.add_answers(PROMPT, [(text, "aaaa-1111", 1.0, None), ("Lima.", "aaaa-1111", 1.0, None)])
        store.add_ranking(f"ranking-bad-{number}", answers, (2, 1), ANN)
    export = rankings.export(project)
    assert export is not None
    assert export.rankings == 1
    assert export.rejected == {
        "damaged encoding": 1,
        "a message or a response longer than 1000 characters": 1,
    }
    assert rankings.export(project) is None


def test_a_flagged_ranking_is_exported_after_the_flag_is_removed(project: Path, store: Store) -> None:
    answers = rank(store, 1)
    store.add_opinion("opinion-1", answers[0], "flag", BOB)
    assert rankings.export(project) is None
    assert rankings.count_pending(project) == rankings.PendingRankings(0, {"flagged answer": 1})
    store.add_opinion("opinion-2", answers[0], "unflag", BOB)
    assert rankings.export(project) is not None


def test_a_flagged_ranking_does_not_delay_others(project: Path, store: Store) -> None:
    answers = rank(store, 1)
    rank(store, 2)
    store.add_opinion("opinion-1", answers[0], "flag", BOB)
    assert rankings.export(project) is not None
    store.add_opinion("opinion-2", answers[0], "unflag", BOB)
    assert rankings.count_pending(project) == rankings.PendingRankings(1, {})
    second = rankings.export(project)
    assert second is not None
    assert [row["responses"][0] for row in rows(second.path)] == ["It is Lima, answer 1."]


def test_only_the_last_ranking_of_the_same_answers_is_exported(project: Path, store: Store) -> None:
    rank(store, 1, (1, 2))
    rank(store, 1, (2, 1))
    rank(store, 1, (1, 2), BOB)
    replaced = {"ranked again by the same person": 1}
    assert rankings.count_pending(project) == rankings.PendingRankings(2, replaced)
    export = rankings.export(project)
    assert export is not None
    assert (export.rankings, export.rejected) == (2, replaced)
    assert [row["ranks"] for row in rows(export.path)] == [[2, 1], [1, 2]]
    assert rankings.count_pending(project) == rankings.PendingRankings(0, {})


def test_a_file_of_another_origin_is_not_overwritten(project: Path, store: Store) -> None:
    by_hand = project / "data/sources/rankings/000007.parquet"
    by_hand.write_bytes(b"mine")
    (project / "data/sources/rankings/others.parquet").write_bytes(b"mine")
    rank(store, 1)
    export = rankings.export(project)
    assert export is not None
    assert export.path.name == "000008.parquet"
    assert by_hand.read_bytes() == b"mine"


def test_export_without_rankings_creates_nothing(project: Path) -> None:
    assert rankings.count_pending(project) == rankings.PendingRankings(0, {})
    assert rankings.export(project) is None
    assert files(project) == []
    assert not (project / "data/feedback").exists()


def test_export_without_a_rankings_source_fails_and_marks_nothing(project: Path, store: Store) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("kind: rankings", "kind: files"))
    rank(store, 1)
    with pytest.raises(BessemerError, match="lists no source of kind `rankings`"):
        rankings.export(project)
    assert len(store.rankings_by_export(None)) == 1


KILLED_EXPORT = """
import os, sys
from pathlib import Path
from flows import rankings
from serving.feedback import store

def kill(*arguments, **named):
    os._exit(9)

point = sys.argv[1]
if point == "before the rankings are marked":
    store.Store.begin_export = kill
elif point == "before the file is written":
    rankings._write_file = kill
elif point == "before the file is moved":
    Path.replace = lambda self, to: kill() if self.suffix == ".parquet" else os.replace(self, to)
elif point == "before the export is finished":
    store.Store.end_export = kill
rankings.export(Path())
"""
KILL_POINTS = (
    "before the rankings are marked",
    "before the file is written",
    "before the file is moved",
    "before the export is finished",
)


@pytest.mark.parametrize("point", KILL_POINTS)
def test_an_export_killed_at_any_point_loses_and_repeats_nothing(project: Path, store: Store, point: str) -> None:
    rank(store, 1)
    rank(store, 2)
    killed = subprocess.run([sys.executable, "-c", KILLED_EXPORT, point], cwd=project, check=False)
    assert killed.returncode == 9
    rank(store, 3)
    assert rankings.count_pending(project).rankings == 3
    while rankings.export(project):
        pass
    responses = [
        row["responses"][0] for name in files(project) for row in rows(project / "data/sources/rankings" / name)
    ]
    assert sorted(responses) == [f"It is Lima, answer {number}." for number in (1, 2, 3)]
    assert rankings.count_pending(project).rankings == 0
    assert list((project / rankings.SCRATCH_FOLDER).iterdir()) == []


def test_an_interrupted_export_is_completed_from_its_own_store(
    project: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank(store, 1)
    subprocess.run([sys.executable, "-c", KILLED_EXPORT, KILL_POINTS[1]], cwd=project, check=False)
    other = Store(tmp_path / "other")
    rank(other, 2)
    other.close()
    monkeypatch.setenv(FEEDBACK_VARIABLE, str(tmp_path / "other"))
    first = rankings.export(project)
    monkeypatch.delenv(FEEDBACK_VARIABLE)
    second = rankings.export(project)
    assert first is not None
    assert second is not None
    assert [rows(export.path)[0]["responses"][0][-2] for export in (first, second)] == ["2", "1"]


def test_parallel_exports_write_each_ranking_once(project: Path, store: Store) -> None:
    for number in range(1, 31):
        rank(store, number)
    code = "from pathlib import Path; from flows import rankings; rankings.export(Path())"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=project) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert files(project) == ["000001.parquet"]
    assert len(rows(project / "data/sources/rankings/000001.parquet")) == 30


def test_the_command_prints_the_file_and_the_next_step(
    project: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.export_rankings(project)
    assert "No new rankings to export." in capsys.readouterr().out
    answers = rank(store, 1)
    rank(store, 2)
    store.add_opinion("opinion-1", answers[0], "flag", BOB)
    commands.export_rankings(project)
    output = " ".join(capsys.readouterr().out.split())
    assert (
        "1 new ranking written to data/sources/rankings/000001.parquet; 1 not exported (flagged answer: 1)." in output
    )
    assert "bessemer run" in output
