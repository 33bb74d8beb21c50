"""The command line on the toy project: output, exit codes, and no server without work to do."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from flows import cli, commands, doctor, environment, graph, profiles, records, server
from flows.runner import Runner
from serving import build, serve
from serving.build import BuildResult
from serving.errors import ServingError
from tasks.common import params_file
from tasks.common.defaults import read_settings
from tasks.common.harness.records import write_json
from tasks.common.settings import BessemerError, SettingsError
from tests.conftest import ROOT, Project

# The toy project has its own params.yaml, so its check is skipped.
DRIVER = """
from tasks.common import params_file
params_file.check = lambda params, **options: None
from flows.cli import main
main()
"""


def bessemer(project: Project, *arguments: str) -> subprocess.Popen[str]:
    """Start the command line in a project, in its own process group as a shell does."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        cwd=project.path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def wait_for_exit(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a command's end and return its exit code and output."""
    output, _ = process.communicate(timeout=110)
    return process.returncode, output


def wait_for(condition: Callable[[], Any], description: str) -> Any:
    """Return the condition's value once it is true."""
    for _ in range(900):
        if result := condition():
            return result
        time.sleep(0.1)
    pytest.fail(f"waited in vain for {description}")


@pytest.fixture
def toy_cwd(toy: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """The toy project as the working directory, without a check of the settings, with its own store of rankings."""
    monkeypatch.chdir(toy.path)
    monkeypatch.setenv("BESSEMER_FEEDBACK", str(toy.path / "data" / "feedback"))
    monkeypatch.setattr(params_file, "check", lambda params, **options: None)
    before = signal.getsignal(signal.SIGTERM)
    yield toy
    signal.signal(signal.SIGTERM, before)


def _locked_stages(project: Project) -> str:
    lock = project.path / "dvc.lock"
    return lock.read_text() if lock.exists() else ""


def rename_join_to_package(project: Project) -> None:
    """Rename the toy's last stage to `package`, after which the Bento is built."""
    stages = project.path / "dvc.yaml"
    stages.write_text(stages.read_text().replace("  join:\n", "  package:\n"))


def make_all(project: Project, last: str = "join") -> None:
    """Run all stages without Prefect."""
    for name in ("source", "side@left", "side@right", last):
        Runner(project.path, "run-earlier").run(name, lambda text: None, lambda percent, text: None)


class TestRun:
    def test_a_run_shows_plan_stages_and_next_commands(
        self, toy_cwd: Project, capsys: pytest.CaptureFixture[str]
    ) -> None:
        commands.run(Path(), [])
        output = capsys.readouterr().out
        assert "4 of 4 stages to run" in output
        assert output.index("▸ source") < output.index("✓ source") < output.index("✓ join")
        assert "side@left │ side@left says two" in output
        assert "bessemer chat" in output
        (page,) = re.findall(r"Report: (runs/run-[\w-]+/report\.html)", output)
        assert (toy_cwd.path / page).is_file()

        commands.run(Path(), [])
        assert "Nothing has changed: all 4 stages are up to date" in capsys.readouterr().out

    def test_a_run_without_evaluation_shows_no_earlier_scorecard(
        self, toy_cwd: Project, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_json(toy_cwd.path / records.SCORECARD_PATH, {"models": [{"model": "tuned"}], "gates": []})
        samples = toy_cwd.path / records.SAMPLES_PATH
        samples.parent.mkdir(parents=True)
        samples.write_text("<!doctype html>")
        commands.run(Path(), ["side"])
        output = capsys.readouterr().out
        assert "✓ side@right" in output
        assert "Report: " in output
        assert "tuned" not in output
        assert "Samples" not in output

    def test_next_commands_are_those_of_the_packaged_models(self, tmp_path: Path) -> None:
        provenance = tmp_path / commands.PROVENANCE
        provenance.parent.mkdir(parents=True)
        write_json(provenance, {"model": "bessemer:1", "contents": ["classifier"]})
        found = dict(commands._next_commands(tmp_path))
        assert found["bessemer serve"] == "serve on http://localhost:3000 (POST /classify, GET /provenance)"
        assert "bessemer chat" not in found

    def test_a_failure_is_one_message(self, toy_cwd: Project) -> None:
        toy_cwd.settings(right={"fail": "three lines of facts.csv have no capital"})
        with pytest.raises(BessemerError) as failure:
            commands.run(Path(), [])
        assert str(failure.value) == (
            "side@right: three lines of facts.csv have no capital\n"
            "Not done: side@right, join. `bessemer run` continues from here."
        )

    def test_an_error_exits_with_code_1_without_traceback(self, toy: Project) -> None:
        code, output = wait_for_exit(bessemer(toy, "plan", "-s", "polish"))
        assert code == 1
        assert output.startswith("Error: There is no stage 'polish'.")

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_interrupted_run_stops_its_stages_and_keeps_results(
        self, toy: Project, number: signal.Signals, code: int
    ) -> None:
        toy.settings(right={"hang": True})
        process = bessemer(toy, "run")
        pid_file = toy.path / "marks" / "right.pids"
        hanging = wait_for(lambda: pid_file.exists() and pid_file.read_text(), "the stage to hang").split()
        wait_for(lambda: "side@left" in _locked_stages(toy), "the stage beside it to be done")
        family = psutil.Process(process.pid).children(recursive=True)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal's Ctrl-C: Prefect's temporary server gets it too
        else:
            process.send_signal(number)
        exit_code, output = wait_for_exit(process)
        assert exit_code == code, output
        assert "Traceback" not in output
        assert not [pid for pid in hanging if psutil.pid_exists(int(pid))]
        assert not [child for child in family if child.is_running()]
        if number == signal.SIGINT:
            assert "Stopped. No partial results were kept" in output
        assert not (toy.path / "data" / "right" / "out.txt").exists()
        assert [name for name, stage in graph.read(toy.path).items() if stage.dirty] == ["side@right", "join"]

    def test_run_without_changes_does_not_import_prefect(
        self, toy_cwd: Project, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_all(toy_cwd)
        loaded = """
import sys
from pathlib import Path
from flows import commands
from serving import build, serve
from serving.build import BuildResult
from serving.errors import ServingError
from tasks.common import params_file
params_file.check = lambda params, **options: None
commands.run(Path(), [])
assert not [name for name in sys.modules if name.partition(".")[0] in ("prefect", "torch", "transformers")]
"""
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", loaded], env=env, capture_output=True, text=True, check=True)
        assert "Nothing has changed" in done.stdout

    def test_missing_bento_is_built_when_all_stages_are_up_to_date(
        self, toy_cwd: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename_join_to_package(toy_cwd)
        write_json(toy_cwd.path / commands.PROVENANCE, {"model": "abc-def"})
        results = [BuildResult("bessemer:1", Path(), created=True), BuildResult("bessemer:1", Path(), created=False)]
        monkeypatch.setattr(build, "build", lambda folder, root: results.pop(0))
        make_all(toy_cwd, last="package")
        commands.run(Path(), [])
        output = capsys.readouterr().out
        assert "Nothing has changed" in output
        assert "bessemer:1" in output
        commands.run(Path(), [])
        assert "bessemer:1" not in capsys.readouterr().out
        commands.run(Path(), ["side@left"])
        assert not results

    def test_a_bento_that_cannot_be_built_fails_the_run(
        self, toy_cwd: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def raise_disk_full(folder: Path, root: Path) -> BuildResult:
            raise OSError("No space left on device")

        rename_join_to_package(toy_cwd)
        monkeypatch.setattr(build, "build", raise_disk_full)
        with pytest.raises(
            BessemerError, match=r"build: .*No space left on device.*\nNot done: build\. `bessemer run`"
        ):
            commands.run(Path(), [])

    def test_invalid_params_are_reported_before_anything_runs(
        self, toy: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(toy.path)
        with pytest.raises(BessemerError, match="nothing was run"):
            commands.run(Path(), [])
        assert toy.stages_run() == []

    def test_unknown_stage_lists_the_stages(self, toy_cwd: Project) -> None:
        with pytest.raises(BessemerError, match=r"no stage 'polish'.*side@left"):
            commands.run(Path(), ["polish"])


class TestRejectedSettings:
    """Impossible settings are reported before a stage runs."""

    def test_more_processes_than_cores_is_an_error(self, toy_cwd: Project) -> None:
        toy_cwd.settings(numerics={"parallel": {"processes": 4096, "engine": "data"}})
        with pytest.raises(BessemerError, match="4096 processes should train on this machine"):
            commands.run(toy_cwd.path, [])
        assert not (toy_cwd.path / "dvc.lock").exists()

    @pytest.mark.parametrize("command", [commands.run, commands.plan])
    def test_invalid_graph_is_reported_before_anything_runs(
        self, command: Callable[[Path, list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An alignment that starts from a classifier is rejected."""
        for part in ("dvc.yaml", "params.yaml", "requirements.lock"):
            shutil.copy(ROOT / part, tmp_path)
        for part in ("tasks", "serving"):
            shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / ".dvc").mkdir()
        (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n", encoding="utf-8")
        params = read_settings(tmp_path / "params.yaml")
        params["finetune"]["chat"]["task"] = {"name": "classification", "max_labels": 5}
        params["finetune"]["chat"]["pretraining_mix"]["weight"] = 0.0
        (tmp_path / "params.yaml").write_text(json.dumps(params), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            SettingsError, match=r"align\.policy\.model: found .*, a classifier, but it should be a causal model"
        ):
            command(tmp_path, [])


class TestPlanAndStatus:
    def test_plan_shows_reasons_and_last_durations(self, toy_cwd: Project, capsys: pytest.CaptureFixture[str]) -> None:
        make_all(toy_cwd)
        toy_cwd.settings(left={"text": "new"})
        commands.plan(Path(), [])
        output = capsys.readouterr().out
        assert "2 of 4 stages to run; 2 up to date." in output
        assert re.search(r"side@left +2 s +params: left\.text two → new", output)
        assert re.search(r"join +2 s +after side@left", output)
        assert "these took 3 s" in output

    def test_plan_without_changes_prints_a_message(self, toy_cwd: Project, capsys: pytest.CaptureFixture[str]) -> None:
        make_all(toy_cwd)
        commands.plan(Path(), ["side@left"])
        assert "Nothing to do: all 2 stages are up to date" in capsys.readouterr().out

    def test_status_shows_state_model_and_gates(self, toy_cwd: Project, capsys: pytest.CaptureFixture[str]) -> None:
        make_all(toy_cwd)
        toy_cwd.settings(join={"text": "new"})
        write_json(toy_cwd.path / commands.PROVENANCE, {"model": "abc-def"})
        models = [{"model": "tuned", "exact_match_seen": 0.97, "perplexity": None, "parameters": 5_600_000}]
        gates = [{"metric": "bytes", "model": "chat", "against": "base", "relative": True, "max": 0.28, "value": 0.3}]
        gates.append({"metric": "win_rate", "model": "policy", "min": 0.5, "value": None})
        gates = [{**gate, "passed": False} for gate in gates]
        write_json(toy_cwd.path / records.SCORECARD_PATH, {"models": models, "gates": gates})
        commands.status(Path())
        output = capsys.readouterr().out
        assert "3 of 4 stages are up to date; the packaged model is abc-def." in output
        assert re.search(r"join +params: join\.text four → new", output)
        assert re.search(r"tuned +5\.60 M +97\.0", output)
        assert "an earlier run" not in output
        assert "0 of 2 gates passed." in output
        assert "win rate of policy: no value, limit ≥ 0.5" in output
        assert "bytes of chat relative to base: 0.3, limit ≤ 0.28" in output

    def test_status_marks_a_scorecard_of_an_earlier_run(
        self, toy_cwd: Project, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stages = toy_cwd.path / "dvc.yaml"
        stages.write_text(stages.read_text().replace("  join:\n", "  compare:\n"))
        with (toy_cwd.path / "params.yaml").open("a", encoding="utf-8") as file:
            file.write("evaluate: {tuned: {model: models/mine}}\n")  # without an evaluation there is no scorecard
        make_all(toy_cwd, last="compare")
        write_json(toy_cwd.path / records.SCORECARD_PATH, {"models": [{"model": "tuned"}], "gates": []})
        toy_cwd.settings(left={"text": "new"})
        commands.status(Path())
        output = capsys.readouterr().out
        assert output.index("figures of an earlier run") < output.index("tuned")


class TestProfiles:
    @pytest.fixture
    def project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(profiles, "check", lambda params, name: None)
        (tmp_path / "profiles").mkdir()
        (tmp_path / "profiles" / "small.yaml").write_text("# Small and quick.\na: 1\n")
        (tmp_path / "profiles" / "large.yaml").write_text("# Large.\na: 2\n")
        return tmp_path

    def test_current_profile_is_found_by_its_values(self, project: Path) -> None:
        assert profiles.current(project) is None
        assert profiles.use(project, "small") is None
        (project / "params.yaml").write_text("a:   1\n")
        assert profiles.current(project) == "small"
        assert profiles.names(project) == ["large", "small"]
        assert profiles.describe(project, "small") == "Small and quick."

    def test_edited_params_are_backed_up(self, project: Path) -> None:
        (project / "params.yaml").write_text("a: 3\n")
        backup = profiles.use(project, "large")
        assert backup is not None
        assert backup.read_text() == "a: 3\n"
        assert (project / "params.yaml").read_text() == "# Large.\na: 2\n"
        assert not list(project.glob(".params*"))

    def test_invalid_yaml_is_replaced_and_backed_up(self, project: Path) -> None:
        (project / "params.yaml").write_text("a: [1")
        assert profiles.current(project) is None
        backup = profiles.use(project, "small")
        assert backup is not None
        assert backup.read_text() == "a: [1"
        assert profiles.current(project) == "small"

    def test_invalid_profile_is_named(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(profiles, "check", params_file.check)
        with pytest.raises(BessemerError, match=r"^\S+profiles/small\.yaml has \d+ problems"):
            profiles.use(project, "small")

    def test_unknown_profile_lists_the_profiles(self, project: Path) -> None:
        with pytest.raises(BessemerError, match=r"no profile 'huge'.*large, small"):
            profiles.use(project, "huge")


def answer_like_mail_server(server: socket.socket) -> None:
    """Answer one client like a mail server."""
    caller, _ = server.accept()
    with caller:
        caller.sendall(b"220 not HTTP at all\r\n")


class TestServerAndDoctor:
    def test_used_port_suggests_another(self, tmp_path: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            with pytest.raises(ServingError, match=f"Port {port} on 127.0.0.1 is taken.*ui --port 4201"):
                server.serve_ui(tmp_path, "127.0.0.1", port)
            with pytest.raises(ServingError, match=f"Port {port} on 127.0.0.1 is taken.*PORT=3001.*--port 3001"):
                serve.serve(port)
        serve.check_port(port, "127.0.0.1", "")

    def test_suggested_port_differs_from_the_used_one(self) -> None:
        assert (serve.alternative_port(3000, 3000), serve.alternative_port(3001, 3000)) == (3001, 3002)

    def test_unknown_host_is_not_reported_as_used_port(self) -> None:
        with pytest.raises(ServingError, match=r"'no\.such\.host\.invalid' is not an address of this machine.*--host"):
            serve.check_port(4200, "no.such.host.invalid", "")

    @pytest.mark.parametrize("command", ["ui", "serve"])
    def test_invalid_port_is_a_usage_error(self, toy: Project, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
        monkeypatch.chdir(toy.path)
        result = CliRunner().invoke(cli.cli, [command, "--port", "99999"])
        assert result.exit_code == 2
        assert "99999 is not in the range" in result.output

    def test_unreachable_server_is_not_used(self, tmp_path: Path) -> None:
        assert environment.running_server(tmp_path) is None
        environment.note_server(tmp_path, "http://127.0.0.1:9/api")
        assert environment.running_server(tmp_path) is None
        with socket.create_server(("127.0.0.1", 0)) as server:  # another program has taken the port
            environment.note_server(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}/api")
            answer = threading.Thread(target=answer_like_mail_server, args=(server,))
            answer.start()
            assert environment.running_server(tmp_path) is None
            answer.join()
        (tmp_path / environment.SERVER_NOTE).write_text("[]")
        assert environment.running_server(tmp_path) is None

    def test_doctor_compares_packages_with_the_lock(self) -> None:
        assert doctor.differing_packages((ROOT / "requirements.lock").read_text()) == []
        assert doctor.differing_packages("click==0.1\nno-such-package==2\n") == [
            f"click {metadata.version('click')} instead of 0.1",
            "no-such-package none instead of 2",
        ]

    def test_doctor_continues_after_a_problem(self, tmp_path: Path) -> None:
        findings = list(doctor.examine(tmp_path))
        assert any(not finding.good and "requirements.lock is missing" in finding.text for finding in findings)
        assert any(not finding.good and "params.yaml is missing" in finding.text for finding in findings)
        assert any(finding.good and "cores" in finding.text for finding in findings)


class TestHelp:
    def test_every_command_shows_examples(self, toy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(toy.path)
        for name in cli.cli.commands:
            result = CliRunner().invoke(cli.cli, [name, "--help"])
            assert result.exit_code == 0
            assert f"bessemer {name}" in result.output, f"`bessemer {name} --help` shows no example"

    def test_outside_of_a_project_is_an_error(self, tmp_path: Path, toy: Project) -> None:
        (toy.path / "deep" / "down").mkdir(parents=True)
        assert cli.project_root(toy.path / "deep" / "down") == toy.path
        with pytest.raises(BessemerError, match="is not inside a project"):
            cli.project_root(tmp_path)

    def test_a_wrong_option_ends_with_code_two(self, toy: Project) -> None:
        code, output = wait_for_exit(bessemer(toy, "run", "--quick"))
        assert code == 2
        assert "No such option" in output
