"""The flow `rankings`: enough new rankings start a run, and a stopped run is retried."""

from collections.abc import Iterator
from typing import Any

import pytest
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from flows import poll, records
from flows import worktree as git_worktree
from serving.feedback.store import FEEDBACK_VARIABLE, Store
from tasks.common import params_file
from tests.conftest import Project
from tests.ranking_fixtures import FILE, add_rankings_source, rank

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CHECK = params_file.check


@pytest.fixture
def project(toy: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The toy project, with its own params.yaml, where two new rankings start a run."""
    monkeypatch.chdir(toy.path)
    monkeypatch.delenv(FEEDBACK_VARIABLE, raising=False)
    monkeypatch.setattr(params_file, "check", lambda params, stages=(): None)
    monkeypatch.setattr(git_worktree, "check", lambda path, stages=(): None)
    add_rankings_source(toy, min_new_rankings=2)
    return toy


@pytest.fixture
def store(project: Project) -> Iterator[Store]:
    feedback_store = Store(project.path / "data/feedback")
    yield feedback_store
    feedback_store.close()


def run_poll(**parameters: Any) -> State[Any]:
    """Run the flow as a worker does, in the project's folder, on Prefect's temporary server; return its final state."""
    return poll.poll(return_state=True, **parameters)


def runs(project: Project) -> list[dict[str, str]]:
    """Return how each run's stages ended, oldest run first."""
    logs = sorted((project.path / "runs").glob("run-*/flow.json"), key=lambda path: path.stat().st_mtime_ns)
    return [{name: stage["status"] for name, stage in records.read_json(log)["stages"].items()} for log in logs]


def test_poll_with_too_few_rankings_starts_no_run(project: Project, store: Store) -> None:
    rank(store, 1)
    state = run_poll()
    assert (state.name, state.type.value) == ("UpToDate", "COMPLETED")
    assert state.message == "1 new rankings; a run starts at 2."
    assert runs(project) == []
    assert not (project.path / FILE).exists()


def test_poll_with_enough_rankings_commits_and_starts_one_run(project: Project, store: Store) -> None:
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
    assert not (project.path / poll.PENDING_RUN).exists()

    assert run_poll().name == "UpToDate"
    assert len(runs(project)) == 1
    rank(store, 3)
    rank(store, 4)
    assert run_poll().is_completed()
    again = runs(project)[1]
    assert again["source"] == "ran"  # it reads the folder; its outputs are the same, so the other stages are restored
    assert "ran" not in {again[name] for name in ("side@left", "side@right", "join")}


def test_poll_retries_a_stopped_run(project: Project, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_poll_reports_a_failed_run_and_does_not_retry(project: Project, store: Store) -> None:
    project.settings(left={"fail": "the oven is cold"})
    project.commit("cold")
    rank(store, 1)
    rank(store, 2)
    state = run_poll()
    assert state.is_failed()
    assert "the oven is cold" in str(state.message)
    assert run_poll().name == "UpToDate"


def test_poll_during_a_merge_commits_nothing_and_retries(project: Project, store: Store) -> None:
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


def test_poll_without_a_worktree_commits_nothing(project: Project, store: Store) -> None:
    rank(store, 1)
    rank(store, 2)
    head = project.git("rev-parse", "HEAD")
    assert run_poll(worktree=False).is_completed()
    assert project.git("rev-parse", "HEAD") == head
    assert project.stages_run() == ["join", "left", "right", "source"]


def test_invalid_settings_are_reported_before_the_export(
    project: Project, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(params_file, "check", CHECK)
    rank(store, 1)
    rank(store, 2)
    state = run_poll()
    assert state.is_failed()
    assert "nothing was run" in str(state.message)
    assert not (project.path / FILE).exists()
