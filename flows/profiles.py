"""`bessemer profile`: write `params.yaml` from one of `profiles/*.yaml`, and find the current profile."""

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from tasks.common.params_file import check
from tasks.common.raw_params import read_params
from tasks.common.settings import BessemerError, SettingsError

BACKUP_FOLDER = Path(".bessemer/params")


def names(project: Path) -> list[str]:
    """Return the names of all profiles."""
    return sorted(path.stem for path in (project / "profiles").glob("*.yaml"))


def current(project: Path) -> str | None:
    """Return the profile with the same values as `params.yaml`, or None if there is none."""
    try:
        params = read_params(project / "params.yaml")
    except SettingsError:  # missing or invalid: `bessemer profile NAME` replaces it
        return None
    same = (name for name in names(project) if read_params(project / "profiles" / f"{name}.yaml") == params)
    return next(same, None)


def use(project: Path, name: str) -> Path | None:
    """Replace `params.yaml` by a profile; return the backup of the old file if it matched no profile."""
    if name not in names(project):
        raise BessemerError(f"There is no profile {name!r}. The profiles are {', '.join(names(project))}.")
    source, target = project / "profiles" / f"{name}.yaml", project / "params.yaml"
    check(read_params(source), str(source))
    backup = None
    if target.exists() and current(project) is None:
        backup = project / BACKUP_FOLDER / f"{datetime.now(UTC):%Y%m%d-%H%M%S}.yaml"
        backup.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, backup)
    temporary = target.with_name(f".params.yaml.{os.getpid()}")
    shutil.copy(source, temporary)
    temporary.replace(target)
    return backup


def describe(project: Path, name: str) -> str:
    """Return the first comment line of a profile, its description."""
    first = (project / "profiles" / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""
