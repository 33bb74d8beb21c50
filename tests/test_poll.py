"""The flow that waits for rankings: enough of them start a run, once, and nothing that it owes is forgotten."""

from collections.abc import Iterator
from typing import Any

import pytest
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from flows import poll, records, workplace
from serving.feedback import VARIABLE, Store
from tasks.common import settings
from tests.conftest import Project
from tests.ranking_fixtures import FILE, listen, rank

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CHECK = settings.check


@pytest.fixture
def project(toy: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The toy project, of which two new rankings start a run; its params.yaml is none of Bessemer's."""
    monkeypatch.chdir(toy.path)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(settings, "check", lambda params, stages=(): None)
    monkeypatch.setattr(workplace, "check", lambda path, stages=(): None)
    listen(toy, enough=2)
    return toy


@pytest.fixture
def store(project: Project) -> Iterator[Store]:
    opened = Store(project.path / "data/feedback")
    yield opened
    opened.close()


def run_poll(**parameters: Any) -> State[Any]:
    """Run the flow as a worker does, in the project's folder, on Prefect's temporary server; return its final state."""
    return poll.poll(return_state=True, **parameters)


def runs(project: Project) -> list[dict[str, str]]:
    """Return how each run's stages ended, oldest run first."""
    logs = sorted((project.path / "runs").glob("run-*/flow.json"), key=lambda path: path.stat().st_mtime_ns)
    return [{name: stage["status"] for name, stage in records.read_json(log)["stages"].items()} for log in logs]


def test_too_few_rankings_start_nothing(project: Project, store: Store) -> None:
    rank(store, 1)
    state = run_poll()
    assert (state.name, state.type.value) == ("UpToDate", "COMPLETED")
    assert state.message == "1 new rankings wait; 2 start a run."
    assert runs(project) == []
    assert not (project.path / FILE).exists()


def test_enough_are_committed_alone_and_run_the_chain_once(project: Project, store: Store) -> None:
    rank(store, 1)
    rank(store, 2)
    (project.path / "steps.py").write_text((project.path / "steps.py").read_text() + "# being edited\n")
    (project.path / "mine.txt").write_text("staged")
    project.git("add", "mine.txt")
    state = run_poll()
    assert state.is_completed(), state.message
    assert project.git("show", "--name-only", "--format=%s").split("\n\n") == ["New rankings by people", f"{FILE}\n"]
    assert project.git("status", "--porcelain").splitlines() == ["A  mine.txt", " M steps.py"]
    assert runs(project) == [dict.fromkeys(("source", "side@left", "side@right", "join"), "ran")]
    assert not (project.path / poll.DUE).exists()

    assert run_poll().name == "UpToDate"
    assert len(runs(project)) == 1
    rank(store, 3)
    rank(store, 4)
    assert run_poll().is_completed()
    again = runs(project)[1]
    assert again["source"] == "ran"  # it reads the folder; what it leaves is the same, so that the rest is restored
    assert "ran" not in {again[name] for name in ("side@left", "side@right", "join")}


def test_a_run_that_was_stopped_is_still_owed(project: Project, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    @flow(name="stopped")
    def stopped(**parameters: Any) -> State[Any]:
        return Cancelled(message="by somebody")

    rank(store, 1)
    rank(store, 2)
    with monkeypatch.context() as patch:
        patch.setattr(poll, "chain", stopped)
        assert run_poll().is_cancelled()
    assert (project.path / FILE).exists()
    assert run_poll().is_completed()
    assert len(runs(project)) == 1
    assert run_poll().name == "UpToDate"


def test_a_failed_run_is_told_and_not_tried_for_ever(project: Project, store: Store) -> None:
    project.settings(left={"fail": "the oven is cold"})
    project.commit("cold")
    rank(store, 1)
    rank(store, 2)
    state = run_poll()
    assert state.is_failed()
    assert "the oven is cold" in str(state.message)
    assert run_poll().name == "UpToDate"


def test_in_the_middle_of_a_merge_nothing_is_committed_and_the_next_poll_goes_on(
    project: Project, store: Store
) -> None:
    rank(store, 1)
    rank(store, 2)
    head = project.git("rev-parse", "HEAD").strip()
    merging = project.path / ".git" / "MERGE_HEAD"
    merging.write_text(head)
    state = run_poll()
    assert state.is_failed()
    assert f"in the middle of a merge or rebase (MERGE_HEAD), so {FILE} cannot be committed" in str(state.message)
    assert project.git("rev-parse", "HEAD").strip() == head
    assert runs(project) == []
    merging.unlink()
    assert run_poll().is_completed()
    assert project.git("show", "--name-only", "--format=").split() == [FILE]
    assert len(runs(project)) == 1


def test_in_the_project_itself_nothing_is_committed(project: Project, store: Store) -> None:
    rank(store, 1)
    rank(store, 2)
    head = project.git("rev-parse", "HEAD")
    assert run_poll(worktree=False).is_completed()
    assert project.git("rev-parse", "HEAD") == head
    assert project.ran() == ["join", "left", "right", "source"]


def test_wrong_settings_are_told_before_anything_is_exported(
    project: Project, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "check", CHECK)
    rank(store, 1)
    rank(store, 2)
    state = run_poll()
    assert state.is_failed()
    assert "nothing was run" in str(state.message)
    assert not (project.path / FILE).exists()
