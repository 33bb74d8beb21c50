"""DVC's graph: the stages, their dependencies, and the reasons why a stage is not up to date.

DVC is called in process (`Repo`), which is several times faster than its command. A stage is due exactly if DVC finds
a difference; this module only describes the differences.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from flows import code_changes, forecast
from flows.code_changes import PredictedDigests, is_digest_file
from tasks.common.harness.lineage import DATA_STAGES, needed_stages
from tasks.common.model_graph import links_of
from tasks.common.raw_params import read_params
from tasks.common.settings import BessemerError

_DVC_LOCK = threading.RLock()  # DVC's objects are not thread-safe


class GraphError(BessemerError):
    """DVC cannot read the project; the text contains DVC's message."""


@dataclass(frozen=True)
class Stage:
    """One stage as DVC sees it now."""

    name: str
    needs: tuple[str, ...]
    outs: tuple[str, ...]
    reasons: tuple[str, ...]
    reads: tuple[str, ...] = ()
    unaffected_outputs: forecast.UnaffectedOutputs = field(default_factory=dict)
    changed: tuple[str, ...] = ()  # the changed inputs, if nothing else makes it dirty

    @property
    def dirty(self) -> bool:
        """Whether DVC would run it."""
        return bool(self.reasons)


Graph = dict[str, Stage]


def read(project: Path) -> Graph:
    """Return the stages by name in topological order, with the reasons why each would run.

    Stages of dvc.yaml that no entry of params.yaml needs are left out (`lineage.needed_stages`).
    """
    with _repo(project) as repo:
        unneeded = _unneeded_stages(project)
        index = {_name(stage, project): stage for stage in repo.index.stages}
        names = {stage: _name(stage, project) for stage in repo.index.graph}
        needs = {
            names[stage]: sorted({names[need] for need in needed} - unneeded)
            for stage, needed in repo.index.graph.adj.items()
        }
        ordered = [name for name in _topological_order(list(index), repo.index.graph, names) if name not in unneeded]
        predicted = _predict_digests(index.values(), project)
        return {name: _stage(name, index[name], tuple(needs[name]), project, predicted) for name in ordered}


def _unneeded_stages(project: Path) -> set[str]:
    """Return the stages of data and of the scorecard that no entry of params.yaml needs."""
    return {*DATA_STAGES, "compare"} - needed_stages(links_of(read_params(project / "params.yaml")))


def reasons(project: Path, name: str) -> tuple[str, ...]:
    """Return the reasons why one stage would run now; empty if it is up to date."""
    with _repo(project) as repo:
        found = [stage for stage in repo.index.stages if _name(stage, project) == name]
        if not found:
            raise GraphError(f"There is no stage {name!r} in {project / 'dvc.yaml'}.")
        return tuple(_reasons(found[0], project, {}))


def select(graph: Graph, names: Iterable[str]) -> Graph:
    """Return the named stages and their dependencies in order; all stages if `names` is empty.

    As in DVC, the name of a stage without an entry (`reward`) selects all its entries.
    """
    wanted: set[str] = set()
    pending: list[str] = []
    for name in names:
        found = [stage for stage in graph if name in (stage, stage.partition("@")[0])]
        if not found:
            raise GraphError(f"There is no stage {name!r}. The stages are {', '.join(graph)}.")
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
    """Return the dirty stages and all stages that read outputs which these may change.

    DVC runs the latter only if the outputs have really changed.
    """
    found: set[str] = set()
    changed: set[str] = set()
    for name, stage in graph.items():  # in topological order
        changed_inputs = forecast.changed_reads(stage.reads, changed)
        if stage.dirty or changed_inputs:
            found.add(name)
            inputs_only = not stage.dirty or stage.changed  # otherwise the inputs do not tell which outputs change
            unaffected = (
                forecast.unaffected_outputs(stage.unaffected_outputs, (*stage.changed, *changed_inputs))
                if inputs_only
                else ()
            )
            # Changed digests are already a reason of the stages that depend on them.
            changed.update(out for out in set(stage.outs).difference(unaffected) if not is_digest_file(out))
    return found


def first_due_need(graph: Graph, name: str, due: Iterable[str]) -> str:
    """Return the first due dependency of a stage that is not dirty itself."""
    makers = (need for need in graph[name].needs if not any(map(is_digest_file, graph[need].outs)))
    return next(need for need in makers if need in due)


def critical_path(graph: Graph, weight: Callable[[str], float]) -> dict[str, float]:
    """Return for each stage the weight of the heaviest path that starts with it."""
    lengths: dict[str, float] = {}
    for name in reversed(graph):
        following = (lengths[other] for other in lengths if name in graph[other].needs)
        lengths[name] = weight(name) + max(following, default=0.0)
    return lengths


def configure_without_git(project: Path) -> None:
    """Set `core.no_scm` in DVC's local config if the project is not a git checkout (an unpacked archive)."""
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
    configure_without_git(project)
    with _DVC_LOCK:
        _load_settings.cache_clear()
        try:
            with Repo(str(project), _wait_for_lock=True) as repo, repo.lock:
                yield repo
        except NotDvcRepoError as error:
            raise GraphError(
                f"{project} is not a DVC project: its .dvc folder is missing. Clone the project again."
            ) from error
        except DvcException as error:
            raise GraphError(f"DVC cannot read this project: {error}") from error


def _predict_digests(stages: Iterable[Any], project: Path) -> PredictedDigests:
    """Return the digest files that the stage `code` would write; empty if it is up to date."""
    for stage in stages:
        paths = [path for path in _outs(stage, project) if is_digest_file(path)]
        if paths:
            return code_changes.predict_digests(paths, project) if any(_reasons(stage, project, {})) else {}
    return {}


def _stage(name: str, stage: Any, needs: tuple[str, ...], project: Path, predicted: PredictedDigests) -> Stage:
    """Return a stage in its state now or, if `code` is due, in its state after `code` has run."""
    why, unaffected = tuple(_reasons(stage, project, predicted)), forecast.read_unaffected_outputs(stage)
    reads = tuple(_path(dep, project) for dep in stage.deps if not hasattr(dep, "params"))
    # If its outputs or its command changed, the inputs do not determine what changes.
    inputs_alone = unaffected and why and not stage.changed_stage() and not any(out.status() for out in stage.outs)
    changed = tuple(forecast.changed_inputs(stage, project.resolve(), unaffected)) if inputs_alone else ()
    if any(reason.startswith("code: ") for reason in why):
        changed = ()  # changed code may change any output
    changed = tuple(path for path in changed if not is_digest_file(path))
    return Stage(name, needs, _outs(stage, project), why, reads, unaffected, changed)


def _name(stage: Any, project: Path) -> str:
    """Return `pretrain@causal` for a stage of dvc.yaml, the path for a stage with its own file (`data/x.dvc`)."""
    return getattr(stage, "name", None) or Path(stage.path).relative_to(project.resolve()).as_posix()


def _outs(stage: Any, project: Path) -> tuple[str, ...]:
    return tuple(_path(out, project) for out in stage.outs)


def _path(item: Any, project: Path) -> str:
    path = Path(item.fs_path)
    root = project.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _topological_order(listed: list[str], needs: Any, names: Mapping[Any, str]) -> Iterator[str]:
    """Return the stages of DVC's graph in topological order, and otherwise in the order of dvc.yaml."""
    import networkx as nx

    position = {name: number for number, name in enumerate(listed)}
    ordered = nx.lexicographical_topological_sort(needs.reverse(copy=False), key=lambda stage: position[names[stage]])
    return (names[stage] for stage in ordered)


def _reasons(stage: Any, project: Path, predicted: PredictedDigests) -> Iterator[str]:
    if stage.frozen:
        return
    if not any(item.hash_info for item in (*stage.deps, *stage.outs)):
        yield "never run"
        return
    if _has_no_results(stage):  # whatever else has changed, it runs or is restored
        yield "its results are neither here nor in DVC's cache"
        return
    if stage.changed_stage():
        yield "its command in dvc.yaml changed"
    yield from _changed_settings(stage)
    yield from _changed_code(stage, project, predicted)
    files = [(_path(dep, project), dep) for dep in stage.deps if not is_digest_file(_path(dep, project))]
    changed = [(path, state) for path, dep in files for state in _file_states(dep)]
    code = [path for path, _ in changed if path.endswith(".py")]
    locks = [path for path, _ in changed if path.endswith(".lock")]
    if code:
        yield f"code: {_join_first(code)}"
    if locks:
        yield f"packages: {_join_first(locks)}"
    yield from _by_state("input", [(path, state) for path, state in changed if path not in (*code, *locks)])
    yield from _by_state(
        "output", [(_path(out, project), state) for out in stage.outs for state in out.status().values()]
    )


def _has_no_results(stage: Any) -> bool:
    """Return whether no output of a stage exists, as in a fresh clone; metrics are in git and do not count."""
    outs = [out for out in stage.outs if out.use_cache]
    return bool(outs) and not any(out.exists or not out.changed_cache() for out in outs)


def _changed_code(stage: Any, project: Path, predicted: PredictedDigests) -> Iterator[str]:
    for dep in stage.deps:
        path = "" if hasattr(dep, "params") else _path(dep, project)
        if is_digest_file(path) and (found := code_changes.reason(dep, path, project, predicted)):
            yield found


STATE_TEXTS = {"deleted": "missing", "new": "newly listed", "not in cache": "not in DVC's cache"}


def _by_state(kind: str, found: list[tuple[str, str]]) -> Iterator[str]:
    """Yield one line per state with the first of the inputs or outputs in that state."""
    for state in dict.fromkeys(state for _, state in found):
        paths = list(dict.fromkeys(path for path, other in found if other == state))
        text = f" {'is' if len(paths) == 1 else 'are'} {STATE_TEXTS[state]}" if state in STATE_TEXTS else ""
        if state == "modified" and kind == "output":
            text = f" {'was' if len(paths) == 1 else 'were'} changed by hand"
        yield f"{kind}: {_join_first(paths)}{text}"


def _join_first(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _file_states(dep: Any) -> list[str]:
    return [state for state in dep.status().values() if isinstance(state, str)] if not hasattr(dep, "params") else []


def _changed_settings(stage: Any) -> Iterator[str]:
    for dep in stage.deps:
        if not hasattr(dep, "params"):
            continue
        before, settings = dep.hash_info.value or {}, _load_settings(dep.fs_path) if dep.exists else {}
        names = dep.params or list(dict.fromkeys((*settings, *before)))
        now = _values(settings, names)
        if now != {name: before[name] for name in names if name in before}:  # DVC's rule; a null is not an absent key
            lines = [line for name in names for line in differences(name, before.get(name), now.get(name))]
            yield f"params: {', '.join(lines)}"


@cache
def _load_settings(path: str) -> dict[str, Any]:
    """Return the contents of a settings file, read once for all stages; DVC would parse it for each of them."""
    from dvc.fs import localfs
    from dvc.utils.serialize import load_path

    contents: dict[str, Any] = load_path(path, localfs)
    return contents


def _values(settings: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the values of those dotted names that there are, found as DVC does."""
    import dpath

    values = {}
    for name in names:
        with suppress(KeyError):
            values[name] = dpath.get(settings, name, separator=".")
    return values


def differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """Yield `key old → new` for every leaf that differs between two settings."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            yield from differences(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield f"{name} {_truncate(before)} → {_truncate(now)}"


def _truncate(value: Any) -> str:
    text = "(none)" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
