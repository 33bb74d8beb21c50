"""`bessemer profile`: write `params.yaml` from one of `profiles/*.yaml`, and tell which of them is in force."""

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from tasks.common.settings import BessemerError, SettingsError, check, read_params

KEPT = Path(".bessemer/params")


def names(project: Path) -> list[str]:
    """Return the profiles that there are."""
    return sorted(path.stem for path in (project / "profiles").glob("*.yaml"))


def in_force(project: Path) -> str | None:
    """Return the profile whose values are those of `params.yaml`, or None where it was changed by hand."""
    try:
        params = read_params(project / "params.yaml")
    except SettingsError:  # missing, or not even YAML: a profile is what mends it
        return None
    same = (name for name in names(project) if read_params(project / "profiles" / f"{name}.yaml") == params)
    return next(same, None)


def use(project: Path, name: str) -> Path | None:
    """Write `params.yaml` whole from a profile; return where hand-made changes were kept, if there were any."""
    if name not in names(project):
        raise BessemerError(f"There is no profile {name!r}. There are: {', '.join(names(project))}.")
    source, target = project / "profiles" / f"{name}.yaml", project / "params.yaml"
    check(read_params(source), str(source))
    kept = None
    if target.exists() and in_force(project) is None:
        kept = project / KEPT / f"{datetime.now(UTC):%Y%m%d-%H%M%S}.yaml"
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, kept)
    neighbour = target.with_name(f".params.yaml.{os.getpid()}")
    shutil.copy(source, neighbour)
    neighbour.replace(target)
    return kept


def describe(project: Path, name: str) -> str:
    """Return the first comment line of a profile, which says what it is for."""
    first = (project / "profiles" / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""
