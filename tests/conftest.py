"""Shared fixtures: an isolated environment, a toy project for tests of the orchestration, and the finished smoke chain.

The toy is a DVC project of four stages (`source`, then `side@left` and `side@right`, then `join`) whose commands take a
fraction of a second; `tests/toy/steps.py` documents their settings.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from ruamel.yaml import YAML

from tasks import code
from tasks.common.settings import STAGES
from tests import forked_python

# The files of a project; the rest of the repository is tests, documentation and benchmarks.
PARTS = (
    "flows", "tasks", "serving", "profiles", "data/sources", ".dvc/config", ".dvc/.gitignore", ".dvcignore",
    ".gitignore", "dvc.yaml", "params.yaml", "prefect.yaml", "bentofile.yaml", "pyproject.toml", "requirements.lock",
    "requirements-dev.lock", "Makefile",
    *(f"data/{stage}/.gitkeep" for stage in STAGES[:-1]),
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
TOY = Path(__file__).resolve().parent / "toy"

# Before anything imports Prefect or BentoML: they read their settings on import.
_HOME = Path(tempfile.mkdtemp(prefix="bessemer-tests-"))
os.environ.update(
    {
        "PREFECT_HOME": str(_HOME / "prefect"),
        "BENTOML_HOME": str(_HOME / "bentoml"),
        "BESSEMER_FEEDBACK": str(_HOME / "feedback"),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "60",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "HF_HUB_OFFLINE": "1",
        "GIT_AUTHOR_NAME": "Test",
        "GIT_AUTHOR_EMAIL": "test@example.org",
        "GIT_COMMITTER_NAME": "Test",
        "GIT_COMMITTER_EMAIL": "test@example.org",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "COLUMNS": "120",
    }
)
for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "BESSEMER_RUN_ID"):
    os.environ.pop(name, None)


# `make test &` and `nohup` have SIGINT ignored, and child processes would inherit that and ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


HEAVY_FIXTURES = {"chain", "smoke", "toy", "committed", "browser", "package"}
# Most of their tests start interpreters or servers, or compute for seconds.
HEAVY_FILES = {
    "test_architectures", "test_bfloat16", "test_canonical", "test_closure", "test_compiling", "test_models",
    "test_offline", "test_overrides", "test_serving", "test_stage",
}  # fmt: skip
# These take minutes and start first, so that no worker runs one of them while the others have nothing left. The chain's
# first run and `test_parallel` keep all cores busy; most of the others wait for Prefect's server.
LONGEST_FILES = ("test_chain", "test_parallel", "test_worker", "test_resume", "test_cli", "test_graphs", "test_poll")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files, and mark what `make test-fast` leaves out.

    These are slow tests, heavy files, and tests with a fixture that trains, runs or serves.
    """
    items.sort(key=lambda item: (*LONGEST_FILES, item.path.stem).index(item.path.stem))
    for item in items:
        slow = item.get_closest_marker("slow") or item.path.stem in HEAVY_FILES
        if slow or HEAVY_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("heavy")


def pytest_sessionfinish() -> None:
    """Remove the temporary home directories at the end of the session."""
    shutil.rmtree(_HOME, ignore_errors=True)


class Project:
    """A project folder with helpers for tests of the orchestration."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def settings(self, **changes: dict[str, Any]) -> None:
        """Update keys of sections in params.yaml: `settings(left={"text": "new"})`."""
        yaml, path = YAML(), self.path / "params.yaml"
        params = yaml.load(path)
        for section, values in changes.items():
            params[section].update(values)
        yaml.dump(params, path)

    def commit(self, message: str = "more") -> None:
        """Commit everything that git does not ignore."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def git(self, *arguments: str) -> str:
        """Run git in the project."""
        done = subprocess.run(["git", *arguments], cwd=self.path, check=True, capture_output=True, text=True)
        return done.stdout

    def stages_run(self) -> list[str]:
        """Return the stages that wrote a mark since `clear_marks`, sorted by name."""
        return sorted(path.name for path in (self.path / "marks").glob("*") if "." not in path.name)

    def clear_marks(self) -> None:
        """Remove the marks of earlier stages."""
        shutil.rmtree(self.path / "marks", ignore_errors=True)


def copy_project(path: Path, profile: str) -> Project:
    """Return a copy of this project under git, with a profile's settings and without outputs."""
    for part in PARTS:
        (path / part).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, path / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, path / part)
    shutil.copy(ROOT / "profiles" / f"{profile}.yaml", path / "params.yaml")
    project = Project(path)
    project.git("init", "--quiet", "--initial-branch", "main")
    project.commit("new")
    return project


def offline(record: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment in which Python cannot connect to other machines and no variable disables telemetry.

    Connection attempts are written to the file `record`.
    """
    telemetry_variables = (
        "DO_NOT_TRACK",
        "DVC_NO_ANALYTICS",
        "BENTOML_DO_NOT_TRACK",
        "PREFECT_SERVER_ANALYTICS_ENABLED",
        "CI",  # OpenVINO and DVC send nothing where it is set
    )
    paths = (str(ROOT / "tests" / "offline"), environment.get("PYTHONPATH", ""))
    inherited = {name: value for name, value in environment.items() if name not in telemetry_variables}
    return {**inherited, "BESSEMER_CONNECTIONS": str(record), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all pytest workers share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def stage_forks() -> Iterator[Path]:
    """The address of a process that forks stages (tests/forked_python.py)."""
    with forked_python.serve() as address:
        yield address


@pytest.fixture(scope="session")
def smoke(session_folder: Path, request: pytest.FixtureRequest) -> Project:
    """The whole chain under the profile `smoke`, run once by `bessemer run`. Copy it before changing anything in it.

    With several pytest workers, the first one runs it and the others wait: it takes minutes on all cores. The first
    entry of each stage is a fresh interpreter, the others are forked.
    """
    done = session_folder / "smoke-done"
    with FileLock(session_folder / "smoke.lock"):
        if done.exists():
            return Project(session_folder / "smoke")
        project = copy_project(session_folder / "smoke", "smoke")
        forks = request.getfixturevalue("stage_forks")  # only here: it takes seconds to start
        with forked_python.first_in_path(forks, fresh=(f"tasks.{stage}" for stage in (code.NAME, *STAGES))) as python:
            run = f"import sys; sys.executable = {str(python)!r}; from flows.cli import main; main()"
            process = subprocess.run(
                [sys.executable, "-c", run, "run"], cwd=project.path,
                env=offline(session_folder / "smoke-connections"), capture_output=True, text=True, check=False,
            )  # fmt: skip
        assert process.returncode == 0, process.stdout + process.stderr
        project.commit("the first run's locks and figures")
        done.touch()
        return project


@pytest.fixture(scope="session")
def chain(smoke: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the finished smoke chain with its commands; tests restore what they change."""
    from tests.chain_fixtures import make_venv

    project = Project(tmp_path_factory.mktemp("chain") / "bessemer")
    shutil.copytree(smoke.path, project.path, symlinks=True)
    make_venv(project.path)
    return project


@pytest.fixture
def toy(tmp_path: Path) -> Project:
    """A fresh copy of the toy project under git and DVC."""
    path = tmp_path / "toy"
    shutil.copytree(TOY, path, ignore=shutil.ignore_patterns("__pycache__"))
    (path / "data").mkdir()
    (path / "data" / "source.txt").write_text("raw\n")
    (path / ".gitignore").write_text(
        "/data/*\n/marks/\n/runs/\n/checkpoints/\n/.bessemer/\n__pycache__/\n!/data/source.txt\n"
    )
    shutil.copytree(ROOT / ".dvc", path / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    shutil.copy(ROOT / ".dvcignore", path)
    project = Project(path)
    project.git("init", "--quiet", "--initial-branch", "main")
    project.commit("toy")
    return project
