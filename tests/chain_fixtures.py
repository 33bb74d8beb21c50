"""The whole chain at smoke scale, run for real in a clone of the working tree; made once a session and shared."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Project

SMOKE = "profiles/smoke.yaml"


def clone(path: Path) -> Project:
    """Copy what git would carry of the working tree, set it to the smoke profile, and put it under git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)
    (path / "dvc.lock").unlink(missing_ok=True)  # it tells of the default profile's results, which are not here
    shutil.copy(path / SMOKE, path / "params.yaml")
    environment(path)
    project = Project(path)
    project.git("init", "--quiet", "--initial-branch", "main")
    project.commit("smoke")
    return project


def environment(path: Path) -> None:
    """Stand in for the environment that `make` sets up: the one that runs these tests, with the clone's own command."""
    binaries = path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "dvc", "bentoml", "prefect"):
        (binaries / name).symlink_to(Path(sys.executable).parent / name)
    command = binaries / "bessemer"
    command.write_text(f"#!{sys.executable}\nfrom flows.cli import main\n\nmain()\n", encoding="utf-8")
    command.chmod(0o755)
    for stamp in (".runtime", ".dev"):
        (path / ".venv" / stamp).touch()


def run(project: Project, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in a clone as a user without a terminal would."""
    surroundings = os.environ | {"PYTHONPATH": str(project.path)}
    done = subprocess.run(
        command,
        cwd=project.path,
        env=surroundings,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A clone in which `make run` has been typed, with what it printed in `make-run.txt`."""
    project = clone(tmp_path_factory.mktemp("smoke") / "bessemer")
    done = run(project, "make", "run")
    (project.path / "runs" / "make-run.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    yield project
    shutil.rmtree(project.path, ignore_errors=True)
