"""Where a run works: in the project itself or, if it is a scheduled one, in a git worktree of its own.

There it neither sees nor disturbs what is being edited. The worktree holds what is committed (HEAD), shares DVC's
cache, the checkpoint store, downloads, reports on refused data and `runs/` with the project, and is removed afterwards.
Its `dvc.lock` and metrics are kept as the DVC experiment named like the run: `dvc exp apply RUN-ID` brings them, and
the data, into the project.
"""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from flows import graph
from tasks.common import settings
from tasks.common.settings import BessemerError, SettingsError, read_params

RESULTS = ("dvc.lock", "metrics")
SHARED = ("runs", "data/.cache", "data/.failed")  # logs, downloaded archives, reports on data that was refused
UNDER_WAY = ("MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD", "rebase-merge", "rebase-apply")
CHECK = """
import sys
from tasks.common import settings

try:
    settings.check(settings.read_params(), stages=sys.argv[1:])
except settings.BessemerError as error:
    sys.exit(str(error))
"""


@contextmanager
def place(project: Path, run_id: str, *, worktree: bool) -> Iterator[Path]:
    """Yield the folder that a run works in, its settings checked: the project, or a worktree that lives as long."""
    if not worktree:
        settings.check(read_params(project / "params.yaml"))
        yield project
        return
    project = project.resolve()
    folder = project / ".bessemer" / "worktrees"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / run_id
    with _in_use(path):
        _drop_abandoned(project, folder)
        _git(project, "worktree", "add", "--quiet", "--detach", str(path), "HEAD")
        try:
            check(path)
            _share(project, path)
            yield path
        finally:
            try:
                _keep(path, run_id)
            finally:
                _git(project, "worktree", "remove", "--force", str(path))


@contextmanager
def _in_use(path: Path) -> Iterator[None]:
    """Hold a worktree's lock, which the kernel takes back however its holder ends; BlockingIOError: it is held."""
    note = path.with_suffix(".lock")
    with note.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            note.unlink()


def _drop_abandoned(project: Path, folder: Path) -> None:
    """Remove the worktrees of runs that were killed outright."""
    for path in (path for path in folder.iterdir() if path.is_dir()):
        with suppress(BlockingIOError), _in_use(path):
            shutil.rmtree(path, ignore_errors=True)  # links in it are removed, not followed
    _git(project, "worktree", "prune")


def check(path: Path, stages: Sequence[str] = ()) -> None:
    """Raise SettingsError where a worktree's settings are wrong or keep one of the stages from running.

    They are read by its own code: the project's may be under edit.
    """
    done = subprocess.run([sys.executable, "-c", CHECK, *stages], cwd=path, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SettingsError(done.stderr.strip())


def commit(project: Path, paths: Sequence[Path], message: str) -> None:
    """Commit those of a project's files that git does not have as they are, and nothing else that lies there changed.

    Raises BessemerError where git is in the middle of something that a commit would get into.
    """
    names = [str(path.relative_to(project)) for path in paths]
    if not names or not _git(project, "status", "--porcelain", "--", *names).strip():
        return
    folder = Path(_git(project, "rev-parse", "--absolute-git-dir").strip())
    under_way = next((name for name in UNDER_WAY if (folder / name).exists()), None)
    if under_way:
        raise BessemerError(
            f"{project.resolve()} is in the middle of a merge or rebase ({under_way}), so {names[-1]} cannot be "
            "committed; finish it."
        )
    _git(project, "add", "--", *names)
    _git(project, "commit", "--quiet", "--only", "--message", message, "--", *names)


def _share(project: Path, path: Path) -> None:
    """Give the worktree the project's DVC cache, and its untracked stores as links."""
    _dvc(path, "cache", "dir", "--local", str(_cache(project)))
    store = str(read_params(path / "params.yaml")["placement"]["checkpoints"]["url"])
    for name in (*SHARED, *([] if "://" in store or Path(store).is_absolute() else [store])):
        (project / name).mkdir(parents=True, exist_ok=True)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).symlink_to(project / name, target_is_directory=True)


def _cache(project: Path) -> Path:
    return Path(_dvc(project, "cache", "dir").strip())


def _keep(path: Path, run_id: str) -> None:
    """Keep what a run changed in tracked files; one that changed nothing leaves no experiment.

    Nor does one that did not come to its end, which DVC would refuse: what its stages made is in DVC's cache.
    """
    if not all((path / out).exists() for stage in graph.read(path).values() for out in stage.outs):
        return
    changed = _git(path, "status", "--porcelain", "--", *RESULTS).splitlines()
    new = [line[3:] for line in changed if line.startswith("??")]
    if changed:
        _dvc(path, "exp", "save", "--name", run_id, *(f"--include-untracked={name}" for name in new))


def _git(folder: Path, *arguments: str) -> str:
    return _output(["git", *arguments], folder)


def _dvc(folder: Path, *arguments: str) -> str:
    return _output([sys.executable, "-m", "dvc", *arguments], folder)


def _output(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise BessemerError(f"`{' '.join(command)}` failed in {folder}: {said}")
    return done.stdout
