"""Working directory of a run: the project itself or, for a scheduled run, a git worktree.

A worktree isolates the run from edits in the project. It contains the committed state (HEAD), shares DVC's cache, the
checkpoint store, downloads, reports on rejected data and `runs/` with the project, and is removed after the run. Its
`dvc.lock` and metrics are saved as a DVC experiment with the run's name: `dvc exp apply RUN-ID` restores them and the
data in the project.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from flows import graph
from tasks.common import params_file
from tasks.common.locks import LockHeldError, lock_file
from tasks.common.raw_params import read_params
from tasks.common.settings import BessemerError, Placement, SettingsError

RESULT_PATHS = ("dvc.lock", "metrics")
SHARED_FOLDERS = ("runs", "data/.cache", "data/.failed")  # logs, downloaded archives, reports on rejected data
GIT_OPERATION_FILES = ("MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD", "rebase-merge", "rebase-apply")
CHECK_SCRIPT = """
import sys
from tasks.common import params_file, raw_params
from tasks.common.settings import BessemerError

try:
    params_file.check(raw_params.read_params(), stages=sys.argv[1:])
except BessemerError as error:
    sys.exit(str(error))
"""


@contextmanager
def workdir(project: Path, run_id: str, *, worktree: bool) -> Iterator[Path]:
    """Check the settings and yield the working directory: the project, or a worktree that is removed afterwards."""
    if not worktree:
        params_file.check(read_params(project / "params.yaml"))
        yield project
        return
    project = project.resolve()
    folder = project / ".bessemer" / "worktrees"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / run_id
    with _lock_worktree(path):
        _remove_abandoned(project, folder)
        _git(project, "worktree", "add", "--quiet", "--detach", str(path), "HEAD")
        try:
            check(path)
            _link_shared_folders(project, path)
            yield path
        finally:
            try:
                _save_experiment(path, run_id)
            finally:
                _git(project, "worktree", "remove", "--force", str(path))


def _lock_worktree(path: Path) -> AbstractContextManager[None]:
    """Return a worktree's lock; entering it raises LockHeldError while a run uses the worktree."""
    return lock_file(path.with_suffix(".lock"), remove=True)


def _remove_abandoned(project: Path, folder: Path) -> None:
    """Remove the worktrees of killed runs."""
    for path in (path for path in folder.iterdir() if path.is_dir()):
        with suppress(LockHeldError), _lock_worktree(path):
            shutil.rmtree(path, ignore_errors=True)  # links in it are removed, not followed
    _git(project, "worktree", "prune")


def check(path: Path, stages: Sequence[str] = ()) -> None:
    """Raise SettingsError if a worktree's settings are invalid or one of the stages cannot run with them.

    The worktree's own code reads them, because the project's code may be under edit.
    """
    done = subprocess.run(
        [sys.executable, "-c", CHECK_SCRIPT, *stages], cwd=path, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SettingsError(done.stderr.strip())


def commit(project: Path, paths: Sequence[Path], message: str) -> None:
    """Commit those of `paths` that changed, and no other changes in the project.

    Raises BessemerError during a merge, rebase, cherry-pick or revert.
    """
    names = [str(path.relative_to(project)) for path in paths]
    if not names or not _git(project, "status", "--porcelain", "--", *names).strip():
        return
    folder = Path(_git(project, "rev-parse", "--absolute-git-dir").strip())
    operation = next((name for name in GIT_OPERATION_FILES if (folder / name).exists()), None)
    if operation:
        raise BessemerError(
            f"{project.resolve()} is in the middle of a merge or rebase ({operation}), so {names[-1]} cannot be "
            "committed; finish it."
        )
    _git(project, "add", "--", *names)
    _git(project, "commit", "--quiet", "--only", "--message", message, "--", *names)


def _link_shared_folders(project: Path, path: Path) -> None:
    """Let the worktree use the project's DVC cache, and link the project's untracked folders into it."""
    _dvc(path, "cache", "dir", "--local", str(_cache(project)))
    store = Placement.model_validate(read_params(path / "params.yaml")["placement"]).checkpoints.url
    for name in (*SHARED_FOLDERS, *([] if "://" in store or Path(store).is_absolute() else [store])):
        (project / name).mkdir(parents=True, exist_ok=True)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).symlink_to(project / name, target_is_directory=True)


def _cache(project: Path) -> Path:
    return Path(_dvc(project, "cache", "dir").strip())


def _save_experiment(path: Path, run_id: str) -> None:
    """Save the run's changes of `dvc.lock` and metrics as a DVC experiment, if there are any.

    An incomplete run is not saved, because DVC requires all outputs; the results of its stages are in DVC's cache.
    """
    if not all((path / out).exists() for stage in graph.read(path).values() for out in stage.outs):
        return
    changed = _git(path, "status", "--porcelain", "--", *RESULT_PATHS).splitlines()
    new = [line[3:] for line in changed if line.startswith("??")]
    if changed:
        _dvc(path, "exp", "save", "--name", run_id, *(f"--include-untracked={name}" for name in new))


def _git(folder: Path, *arguments: str) -> str:
    return _run_command(["git", *arguments], folder)


def _dvc(folder: Path, *arguments: str) -> str:
    return _run_command([sys.executable, "-m", "dvc", *arguments], folder)


def _run_command(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = (done.stderr or done.stdout).strip()
        raise BessemerError(f"`{' '.join(command)}` failed in {folder}: {message}")
    return done.stdout
