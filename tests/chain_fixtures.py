"""Helpers for tests of the whole chain: commands in a copy of the smoke project, with an environment like `make`'s."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import Project


def make_venv(path: Path) -> None:
    """Create the copy's `.venv` as `make` does, from the environment that runs these tests."""
    binaries = path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "dvc", "bentoml", "prefect"):
        (binaries / name).symlink_to(Path(sys.executable).parent / name)
    command = binaries / "bessemer"
    command.write_text(f"#!{sys.executable}\nfrom flows.cli import main\n\nmain()\n", encoding="utf-8")
    command.chmod(0o755)
    for stamp in (".runtime", ".dev"):
        (path / ".venv" / stamp).touch()


def environment(project: Project) -> dict[str, str]:
    """Return environment variables with which a copy's commands import the copy's own code."""
    return os.environ | {"PYTHONPATH": str(project.path)}


def run(project: Project, *command: str) -> str:
    """Run a command in a project without a terminal; return its output."""
    done = subprocess.run(
        command,
        cwd=project.path,
        env=environment(project),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
