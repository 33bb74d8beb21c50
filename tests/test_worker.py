"""The scheduled deployment with Prefect's server, a process work pool, a worker, and the real `prefect.yaml`.

The details are tested on the toy project, and once on the real pipeline with the profile `smoke`.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows import graph, records
from serving.feedback.store import FEEDBACK_VARIABLE, Store
from tests.conftest import ROOT, Project
from tests.ranking_fixtures import FILE, add_rankings_source, rank

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
POOL = "bessemer-pool"
DEPLOYMENT = "bessemer/scheduled"
POLL = "rankings/poll"


class Server:
    """A Prefect server of this test, with its API."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.env = os.environ | {
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.url,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_WORKER_PREFETCH_SECONDS": "5",
            "PYTHONPATH": str(ROOT),
        }
        self.env.pop(FEEDBACK_VARIABLE, None)  # rankings are stored in the project

    def prefect(self, *arguments: str, cwd: Path = ROOT) -> str:
        """Run a command of Prefect's as a user would."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        env = self.env | {"PWD": str(cwd)}
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a long-running command of Prefect's."""
        command = [sys.executable, "-m", "prefect", *arguments]
        with log.open("wb") as file:
            return subprocess.Popen(command, env=self.env, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)

    def ask(self, path: str, **body: Any) -> Any:
        """Post to the server's API, with retries if its database is busy (503), as Prefect's client does."""
        for _ in range(10):
            answer = httpx.post(f"{self.url}/{path}", json=body, timeout=30)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(1)
        answer.raise_for_status()
        return answer.json()

    def get(self, path: str) -> Any:
        """Get from the server's API."""
        answer = httpx.get(f"{self.url}/{path}", timeout=30)
        answer.raise_for_status()
        return answer.json()

    def run(self, name: str = DEPLOYMENT, **parameters: Any) -> str:
        """Start a run of a deployment; return its id."""
        deployment = self.get(f"deployments/name/{name}")["id"]
        body = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
        return str(self.ask(f"deployments/{deployment}/create_flow_run", **body)["id"])

    def state(self, run: str) -> str:
        """Return the name of a run's state."""
        state = self.get(f"flow_runs/{run}")["state"]
        return str(state["name"]) if state else "none yet"

    def final_state(self, run: str) -> str:
        """Wait for a run's end and return the name of its last state."""
        final = {"Completed", "UpToDate", "Failed", "Crashed", "Cancelled"}
        return str(wait_for(lambda: self.state(run) in final and self.state(run), f"the end of run {run}"))

    def artifacts(self, run: str) -> dict[str, str]:
        """Return a run's artifacts with a key: key to content."""
        rows = self.ask("artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})
        return {item["key"]: item["data"] for item in rows if item["key"]}

    def tasks(self, run: str) -> dict[str, str]:
        """Return a run's task runs: name to state."""
        rows = self.ask("task_runs/filter", flow_runs={"id": {"any_": [run]}})
        return {item["name"]: item["state"]["name"] for item in rows if item["state"]}  # none: just being made


def wait_for(condition: Callable[[], Any], description: str) -> Any:
    """Return the condition's value once it is true."""
    for _ in range(2000):
        if result := condition():
            return result
        time.sleep(0.2)
    pytest.fail(f"waited in vain for {description}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that `Server.start` started."""
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def deploy(server: Server, project: Path) -> None:
    """Deploy a project from its own prefect.yaml."""
    output = server.prefect("deploy", "--all", cwd=project)
    assert DEPLOYMENT in output
    assert POLL in output


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an empty database, a process work pool and one worker."""
    home = tmp_path_factory.mktemp("prefect")
    server = Server(home)
    processes = [server.start("server", "start", "--port", str(server.port), log=home / "server.log")]
    try:
        wait_for(lambda: _healthy(server), "the server to answer")
        server.prefect("work-pool", "create", POOL, "--type", "process")
        processes.append(server.start("worker", "start", "--pool", POOL, "--limit", "1", log=home / "worker.log"))
        yield server
    finally:
        for process in reversed(processes):
            stop(process)


def _healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def project(toy: Project, server: Server) -> Project:
    """The toy project with the real flow and the real prefect.yaml, deployed."""
    for folder in ("flows", "tasks"):
        shutil.copytree(ROOT / folder, toy.path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.yaml", toy.path)
    with (toy.path / "tasks" / "common" / "params_file.py").open("a") as code:
        code.write("\n\ncheck = lambda params, stages=(): None\n")  # the toy's params.yaml has other settings
    toy.commit("deployed")
    deploy(server, toy.path)
    return toy


def test_deployment_matches_prefect_yaml(server: Server, project: Project) -> None:
    deployment = server.get(f"deployments/name/{DEPLOYMENT}")
    assert deployment["work_pool_name"] == POOL
    assert deployment["parameters"] == {"worktree": True}
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert [(item["schedule"]["cron"], item["active"]) for item in deployment["schedules"]] == [("0 3 * * 1", False)]
    assert deployment["pull_steps"][0]["prefect.deployments.steps.set_working_directory"]["directory"] == str(
        project.path
    )


def test_worker_runs_the_chain_in_a_worktree_and_publishes_lineage(server: Server, project: Project) -> None:
    run = server.run()
    assert server.final_state(run) == "Completed"
    assert server.tasks(run) == dict.fromkeys(("source", "side@left", "side@right", "join", "report"), "Completed")
    lineage = server.artifacts(run)["lineage"]
    assert "flowchart LR" in lineage
    assert "| join | `aaaaaaaaaaaa` | `bbbbbbbbbbbb` | ran |" in lineage
    assert not (project.path / "dvc.lock").exists()
    run_id = server.get(f"flow_runs/{run}")["name"]
    assert records.read_json(project.path / "runs" / run_id / "flow.json")["stages"]["join"]["status"] == "ran"
    assert run_id in project.git("for-each-ref", "refs/exps")


def test_poll_deployment_matches_prefect_yaml(server: Server, project: Project) -> None:
    deployment = server.get(f"deployments/name/{POLL}")
    assert deployment["work_pool_name"] == POOL
    assert deployment["parameters"] == {"worktree": True}
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert [(item["schedule"]["cron"], item["active"]) for item in deployment["schedules"]] == [("*/15 * * * *", False)]


def test_worker_runs_the_chain_after_enough_rankings(server: Server, project: Project) -> None:
    add_rankings_source(project, min_new_rankings=2)
    store = Store(project.path / "data/feedback")
    rank(store, 1)
    assert server.final_state(server.run(POLL)) == "UpToDate"
    assert not (project.path / FILE).exists()
    rank(store, 2)
    store.close()
    run = server.run(POLL)
    assert server.final_state(run) == "Completed", server.get(f"flow_runs/{run}")["state"]["message"]
    assert project.git("show", "--name-only", "--format=").split() == [FILE]
    [parent] = server.ask("task_runs/filter", flow_runs={"id": {"any_": [run]}})  # the chain, as a flow within
    inner = parent["state"]["state_details"]["child_flow_run_id"]
    assert server.tasks(inner) == dict.fromkeys(("source", "side@left", "side@right", "join", "report"), "Completed")
    run_id = server.get(f"flow_runs/{inner}")["name"]
    assert run_id in project.git("for-each-ref", "refs/exps")
    assert server.final_state(server.run(POLL)) == "UpToDate"


def test_cancelled_chain_stops_training_and_the_next_run_resumes(
    server: Server, smoke: Project, tmp_path: Path
) -> None:
    project = Project(tmp_path / "chain")
    shutil.copytree(smoke.path, project.path, symlinks=True)
    with (project.path / "tasks" / "prune.py").open("a") as code:
        code.write("\nCHANGED = 1\n")  # a comment would change nothing that it computes
    deploy(server, project.path)
    run = server.run(worktree=False)
    training = wait_for(lambda: stage_processes(project.path, "tasks.prune"), "the stage to train")
    server.ask(f"flow_runs/{run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    assert server.final_state(run) == "Cancelled"
    wait_for(lambda: not any(process.is_running() for process in training), "the training to end")
    assert not (project.path / "data" / "prune" / "pruned" / "record.json").exists()
    assert list((project.path / "data" / ".scratch").iterdir()) == []

    again = server.run(worktree=False)
    assert server.final_state(again) == "Completed"
    tasks = server.tasks(again)
    assert {name for name, state in tasks.items() if state == "UpToDate"} >= {
        "ingest",
        "pretrain@causal",
        "align@policy",
    }
    assert tasks["prune@pruned"] == "Completed"
    assert "| package | `" in server.artifacts(again)["lineage"]
    assert "int8" in server.artifacts(again)["evaluation"]
    assert not any(stage.dirty for stage in graph.read(project.path).values())


def stage_processes(project: Path, module: str) -> list[psutil.Process]:
    """Return the processes that run a stage's module in a project."""
    processes = []
    for process in psutil.process_iter():
        try:
            if module in process.cmdline() and process.cwd() == str(project):
                processes.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return processes


def test_cancelled_stage_leaves_no_partial_results(server: Server, project: Project) -> None:
    project.settings(right={"hang": True})
    run = server.run(worktree=False)
    pid_file = project.path / "marks" / "right.pids"
    hanging = [
        int(pid) for pid in wait_for(lambda: pid_file.exists() and pid_file.read_text(), "the stage to hang").split()
    ]
    wait_for(lambda: server.tasks(run).get("side@left") == "Completed", "the stage beside it to be done")
    server.ask(f"flow_runs/{run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    assert server.final_state(run) == "Cancelled"
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in hanging), "the stage's processes to end")
    assert not (project.path / "data" / "right" / "out.txt").exists()
    stages = graph.read(project.path)
    assert [name for name, stage in stages.items() if stage.dirty] == ["side@right", "join"]

    project.settings(right={"hang": False})
    project.clear_marks()
    again = server.run(worktree=False)
    assert server.final_state(again) == "Completed"
    assert project.stages_run() == ["join", "right"]
    assert server.tasks(again)["source"] == "UpToDate"
