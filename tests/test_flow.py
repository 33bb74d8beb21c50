"""The orchestration on the toy project: DVC's graph, running and stopping a stage, and the whole flow."""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

from flows import artifacts, forecast, graph, process_group, records, runner
from flows import worktree as git_worktree
from flows.records import Outcome
from flows.runner import Runner, StageFailed, StageStopped
from tasks.common import params_file
from tasks.common.harness.records import write_json
from tasks.common.settings import BessemerError, SettingsError
from tests.conftest import ROOT, Project

NAMES = ["source", "side@left", "side@right", "join"]


def run_flow(project: Project, **parameters: Any) -> Any:
    """Run the flow in this process, on Prefect's temporary server, and return its final state."""
    from flows.pipeline import chain

    return chain(project=str(project.path), return_state=True, **parameters)


def run_stage(project: Project, name: str) -> tuple[list[str], list[float]]:
    """Run one stage and return its lines and percentages."""
    lines: list[str] = []
    percentages: list[float] = []
    Runner(project.path, "run-test").run(name, lines.append, lambda percent, text: percentages.append(percent))
    return lines, percentages


def wait_for(condition: Callable[[], Any], description: str) -> Any:
    """Return the condition's value once it is true; fail after a minute and a half."""
    for _ in range(900):
        if result := condition():
            return result
        time.sleep(0.1)
    pytest.fail(f"waited in vain for {description}")


def pids(project: Project, stage: str) -> list[int]:
    """Wait until a hanging stage has started its grandchild and return both process ids."""
    path = project.path / "marks" / f"{stage}.pids"
    return [int(pid) for pid in wait_for(lambda: path.exists() and path.read_text(), f"{stage} to hang").split()]


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def states_of(project: Project) -> dict[str, Outcome]:
    """Return how the newest run's stages ended."""
    newest = max((project.path / "runs").glob("run-*/flow.json"), key=lambda path: path.stat().st_mtime_ns)
    return {name: Outcome(**outcome) for name, outcome in records.read_json(newest)["stages"].items()}


class TestGraph:
    def test_stages_are_in_dependency_order_with_reasons(self, toy: Project) -> None:
        stages = graph.read(toy.path)
        assert list(stages) == NAMES
        assert stages["join"].needs == ("side@left", "side@right")
        assert {stage.reasons for stage in stages.values()} == {("never run",)}

    def test_reasons_name_setting_code_input_and_missing_output(self, toy: Project) -> None:
        for name in NAMES:
            run_stage(toy, name)
        assert not any(stage.dirty for stage in graph.read(toy.path).values())
        toy.settings(left={"text": "new"})
        (toy.path / "data" / "source.txt").write_text("other\n")
        (toy.path / "data" / "right" / "out.txt").unlink()
        reasons = {name: stage.reasons for name, stage in graph.read(toy.path).items()}
        assert reasons["source"] == ("input: data/source.txt",)
        assert reasons["side@left"] == ("params: left.text two → new",)
        assert reasons["side@right"] == ("output: data/right/out.txt is missing",)
        assert reasons["join"] == ("input: data/right/out.txt is missing",)
        (toy.path / "steps.py").write_text((toy.path / "steps.py").read_text() + "# more\n")
        assert "code: steps.py" in graph.reasons(toy.path, "join")

    def test_fresh_clone_has_one_reason_per_stage(self, toy: Project) -> None:
        """So that the plan of a fresh clone fits one screen."""
        for name in NAMES:
            run_stage(toy, name)
        toy.settings(left={"text": "new"})
        shutil.rmtree(toy.path / ".dvc" / "cache")
        for stage in graph.read(toy.path).values():
            for out in stage.outs:
                (toy.path / out).unlink(missing_ok=True)
        reasons = {stage.reasons for stage in graph.read(toy.path).values()}
        assert reasons == {("its results are neither here nor in DVC's cache",)}

    def test_a_null_setting_is_a_change_as_for_dvc(self, toy: Project) -> None:
        for name in NAMES:
            run_stage(toy, name)
        toy.settings(left={"note": None})
        status = subprocess.run(["dvc", "status"], cwd=toy.path, check=True, capture_output=True, text=True).stdout
        assert "side@left" in status
        assert [name for name, stage in graph.read(toy.path).items() if stage.dirty] == ["side@left"]

    def test_stages_downstream_of_a_change_are_affected(self, toy: Project) -> None:
        for name in NAMES:
            run_stage(toy, name)
        toy.settings(left={"text": "new"})
        assert graph.affected(graph.read(toy.path)) == {"side@left", "join"}

    def test_affected_excludes_unaffected_outputs_when_only_files_are_appended(self, toy: Project) -> None:
        folder = toy.path / "data" / "box"
        (folder / "new").mkdir(parents=True)
        (folder / "word.txt").write_text("raw")
        (folder / "new" / "1.txt").write_text("one")
        dvc = toy.path / "dvc.yaml"
        text = dvc.read_text().replace(
            "deps: [steps.py, data/source.txt]",
            "deps: [steps.py, data/source.txt, data/box]\n"
            "    meta: {unaffected_outputs: {data/box/new: [data/source/out.txt]}}",
        )
        dvc.write_text(text)
        for name in NAMES:
            run_stage(toy, name)

        def stages_due() -> set[str]:
            return graph.affected(graph.read(toy.path))

        assert stages_due() == set()
        (folder / "new" / "2.txt").write_text("two")
        (folder / "new" / "3.txt").write_text("three")
        assert stages_due() == {"source"}
        (folder / "new" / "1.txt").write_text("another")
        assert stages_due() == set(NAMES)
        (folder / "new" / "1.txt").write_text("one")
        (folder / "word.txt").write_text("cooked")
        assert stages_due() == set(NAMES)
        (folder / "word.txt").write_text("raw")
        toy.settings(source={"text": "new"})
        assert stages_due() == set(NAMES)
        toy.settings(source={"text": "one"})
        assert stages_due() == {"source"}
        (toy.path / "data" / "source" / "out.txt").unlink()
        assert stages_due() == set(NAMES)

    def test_changed_reads_matches_equal_inner_and_outer_paths(self) -> None:
        reads = ["data/box", "data/other/part.txt", "steps.py"]
        changed = ["data/box", "data/box/new/1.txt", "data/boxes", "data/other", "data/other/part.txt", "data/side"]
        assert forecast.changed_reads(reads, changed) == {
            "data/box", "data/box/new/1.txt", "data/other", "data/other/part.txt"
        }  # fmt: skip

    def test_select_includes_required_stages(self, toy: Project) -> None:
        stages = graph.read(toy.path)
        assert list(graph.select(stages, ["side@right"])) == ["source", "side@right"]
        assert list(graph.select(stages, ["side"])) == ["source", "side@left", "side@right"]
        with pytest.raises(BessemerError, match=r"no stage 'sides'.*side@left"):
            graph.select(stages, ["sides"])

    def test_critical_path_is_the_heaviest_following_path(self, toy: Project) -> None:
        weights = {"source": 1.0, "side@left": 5.0, "side@right": 1.0, "join": 2.0}
        assert graph.critical_path(graph.read(toy.path), weights.__getitem__) == {
            "source": 8.0, "side@left": 7.0, "side@right": 3.0, "join": 2.0,
        }  # fmt: skip

    def test_differences_reach_into_nested_settings(self) -> None:
        before, now = {"a": 1, "b": {"c": [1, 2], "d": 3}}, {"a": 1, "b": {"c": [1], "e": True}}
        assert list(graph.differences("align", before, now)) == [
            "align.b.c [1, 2] → [1]",
            "align.b.d 3 → (none)",
            "align.b.e (none) → True",
        ]

    def test_an_unpacked_archive_works_without_git(self, toy: Project) -> None:
        (toy.path / ".git").rename(toy.path.parent / "elsewhere")
        assert list(graph.read(toy.path)) == NAMES
        assert "no_scm = true" in (toy.path / ".dvc" / "config.local").read_text().lower()
        run_stage(toy, "source")
        assert not graph.reasons(toy.path, "source")

    def test_folder_without_a_project_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(BessemerError, match="not a DVC project"):
            graph.read(tmp_path)


class TestRunner:
    def test_lines_and_percentages_are_separated(self, toy: Project) -> None:
        lines, percentages = run_stage(toy, "source")
        assert lines == ["source says one"]
        assert percentages == [10, 50, 100]

    @pytest.mark.parametrize(
        ("text", "percent", "rest"),
        [
            (" 42%|████▏     | 42/100 [00:05<00:07, 8.2it/s]", "42", "42/100 [00:05<00:07, 8.2it/s]"),
            ("Epoch 3:   7%|7         | 1/14 [00:00<?, ?it/s, loss=3.1]", "7", "1/14 [00:00<?, ?it/s, loss=3.1]"),
        ],
    )
    def test_progress_bars_are_known(self, text: str, percent: str, rest: str) -> None:
        match = runner.PROGRESS_BAR.match(text)
        assert match is not None
        assert (match["percent"], match["rest"]) == (percent, rest)

    @pytest.mark.parametrize("text", ["kept 42% of the rows", "42%", "a | b", "100 % | of what"])
    def test_other_lines_do_not_match_as_progress_bars(self, text: str) -> None:
        assert runner.PROGRESS_BAR.match(text) is None

    def test_output_lines_split_at_carriage_returns_and_keep_invalid_bytes(self) -> None:
        reading_end, write = os.pipe()
        os.write(write, "one\rtwo\r\nthr\u00e9".encode() + b"e\nbad \xff\nlast")
        os.close(write)
        with os.fdopen(reading_end, "rb") as stream:
            assert list(runner.split_lines(stream)) == ["one", "two", "thr\u00e9e", "bad \ufffd", "last"]

    def test_stage_failure_shows_the_last_output(self, toy: Project) -> None:
        toy.settings(source={"fail": "no such luck\n  in two lines"})
        with pytest.raises(StageFailed) as failure:
            run_stage(toy, "source")
        assert str(failure.value) == "source: no such luck\n  in two lines"

    def test_a_traceback_is_kept_to_its_end(self) -> None:
        lines = [f"line {number}" for number in range(40)] + [
            "ValueError: x",
            "ERROR: failed to reproduce 'a': failed to run: x, exited with 1",
        ]
        assert runner.error_message("a", lines).splitlines()[-1] == "ValueError: x"
        assert len(runner.error_message("a", lines).splitlines()) == runner.MAX_ERROR_LINES

    def test_an_error_of_dvc_itself_is_reported(self, toy: Project) -> None:
        (toy.path / "data" / "source.txt").unlink()
        with pytest.raises(StageFailed, match=r"source\.txt"):
            run_stage(toy, "source")

    def test_stop_kills_the_process_tree_and_leaves_no_partial_output(self, toy: Project) -> None:
        toy.settings(source={"hang": True})
        work = Runner(toy.path, "run-test")
        raised: list[BaseException] = []
        thread = threading.Thread(target=lambda: raised.append(_raised(lambda: work.run("source", print, _ignore))))
        thread.start()
        hanging = pids(toy, "source")
        work.stop()
        thread.join(30)
        assert all(is_gone(pid) for pid in hanging)
        assert isinstance(raised[0], StageStopped)
        assert not (toy.path / "data" / "source" / "out.txt").exists()
        assert records.read_json(toy.path / ".dvc" / "tmp" / "rwlock") in ({}, None)
        with pytest.raises(StageStopped):
            work.run("source", print, _ignore)

    def test_exception_in_the_follower_kills_the_process_tree(self, toy: Project) -> None:
        toy.settings(source={"hang": True})

        def follow(text: str) -> None:
            pids(toy, "source")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Runner(toy.path, "run-test").run("source", follow, _ignore)
        assert all(is_gone(pid) for pid in pids(toy, "source"))

    def test_killed_parent_kills_its_stage(self, toy: Project) -> None:
        toy.settings(source={"hang": True})
        code = (
            "from pathlib import Path; from flows.runner import Runner; Runner(Path(), 'r').run('source', print, print)"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", code], cwd=toy.path, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        hanging = pids(toy, "source")
        parent.kill()
        parent.wait()
        wait_for(lambda: all(is_gone(pid) for pid in hanging), "the stage to end after its parent")
        assert all(is_gone(pid) for pid in hanging)

    def test_process_that_ignores_sigterm_is_killed_after_the_timeout(self) -> None:
        ignores_sigterm = (
            "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
        )
        code = f"""
import subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
from flows import process_group
child = subprocess.Popen([sys.executable, "-c", {ignores_sigterm!r}], stdout=subprocess.PIPE)
child.stdout.readline()
process_group.end_children(child.pid, grace_s=0.5)
print(child.pid)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert is_gone(int(done.stdout))
        assert process_group.GRACE_PERIOD_S < 30


def _raised(function: Callable[[], Any]) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def _ignore(percent: float, text: str) -> None:
    pass


class TestFlow:
    @pytest.fixture(autouse=True)
    def skip_settings_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Skip the check of the settings: the toy project has its own params.yaml."""
        monkeypatch.setattr(params_file, "check", lambda params, stages=(): None)
        monkeypatch.setattr(git_worktree, "check", lambda path, stages=(): None)

    def test_independent_stages_overlap_and_the_second_run_does_nothing(self, toy: Project) -> None:
        toy.settings(left={"meet": "right"}, right={"meet": "left"})
        state = run_flow(toy)
        assert state.is_completed(), state.message
        assert toy.stages_run() == ["join", "left", "right", "source"]
        assert {outcome.status for outcome in states_of(toy).values()} == {"ran"}
        lock = (toy.path / "dvc.lock").read_bytes()
        toy.clear_marks()
        assert run_flow(toy).is_completed()
        assert toy.stages_run() == []
        assert {outcome.status for outcome in states_of(toy).values()} == {"up to date"}
        assert (toy.path / "dvc.lock").read_bytes() == lock

    def test_changed_setting_reruns_only_downstream_stages(self, toy: Project) -> None:
        assert run_flow(toy).is_completed()
        toy.clear_marks()
        toy.settings(left={"text": "new"})
        assert run_flow(toy).is_completed()
        assert toy.stages_run() == ["join", "left"]

    def test_dvc_repro_gives_the_same_lock(self, toy: Project) -> None:
        assert run_flow(toy).is_completed()
        lock = YAML().load(toy.path / "dvc.lock")
        (toy.path / "dvc.lock").unlink()
        _dvc(toy, "repro", "--quiet", "--force")
        assert YAML().load(toy.path / "dvc.lock") == lock

    def test_results_of_an_earlier_run_come_from_the_cache(self, toy: Project) -> None:
        assert run_flow(toy).is_completed()
        toy.settings(left={"text": "new"})
        assert run_flow(toy).is_completed()
        toy.settings(left={"text": "two"})
        toy.clear_marks()
        assert run_flow(toy).is_completed()
        assert toy.stages_run() == []
        assert {name for name, outcome in states_of(toy).items() if outcome.status == "restored"} == {
            "side@left",
            "join",
        }

    def test_failed_stage_ends_the_run_and_skips_dependents(self, toy: Project) -> None:
        toy.settings(left={"fail": "the ratings are missing: put them under data/sources"})
        state = run_flow(toy)
        assert state.is_failed()
        assert state.message == "side@left: the ratings are missing: put them under data/sources"
        outcomes = states_of(toy)
        assert outcomes["side@left"].status == "failed"
        assert outcomes["side@right"].status == "ran"
        assert "join" not in outcomes
        assert "join" not in toy.stages_run()

    def test_the_stage_with_the_longest_critical_path_starts_first(self, toy: Project) -> None:
        toy.settings(placement={"max_parallel_stages": 1})
        log = {"stage": "side@right", "seconds": 100.0, "started": "2026-01-01"}
        write_json(toy.path / "runs" / "run-earlier" / "side@right.json", log)
        assert run_flow(toy).is_completed()
        assert list(states_of(toy)) == ["source", "side@right", "side@left", "join"]

    def test_named_stages_run_with_their_dependencies(self, toy: Project) -> None:
        assert run_flow(toy, stages=["side@right"]).is_completed()
        assert toy.stages_run() == ["right", "source"]

    def test_invalid_settings_are_reported_before_anything_runs(
        self, toy: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()
        state = run_flow(toy)
        assert state.is_failed()
        assert "nothing was run" in state.message
        assert toy.stages_run() == []

    def test_a_worktree_checks_its_settings_and_shares_downloads_and_reports(self, toy: Project) -> None:
        with git_worktree.workdir(toy.path, "run-x", worktree=True) as workdir:
            for name in ("runs", "checkpoints", "data/.cache", "data/.failed"):
                assert (workdir / name).resolve() == toy.path / name
        (toy.path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
        toy.commit("ignored as in the project")
        with git_worktree.workdir(toy.path, "run-y", worktree=True) as workdir:
            assert subprocess.check_output(["git", "status", "--porcelain"], cwd=workdir, text=True) == ""
        assert (toy.path / "data" / ".failed").is_dir()

    def test_worktree_of_a_killed_run_is_removed(self, toy: Project) -> None:
        with git_worktree.workdir(toy.path, "run-x", worktree=True) as first:
            left = first.with_name("run-killed")
            toy.git("worktree", "add", "--quiet", "--detach", str(left), "HEAD")
            (left / "runs").symlink_to(toy.path / "runs", target_is_directory=True)
            with git_worktree.workdir(toy.path, "run-y", worktree=True) as second:
                assert {path.name for path in second.parent.iterdir() if path.is_dir()} == {"run-x", "run-y"}
        assert list(first.parent.iterdir()) == []
        assert (toy.path / "runs").is_dir()

    def test_worktree_run_shares_the_cache_and_keeps_its_result(self, toy: Project) -> None:
        (toy.path / "steps.py").write_text((toy.path / "steps.py").read_text() + "# being edited\n")
        assert run_flow(toy, worktree=True).is_completed()
        assert not (toy.path / "dvc.lock").exists()
        assert list((toy.path / ".bessemer" / "worktrees").iterdir()) == []
        (run_id,) = (path.parent.name for path in (toy.path / "runs").glob("*/flow.json"))
        assert run_id in _dvc(toy, "exp", "list", "--name-only")
        toy.git("checkout", "--quiet", "--", "steps.py")
        _dvc(toy, "exp", "apply", run_id)
        assert not any(stage.dirty for stage in graph.read(toy.path).values())
        assert (toy.path / "data" / "join" / "out.txt").exists()


def _dvc(project: Project, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=project.path, check=True, capture_output=True, text=True).stdout


class TestWorktreeSettings:
    def test_settings_are_checked_by_the_code_in_the_worktree(self, toy: Project) -> None:
        package = toy.path / "tasks" / "common"
        package.mkdir(parents=True)
        (package / "settings.py").write_text("class BessemerError(Exception): pass\n")
        (package / "params_file.py").write_text(
            "from tasks.common.settings import BessemerError\n"
            "def check(params, stages=()): raise BessemerError('params.yaml has 1 problem')\n"
        )
        (package / "raw_params.py").write_text("def read_params(): return open('params.yaml').read()\n")
        toy.commit("a check of its own")
        with (
            pytest.raises(SettingsError, match=r"^params\.yaml has 1 problem$"),
            git_worktree.workdir(toy.path, "run-x", worktree=True),
        ):
            pytest.fail("it was entered")
        assert list((toy.path / ".bessemer" / "worktrees").iterdir()) == []


class TestArtifacts:
    @pytest.mark.parametrize(
        ("verdict", "expected"),
        [
            ("validate: too few rows.\nThe report is data/.failed/validate/index.html.", ["the page"]),
            ("validate: the schema has changed.", []),
        ],
    )
    def test_the_report_on_rejected_data_is_published(
        self, toy: Project, monkeypatch: pytest.MonkeyPatch, verdict: str, expected: list[str]
    ) -> None:
        from flows import run

        def refuse(*arguments: Any) -> None:
            raise StageFailed(verdict)

        published: list[str] = []
        monkeypatch.setattr("prefect.artifacts.create_markdown_artifact", lambda text, **more: published.append(text))
        monkeypatch.setattr(run, "get_run_logger", lambda: logging.getLogger("test"))
        page = toy.path / artifacts.REJECTED_REPORT
        page.parent.mkdir(parents=True)
        page.write_text("the page")
        work = run.Run("run-x", toy.path)
        monkeypatch.setattr(work.runner, "run", refuse)
        assert work.run_stage("validate", ("never run",)).is_failed()
        assert published == expected

    @pytest.fixture
    def lineage(self, toy: Project) -> str:
        run_stage(toy, "source")
        outcomes = {"source": Outcome("ran", 1.25), "side@left": Outcome("failed", 0.5)}
        return artifacts.lineage(toy.path, graph.read(toy.path), outcomes, "run-x")

    def test_lineage_is_a_diagram_and_a_table(self, lineage: str) -> None:
        assert "```mermaid\nflowchart LR\n" in lineage
        assert 's1["side@left"]:::failed' in lineage
        assert "s0 --> s1" in lineage
        assert "| source | `aaaaaaaaaaaa` | `bbbbbbbbbbbb` | ran | 1.2 |" in lineage
        assert "| join |  |  | not run |  |" in lineage

    def test_diagram_omits_transitive_dependencies(self) -> None:
        stages = {
            name: graph.Stage(name, needs, (), ())
            for name, needs in {"a": (), "b": ("a",), "c": ("a", "b"), "d": ("a", "b", "c")}.items()
        }
        arrows = [line.strip() for line in artifacts.diagram(stages, {}).splitlines() if "-->" in line]
        assert arrows == ["s0 --> s1", "s1 --> s2", "s2 --> s3"]
