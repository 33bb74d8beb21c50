"""A project runs its own code: the command hands over to it, whichever installation it was called from.

A model's identity covers the code in its project. A command of another version would show and schedule by other code
than the stages run, so it refuses.
"""

import os
import sys
import tomllib
from pathlib import Path

from tasks.common.settings import BessemerError

INSTALLATION = Path(__file__).resolve().parents[1]


def use_project_code(project: Path) -> None:
    """Replace this process by the project's own command, unless it is that already.

    Raises BessemerError if the project's version or packages differ from those of this command.
    """
    own = project / "flows" / "cli.py"
    if not own.is_file() or own.samefile(INSTALLATION / "flows" / "cli.py"):
        return
    difference = _difference(project)
    if difference:
        raise BessemerError(
            f"The project in {project.resolve()} and this command ({INSTALLATION}) differ: {difference}. Use the "
            "project's own command: `make install` there installs its packages, then `.venv/bin/bessemer`."
        )
    os.chdir(project)  # the first folder on the path of `python -m`
    os.execv(sys.executable, [sys.executable, "-m", "flows.cli", *sys.argv[1:]])


def _difference(project: Path) -> str:
    """Return how version or locked packages of a project and of this installation differ; "" if they do not."""
    ours, theirs = (version_of(folder) for folder in (INSTALLATION, project))
    if ours != theirs:
        return f"the project is of version {theirs}, the command of version {ours}"
    ours_locked, theirs_locked = (_locked(folder) for folder in (INSTALLATION, project))
    changed = sorted(ours_locked ^ theirs_locked)
    return f"requirements.lock differs ({', '.join(changed[:3])}{' ...' if changed[3:] else ''})" if changed else ""


def version_of(folder: Path) -> str:
    """Return the version in a folder's pyproject.toml; "unknown" if there is none."""
    try:
        return str(tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return "unknown"


def _locked(folder: Path) -> set[str]:
    """Return the pinned packages of a folder's requirements.lock."""
    lock = folder / "requirements.lock"
    lines = lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else []
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}
