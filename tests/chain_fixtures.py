"""What tests of the whole chain type: commands in a copy of the smoke project, with an environment like `make`'s."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import Project


def environment(path: Path) -> None:
    """Stand in for the environment that `make` sets up: the one that runs these tests, with the copy's own command."""
    binaries = path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "dvc", "bentoml", "prefect"):
        (binaries / name).symlink_to(Path(sys.executable).parent / name)
    command = binaries / "bessemer"
    command.write_text(f"#!{sys.executable}\nfrom flows.cli import main\n\nmain()\n", encoding="utf-8")
    command.chmod(0o755)
    for stamp in (".runtime", ".dev"):
        (path / ".venv" / stamp).touch()


def surroundings(project: Project) -> dict[str, str]:
    """Return the variables under which a copy's commands find the copy's own code."""
    return os.environ | {"PYTHONPATH": str(project.path)}


def run(project: Project, *command: str) -> str:
    """Run a command in a project as a user without a terminal would; return what it printed."""
    done = subprocess.run(
        command,
        cwd=project.path,
        env=surroundings(project),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
