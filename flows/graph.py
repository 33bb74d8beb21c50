"""What DVC says: the stages, what each one needs, and why a stage is not up to date.

DVC is asked in process (`Repo`), which takes a fraction of a second where its command takes one. Nothing is decided
here: a stage is to be run exactly where DVC finds a difference, and the differences found are put into words.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows import forecast
from tasks.common.settings import BessemerError

_ONE_AT_A_TIME = threading.RLock()  # DVC's objects are not made for several threads of one process


class GraphError(BessemerError):
    """DVC cannot make sense of the project; the text is DVC's own, with what to do."""


@dataclass(frozen=True)
class Stage:
    """One stage as DVC sees it now."""

    name: str
    needs: tuple[str, ...]
    outs: tuple[str, ...]
    reasons: tuple[str, ...]
    reads: tuple[str, ...] = ()
    apart: forecast.Apart = field(default_factory=dict)
    changed: tuple[str, ...] = ()  # of what it reads, where nothing else makes it dirty

    @property
    def dirty(self) -> bool:
        """Whether DVC would run it."""
        return bool(self.reasons)


Graph = dict[str, Stage]


def read(project: Path) -> Graph:
    """Return all stages by name, each after those that it needs, with the reasons why it would run."""
    with _repo(project) as repo:
        index = {_name(stage, project): stage for stage in repo.index.stages}
        edges = {
            _name(stage, project): tuple(sorted(_name(need, project) for need in repo.index.graph.successors(stage)))
            for stage in repo.index.graph
        }
        return {name: _stage(name, index[name], edges[name], project) for name in _in_order(list(index), edges)}


def reasons(project: Path, name: str) -> tuple[str, ...]:
    """Return why one stage is to be run now; empty where it is up to date."""
    with _repo(project) as repo:
        found = [stage for stage in repo.index.stages if _name(stage, project) == name]
        if not found:
            raise GraphError(f"There is no stage {name!r} in {project / 'dvc.yaml'}.")
        return tuple(_reasons(found[0], project))


def select(graph: Graph, names: Iterable[str]) -> Graph:
    """Return the named stages and everything they need, in order; all stages where none is named.

    As with DVC, the name of a matrix stage without a key (`reward`) is that of all its keys.
    """
    wanted: set[str] = set()
    pending: list[str] = []
    for name in names:
        found = [stage for stage in graph if name in (stage, stage.partition("@")[0])]
        if not found:
            raise GraphError(f"There is no stage {name!r}. There are: {', '.join(graph)}.")
        pending += found
    if not pending:
        return graph
    while pending:
        name = pending.pop()
        if name not in wanted:
            wanted.add(name)
            pending += graph[name].needs
    return {name: stage for name, stage in graph.items() if name in wanted}


def affected(graph: Graph) -> set[str]:
    """Return the dirty stages and all that reads what they may leave otherwise: DVC runs those where it did."""
    found: set[str] = set()
    changed: set[str] = set()
    for name, stage in graph.items():  # in order, so what a stage needs has been seen before
        arrived = forecast.touched(stage.reads, changed)
        if stage.dirty or arrived:
            found.add(name)
            told = not stage.dirty or stage.changed  # else it is dirty for what no input tells
            kept = forecast.left_alone(stage.apart, (*stage.changed, *arrived)) if told else ()
            changed.update(set(stage.outs).difference(kept))
    return found


def way_ahead(graph: Graph, weight: Callable[[str], float]) -> dict[str, float]:
    """Return for each stage the weight of the heaviest chain that starts with it."""
    ahead: dict[str, float] = {}
    for name in reversed(graph):
        followers = (ahead[other] for other in ahead if name in graph[other].needs)
        ahead[name] = weight(name) + max(followers, default=0.0)
    return ahead


def without_git(project: Path) -> None:
    """Tell DVC that there is no git, where there is none (an unpacked archive); the note stays on this machine."""
    from dvc.config import Config

    folder = project / ".dvc"
    if not folder.is_dir() or any((parent / ".git").exists() for parent in (project, *project.parents)):
        return
    with Config(str(folder), validate=False).edit("local") as local:
        local.setdefault("core", {})["no_scm"] = True


@contextmanager
def _repo(project: Path) -> Iterator[Any]:
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    project = project.resolve()
    without_git(project)
    with _ONE_AT_A_TIME:
        try:
            with Repo(str(project), _wait_for_lock=True) as repo, repo.lock:
                yield repo
        except NotDvcRepoError as error:
            raise GraphError(
                f"{project} is no DVC project: its .dvc folder is missing. Clone it again whole."
            ) from error
        except DvcException as error:
            raise GraphError(f"DVC cannot read this project: {error}") from error


def _stage(name: str, stage: Any, needs: tuple[str, ...], project: Path) -> Stage:
    """Return a stage as DVC sees it now."""
    why, apart = tuple(_reasons(stage, project)), forecast.apart_of(stage)
    reads = tuple(_path(dep, project) for dep in stage.deps if not hasattr(dep, "params"))
    # Where its outputs or its command changed, nothing can be told from the inputs.
    inputs_alone = apart and why and not stage.changed_stage() and not any(out.status() for out in stage.outs)
    changed = tuple(forecast.changed_inputs(stage, project.resolve(), apart)) if inputs_alone else ()
    return Stage(name, needs, _outs(stage, project), why, reads, apart, changed)


def _name(stage: Any, project: Path) -> str:
    """`pretrain@clm` for a stage of dvc.yaml, the file's path for one of its own (`data/x.dvc`)."""
    return getattr(stage, "name", None) or Path(stage.path).relative_to(project.resolve()).as_posix()


def _outs(stage: Any, project: Path) -> tuple[str, ...]:
    return tuple(_path(out, project) for out in stage.outs)


def _path(item: Any, project: Path) -> str:
    path = Path(item.fs_path)
    root = project.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _in_order(names: list[str], edges: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Yield the names so that needs come first, and otherwise as dvc.yaml has them; DVC has refused cycles already."""
    done: set[str] = set()

    def visit(name: str) -> Iterator[str]:
        if name not in done:
            done.add(name)
            for need in sorted(edges[name], key=names.index):
                yield from visit(need)
            yield name

    for name in names:
        yield from visit(name)


def _reasons(stage: Any, project: Path) -> Iterator[str]:
    if stage.frozen:
        return
    if not any(item.hash_info for item in (*stage.deps, *stage.outs)):
        yield "never run"
        return
    if stage.changed_stage():
        yield "its command in dvc.yaml changed"
    yield from _changed_settings(stage)
    changed = [(_path(dep, project), state) for dep in stage.deps for state in _file_states(dep)]
    code = [path for path, _ in changed if path.endswith(".py")]
    locks = [path for path, _ in changed if path.endswith(".lock")]
    if code:
        yield f"code: {_some(code)}"
    if locks:
        yield f"packages: {_some(locks)}"
    yield from _by_state("input", [(path, state) for path, state in changed if path not in (*code, *locks)])
    yield from _by_state(
        "output", [(_path(out, project), state) for out in stage.outs for state in out.status().values()]
    )


STATES = {"deleted": "missing", "new": "newly listed", "not in cache": "not in DVC's cache"}


def _by_state(kind: str, found: list[tuple[str, str]]) -> Iterator[str]:
    """Yield a line for each state that some inputs or outputs are in, with the first of them."""
    for state in dict.fromkeys(state for _, state in found):
        paths = list(dict.fromkeys(path for path, other in found if other == state))
        words = f" {'is' if len(paths) == 1 else 'are'} {STATES[state]}" if state in STATES else ""
        if state == "modified" and kind == "output":
            words = f" {'was' if len(paths) == 1 else 'were'} changed by hand"
        yield f"{kind}: {_some(paths)}{words}"


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _file_states(dep: Any) -> list[str]:
    return [state for state in dep.status().values() if isinstance(state, str)] if not hasattr(dep, "params") else []


def _changed_settings(stage: Any) -> Iterator[str]:
    for dep in stage.deps:
        if not hasattr(dep, "params") or not dep.status():
            continue
        before, now = dep.hash_info.value or {}, dep.read_params()
        lines = [line for section in dep.params for line in differences(section, before.get(section), now.get(section))]
        yield f"params: {', '.join(lines)}"


def differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """Yield `key old → new` for every leaf that differs between two settings."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            yield from differences(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield f"{name} {_short(before)} → {_short(now)}"


def _short(value: Any) -> str:
    text = "(none)" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
