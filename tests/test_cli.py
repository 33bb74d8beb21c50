"""The command line on the toy project: what it says, how it ends, and that nothing to do starts no server."""

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
from serving.build import Built
from serving.errors import ServingError
from tasks.common import settings
from tasks.common.settings import BessemerError, SettingsError, read_params
from tasks.common.stage import write_json
from tests.conftest import ROOT, Project

# The toy's params.yaml is none of Bessemer's, so its check is left out.
DRIVER = """
from tasks.common import settings
settings.check = lambda params, stages=(): None
from flows.cli import main
main()
"""


def bessemer(project: Project, *arguments: str) -> subprocess.Popen[str]:
    """Start the command line in a project, in a process group of its own as a shell does."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        cwd=project.path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a command's end and return its exit code and output."""
    output, _ = process.communicate(timeout=110)
    return process.returncode, output


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Return the condition's value once it is true."""
    for _ in range(900):
        if found := condition():
            return found
        time.sleep(0.1)
    pytest.fail(f"waited in vain for {what}")


@pytest.fixture
def inside(toy: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """The toy project as the current folder, its settings not checked, with a store of rankings of its own."""
    monkeypatch.chdir(toy.path)
    monkeypatch.setenv("BESSEMER_FEEDBACK", str(toy.path / "data" / "feedback"))
    monkeypatch.setattr(settings, "check", lambda params, stages=(): None)
    before = signal.getsignal(signal.SIGTERM)
    yield toy
    signal.signal(signal.SIGTERM, before)


def _locked(project: Project) -> str:
    lock = project.path / "dvc.lock"
    return lock.read_text() if lock.exists() else ""


def end_in_a_package(project: Project) -> None:
    """Call the toy's last stage `package`, after which the Bento is built."""
    stages = project.path / "dvc.yaml"
    stages.write_text(stages.read_text().replace("  join:\n", "  package:\n"))


def make_all(project: Project, last: str = "join") -> None:
    """Run all stages without Prefect."""
    for name in ("source", "side@left", "side@right", last):
        Runner(project.path, "run-earlier").run(name, lambda text: None, lambda percent, text: None)


class TestRun:
    def test_a_run_tells_its_plan_its_stages_and_what_to_do_next(
        self, inside: Project, capsys: pytest.CaptureFixture[str]
    ) -> None:
        commands.run(Path(), [])
        output = capsys.readouterr().out
        assert "4 of 4 stages to run" in output
        assert output.index("▸ source") < output.index("✓ source") < output.index("✓ join")
        assert "side@left │ side@left says two" in output
        assert "bessemer chat" in output
        (page,) = re.findall(r"Report: (runs/run-[\w-]+/report\.html)", output)
        assert (inside.path / page).is_file()

        commands.run(Path(), [])
        assert "Nothing has changed: all 4 stages are up to date" in capsys.readouterr().out

    def test_a_run_that_evaluates_nothing_shows_no_earlier_sheet_or_samples(
        self, inside: Project, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_json(inside.path / records.SHEET, {"models": [{"model": "tuned"}], "gates": []})
        samples = inside.path / records.SAMPLES
        samples.parent.mkdir(parents=True)
        samples.write_text("<!doctype html>")
        commands.run(Path(), ["side"])
        shown = capsys.readouterr().out
        assert "✓ side@right" in shown
        assert "Report: " in shown
        assert "tuned" not in shown
        assert "Samples" not in shown

    def test_a_failure_is_a_sentence(self, inside: Project) -> None:
        inside.settings(right={"fail": "three lines of facts.csv have no capital"})
        with pytest.raises(BessemerError) as failure:
            commands.run(Path(), [])
        assert str(failure.value) == (
            "side@right: three lines of facts.csv have no capital\n"
            "Not done: side@right, join. `bessemer run` goes on from here."
        )

    def test_a_sentence_ends_the_command_with_code_one_and_no_traceback(self, toy: Project) -> None:
        code, output = ended(bessemer(toy, "plan", "-s", "polish"))
        assert code == 1
        assert output.startswith("Error: There is no stage 'polish'.")

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_an_interrupted_run_ends_its_stages_and_keeps_what_was_done(
        self, toy: Project, number: signal.Signals, code: int
    ) -> None:
        toy.settings(right={"hang": True})
        process = bessemer(toy, "run")
        noted = toy.path / "marks" / "right.pids"
        hanging = wait_for(lambda: noted.exists() and noted.read_text(), "the stage to hang").split()
        wait_for(lambda: "side@left" in _locked(toy), "the stage beside it to be done")
        family = psutil.Process(process.pid).children(recursive=True)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal's Ctrl-C: Prefect's temporary server gets it too
        else:
            process.send_signal(number)
        found, output = ended(process)
        assert found == code, output
        assert "Traceback" not in output
        assert not [pid for pid in hanging if psutil.pid_exists(int(pid))]
        assert not [child for child in family if child.is_running()]
        if number == signal.SIGINT:
            assert "Stopped. Nothing half-written was kept" in output
        assert not (toy.path / "data" / "right" / "out.txt").exists()
        assert [name for name, stage in graph.read(toy.path).items() if stage.dirty] == ["side@right", "join"]

    def test_nothing_to_do_loads_no_prefect(self, inside: Project, capsys: pytest.CaptureFixture[str]) -> None:
        make_all(inside)
        loaded = """
import sys
from pathlib import Path
from flows import commands
from serving import build, serve
from serving.build import Built
from serving.errors import ServingError
from tasks.common import settings
settings.check = lambda params, stages=(): None
commands.run(Path(), [])
assert not [name for name in sys.modules if name.partition(".")[0] in ("prefect", "torch", "transformers")]
"""
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", loaded], env=env, capture_output=True, text=True, check=True)
        assert "Nothing has changed" in done.stdout

    def test_a_missing_bento_is_made_though_all_stages_are_up_to_date(
        self, inside: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        end_in_a_package(inside)
        write_json(inside.path / commands.PROVENANCE, {"model": "abc-def"})
        found = [Built("bessemer:1", Path(), made=True), Built("bessemer:1", Path(), made=False)]
        monkeypatch.setattr(build, "build", lambda folder, root: found.pop(0))
        make_all(inside, last="package")
        commands.run(Path(), [])
        shown = capsys.readouterr().out
        assert "Nothing has changed" in shown
        assert "bessemer:1" in shown
        commands.run(Path(), [])
        assert "bessemer:1" not in capsys.readouterr().out
        commands.run(Path(), ["side@left"])
        assert not found

    def test_a_bento_that_cannot_be_built_fails_the_run(self, inside: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(folder: Path, root: Path) -> Built:
            raise OSError("No space left on device")

        end_in_a_package(inside)
        monkeypatch.setattr(build, "build", full)
        with pytest.raises(
            BessemerError, match=r"build: .*No space left on device.*\nNot done: build\. `bessemer run`"
        ):
            commands.run(Path(), [])

    def test_problems_in_params_are_told_before_anything_runs(
        self, toy: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(toy.path)
        with pytest.raises(BessemerError, match="nothing was run"):
            commands.run(Path(), [])
        assert toy.ran() == []

    def test_an_unknown_stage_is_told_with_those_there_are(self, inside: Project) -> None:
        with pytest.raises(BessemerError, match=r"no stage 'polish'.*side@left"):
            commands.run(Path(), ["polish"])


class TestRefusals:
    """What params.yaml or the machine cannot do is told before a stage runs."""

    def test_more_processes_than_cores(self, inside: Project) -> None:
        inside.settings(numerics={"parallel": {"processes": 4096, "engine": "data"}})
        with pytest.raises(BessemerError, match="4096 processes are to train on this machine"):
            commands.run(inside.path, [])
        assert not (inside.path / "dvc.lock").exists()

    @pytest.mark.parametrize("command", [commands.run, commands.plan])
    def test_a_chain_that_cannot_end(
        self, command: Callable[[Path, list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A classifier answers no questions: as the end of a chain it is sound, with PPO behind it it is not."""
        for part in ("dvc.yaml", "params.yaml", "requirements.lock"):
            shutil.copy(ROOT / part, tmp_path)
        (tmp_path / ".dvc").mkdir()
        (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n", encoding="utf-8")
        params = read_params(tmp_path / "params.yaml")
        params["finetune"]["task"] = {"name": "classification", "labels": 5}
        params["finetune"]["mix"]["weight"] = 0.0
        (tmp_path / "params.yaml").write_text(json.dumps(params), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SettingsError, match=r"found 'classification', but .*ppo.* need chat"):
            command(tmp_path, [])


class TestPlanAndStatus:
    def test_plan_says_why_and_how_long_it_took(self, inside: Project, capsys: pytest.CaptureFixture[str]) -> None:
        make_all(inside)
        inside.settings(left={"text": "new"})
        commands.plan(Path(), [])
        shown = capsys.readouterr().out
        assert "2 of 4 stages to run; 2 up to date." in shown
        assert re.search(r"side@left +2 s +params: left\.text two → new", shown)
        assert re.search(r"join +2 s +after side@left", shown)
        assert "these took 3 s" in shown

    def test_plan_with_nothing_to_do_says_so(self, inside: Project, capsys: pytest.CaptureFixture[str]) -> None:
        make_all(inside)
        commands.plan(Path(), ["side@left"])
        assert "Nothing to do: all 2 stages are up to date" in capsys.readouterr().out

    def test_status_shows_state_model_and_gates(self, inside: Project, capsys: pytest.CaptureFixture[str]) -> None:
        make_all(inside)
        inside.settings(join={"text": "new"})
        write_json(inside.path / commands.PROVENANCE, {"model": "abc-def"})
        models = [{"model": "tuned", "exact_match_tuned": 0.97, "perplexity": None, "parameters": 5_600_000}]
        gates = [{"name": "size", "value": 0.3, "limit": 0.28, "passed": False}]
        gates.append({"name": "gain", "value": None, "limit": 0.5, "passed": False})
        write_json(inside.path / records.SHEET, {"models": models, "gates": gates})
        commands.status(Path())
        shown = capsys.readouterr().out
        assert "3 of 4 stages are up to date; the packaged model is abc-def." in shown
        assert re.search(r"join +params: join\.text four → new", shown)
        assert re.search(r"tuned +5\.60 M +97\.0", shown)
        assert "an earlier run" not in shown
        assert "0 of 2 gates passed." in shown
        assert "gain: no value against a limit of 0.5" in shown
        assert "size: 0.3 against a limit of 0.28" in shown

    def test_status_says_that_a_sheet_is_of_an_earlier_run(
        self, inside: Project, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stages = inside.path / "dvc.yaml"
        stages.write_text(stages.read_text().replace("  join:\n", "  compare:\n"))
        make_all(inside, last="compare")
        write_json(inside.path / records.SHEET, {"models": [{"model": "tuned"}], "gates": []})
        inside.settings(left={"text": "new"})
        commands.status(Path())
        shown = capsys.readouterr().out
        assert shown.index("figures of an earlier run") < shown.index("tuned")


class TestProfiles:
    @pytest.fixture
    def project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(profiles, "check", lambda params, name: None)
        (tmp_path / "profiles").mkdir()
        (tmp_path / "profiles" / "small.yaml").write_text("# Small and quick.\na: 1\n")
        (tmp_path / "profiles" / "large.yaml").write_text("# Large.\na: 2\n")
        return tmp_path

    def test_the_one_in_force_is_found_by_its_values(self, project: Path) -> None:
        assert profiles.in_force(project) is None
        assert profiles.use(project, "small") is None
        (project / "params.yaml").write_text("a:   1\n")
        assert profiles.in_force(project) == "small"
        assert profiles.names(project) == ["large", "small"]
        assert profiles.describe(project, "small") == "Small and quick."

    def test_changes_made_by_hand_are_kept_aside(self, project: Path) -> None:
        (project / "params.yaml").write_text("a: 3\n")
        kept = profiles.use(project, "large")
        assert kept is not None
        assert kept.read_text() == "a: 3\n"
        assert (project / "params.yaml").read_text() == "# Large.\na: 2\n"
        assert not list(project.glob(".params*"))

    def test_a_file_that_is_no_yaml_is_replaced_and_kept_aside(self, project: Path) -> None:
        (project / "params.yaml").write_text("a: [1")
        assert profiles.in_force(project) is None
        kept = profiles.use(project, "small")
        assert kept is not None
        assert kept.read_text() == "a: [1"
        assert profiles.in_force(project) == "small"

    def test_a_bad_profile_is_told_by_its_name(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(profiles, "check", settings.check)
        with pytest.raises(BessemerError, match=r"^\S+profiles/small\.yaml has \d+ problems"):
            profiles.use(project, "small")

    def test_an_unknown_name_is_told_with_those_there_are(self, project: Path) -> None:
        with pytest.raises(BessemerError, match=r"no profile 'huge'.*large, small"):
            profiles.use(project, "huge")


def speak_no_http(server: socket.socket) -> None:
    """Answer one caller as a mail server would."""
    caller, _ = server.accept()
    with caller:
        caller.sendall(b"220 not HTTP at all\r\n")


class TestServerAndDoctor:
    def test_a_taken_port_is_named_with_another(self, tmp_path: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ServingError, match=f"Port {port} on 127.0.0.1 is taken.*ui --port 4201"):
                server.serve_ui(tmp_path, "127.0.0.1", port)
            with pytest.raises(ServingError, match=f"Port {port} on 127.0.0.1 is taken.*PORT=3001.*--port 3001"):
                serve.serve(port)
        serve.check_port(port, "127.0.0.1", "")

    def test_the_port_that_is_advised_is_not_the_one_that_was_refused(self) -> None:
        assert (serve.another(3000, 3000), serve.another(3001, 3000)) == (3001, 3002)

    def test_an_unknown_host_is_not_taken_for_a_taken_port(self) -> None:
        with pytest.raises(ServingError, match=r"'no\.such\.host\.invalid' is no address of this machine.*--host"):
            serve.check_port(4200, "no.such.host.invalid", "")

    @pytest.mark.parametrize("command", ["ui", "serve"])
    def test_a_port_that_does_not_exist_is_a_wrong_option(
        self, toy: Project, monkeypatch: pytest.MonkeyPatch, command: str
    ) -> None:
        monkeypatch.chdir(toy.path)
        refused = CliRunner().invoke(cli.cli, [command, "--port", "99999"])
        assert refused.exit_code == 2
        assert "99999 is not in the range" in refused.output

    def test_a_server_that_is_gone_is_not_used(self, tmp_path: Path) -> None:
        assert environment.running_server(tmp_path) is None
        environment.note_server(tmp_path, "http://127.0.0.1:9/api")
        assert environment.running_server(tmp_path) is None
        with socket.create_server(("127.0.0.1", 0)) as server:  # another program has taken the port
            environment.note_server(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}/api")
            answer = threading.Thread(target=speak_no_http, args=(server,))
            answer.start()
            assert environment.running_server(tmp_path) is None
            answer.join()
        (tmp_path / environment.SERVER_NOTE).write_text("[]")
        assert environment.running_server(tmp_path) is None

    def test_doctor_compares_packages_with_the_lock(self) -> None:
        assert doctor.differing((ROOT / "requirements.lock").read_text()) == []
        assert doctor.differing("click==0.1\nno-such-package==2\n") == [
            f"click {metadata.version('click')} instead of 0.1",
            "no-such-package none instead of 2",
        ]

    def test_doctor_goes_on_after_what_it_finds(self, tmp_path: Path) -> None:
        findings = list(doctor.examine(tmp_path))
        assert any(not finding.good and "requirements.lock is missing" in finding.text for finding in findings)
        assert any(not finding.good and "params.yaml is missing" in finding.text for finding in findings)
        assert any(finding.good and "cores" in finding.text for finding in findings)


class TestHelp:
    def test_every_command_shows_examples(self, toy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(toy.path)
        for name in cli.cli.commands:
            shown = CliRunner().invoke(cli.cli, [name, "--help"])
            assert shown.exit_code == 0
            assert f"bessemer {name}" in shown.output, f"`bessemer {name} --help` shows no example"

    def test_outside_of_a_project_one_is_told(self, tmp_path: Path, toy: Project) -> None:
        (toy.path / "deep" / "down").mkdir(parents=True)
        assert cli.home(toy.path / "deep" / "down") == toy.path
        with pytest.raises(BessemerError, match="lies in no project"):
            cli.home(tmp_path)

    def test_a_wrong_option_ends_with_code_two(self, toy: Project) -> None:
        code, output = ended(bessemer(toy, "run", "--quick"))
        assert code == 2
        assert "No such option" in output
