"""A new project folder: the code at this version, the user's files, `params.yaml`, git and DVC.

The project is complete in itself: whoever clones it can reproduce its models without the installation that made it. It
is built beside its final place and moved there as a whole, so an interrupted `bessemer init` leaves nothing behind.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from flows.own_code import INSTALLATION
from tasks.common.settings import STAGES, BessemerError

CODE = ("flows", "serving", "tasks")
FILES = (
    ".dvcignore", ".gitignore", ".dvc/.gitignore", ".dvc/config", "LICENSE", "Makefile", "bentofile.yaml", "dvc.yaml",
    "prefect.yaml", "pyproject.toml", "requirements-dev.lock", "requirements-vllm.lock", "requirements.lock",
)  # fmt: skip
SOURCES = Path("data/sources")
# Folders that dvc.yaml names as inputs, which must exist in a fresh clone even when they are empty.
KEPT_FOLDERS = (*(f"data/{stage}" for stage in STAGES[:-1]), f"{SOURCES}/toxicity", f"{SOURCES}/evaluation")
LARGE_FILE_BYTES = 5_000_000  # larger files go to DVC, because git keeps every version in every clone
COPY_BYTES = 2**23  # between two updates of the progress bar
BAR_DELAY_S = 1.0  # what is copied sooner shows no progress bar
IDENTITY = ("-c", "user.name=bessemer", "-c", "user.email=bessemer@localhost")  # where git has no user


def check_target(folder: Path) -> None:
    """Raise BessemerError if a project cannot be created in the folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BessemerError(f"{folder} exists and is not an empty folder: name another one, or remove it first.")
    missing = [name for name in (*CODE, *FILES) if not (INSTALLATION / name).exists()]
    if missing:
        raise BessemerError(
            f"This installation of Bessemer has no {', '.join(missing)} in {INSTALLATION}, which every project needs: "
            "install it from a clone of its repository (`make run` there does)."
        )
    if shutil.which("git") is None:
        raise BessemerError("git is not installed, and every project is a git repository: install git first.")


@contextmanager
def new_project(folder: Path) -> Iterator[Path]:
    """Yield a folder with the code of this version, which becomes `folder` if the block ends without an exception."""
    check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        project = Path(scratch, "project")
        _copy_code(project)
        _run(["git", "init", "--quiet", "--initial-branch=main"], project)  # before DVC looks for it
        yield project
        if folder.exists():
            folder.rmdir()
        project.rename(folder)


def _copy_code(project: Path) -> None:
    for name in CODE:
        shutil.copytree(INSTALLATION / name, project / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for name in FILES:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(INSTALLATION / name, project / name)
    for name in KEPT_FOLDERS:
        (project / name).mkdir(parents=True)
        (project / name / ".gitkeep").touch()


def copy_in(project: Path, files: Mapping[str, Path]) -> None:
    """Copy the user's files and folders to their paths in the project, with a progress bar for large ones.

    Raises BessemerError if one cannot be read.
    """
    from tqdm import tqdm

    size = sum(map(_size, files.values()))
    with tqdm(total=size, desc="copying", unit="B", unit_scale=True, delay=BAR_DELAY_S, leave=False) as bar:
        for name, source in files.items():
            try:
                _copy(source, project / name, bar)
            except (OSError, shutil.Error) as error:
                raise BessemerError(f"{source} could not be copied into the project: {error}") from error


def _copy(source: Path, target: Path, bar: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=partial(_copy_file, bar=bar))
        for folder in (target, *(entry for entry in target.rglob("*") if entry.is_dir())):
            folder.chmod(0o755)  # copytree keeps the modes of folders, which may be read-only
    else:
        _copy_file(source, target, bar)


def _copy_file(source: str | Path, target: str | Path, bar: Any) -> None:
    with Path(source).open("rb") as read, Path(target).open("wb") as written:
        while chunk := read.read(COPY_BYTES):
            written.write(chunk)
            bar.update(len(chunk))


def commit(project: Path, names: list[str], message: str) -> None:
    """Add large files among `names` to DVC, and commit everything."""
    large = [name for name in names if _size(project / name) > LARGE_FILE_BYTES]
    if large:
        print(f"adding {', '.join(large)} to DVC", flush=True)
        _run([sys.executable, "-m", "dvc", "add", "--quiet", *large], project)
    _run(["git", "add", "--all"], project)
    known = subprocess.run(["git", "config", "user.email"], cwd=project, capture_output=True, check=False)
    identity = IDENTITY if known.returncode else ()
    _run(["git", *identity, "commit", "--quiet", "--no-verify", "--message", message], project)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BessemerError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
