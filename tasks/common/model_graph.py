"""The graph of models that `params.yaml` describes: its entries, their inputs, their order, and checks of the graph.

An entry refers to the model that it starts from by a path: the folder of another entry (`data/finetune/chat/model`) or
a folder of the user's. The user chooses the names of entries. This module reads only settings and tests whether paths
exist.
"""

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.harness.job import Link
from tasks.common.settings import ENTRY_STAGES, PACKAGE_PARTS, STAGES

if TYPE_CHECKING:
    import networkx as nx

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
INGESTED_CHECKPOINT = "data/ingest/checkpoint"

Params = Mapping[str, Any]
Links = Mapping[str, Link]


def lookup(params: Any, path: str) -> Any:
    """Return a setting by its dotted path (`align.policy.reward.path`); None if it is missing."""
    for name in path.split("."):
        params = params.get(name) if isinstance(params, Mapping) else None
    return params


def entries_of(params: Params, stage: str) -> dict[str, Any]:
    """Return a section's entries by name; their settings need not be valid."""
    section = params.get(stage)
    return {str(key): value for key, value in section.items()} if isinstance(section, dict) else {}


def links_of(params: Params) -> tuple[Link, ...]:
    """Return the entries with their inputs, in topological order, and otherwise in the order of the file.

    Raises `networkx.NetworkXUnfeasible` if the graph has a cycle, which `check_graph` reports.
    """
    import networkx as nx

    found = _links(params)
    position = {name: number for number, name in enumerate(found)}
    return tuple(found[name] for name in nx.lexicographical_topological_sort(_graph(found), key=position.__getitem__))


def check_graph(params: Params) -> Iterator[str]:
    """Report invalid names, paths and connections of entries, each as a sentence with a remedy."""
    found = _links(params)
    yield from _check_names(params)
    for where, path, of_model in _paths(params):
        yield from _check_path(where, path, found, of_model=of_model, params=params)
    cycle = _find_cycle(found)
    if cycle:
        yield (
            f"{cycle[0].replace('@', '.')}: {' → '.join((*cycle, cycle[0]))} form a cycle, in which each depends on "
            "the other; let one of them start from another model"
        )
    yield from _check_unused(params, found)


def check_user_paths(params: Params, stages: Iterable[str]) -> Iterator[str]:
    """Report missing folders and files of the user's that some of the given stages read."""
    wanted, found = set(stages), _links(params)
    made = {link.folder for link in found.values()}
    for where, path, _ in _paths(params):
        stage, _, rest = where.partition(".")
        name = f"{stage}@{rest.partition('.')[0]}" if stage in ENTRY_STAGES else stage
        if name in wanted and path not in made and not path.startswith("data/") and not Path(path).exists():
            yield f"{where}: found {path!r}, but there is no such file or folder here; correct the path, or create it"


def _links(params: Params) -> dict[str, Link]:
    """Return the entries in the order of the stages and, within a stage, of the file."""
    found = {}
    for stage in ENTRY_STAGES:
        for key, entry in entries_of(params, stage).items():
            paths = tuple(str(value) for _, value, _ in _entry_paths(f"{stage}.{key}", stage, entry))
            found[f"{stage}@{key}"] = Link(f"{stage}@{key}", paths, str(lookup(entry, "role") or ""))
    return found


def _entry_paths(where: str, stage: str, entry: Any) -> Iterator[tuple[str, str, bool]]:
    """Yield (setting, path, whether a model is expected there); the model that the entry starts from comes first."""
    name = "model.path" if stage == "pretrain" else "model"
    new = stage == "pretrain" and lookup(entry, "model.name") == "new"
    reward = lookup(entry, "reward.name") == "model"
    for setting, of_model in ((name, not new), *([("reward.path", reward)] if stage == "align" else [])):
        path = lookup(entry, setting)
        if isinstance(path, str) and path:
            yield f"{where}.{setting}", path, of_model


def _paths(params: Params) -> Iterator[tuple[str, str, bool]]:
    """Yield every (setting, path, whether a model is expected there) of the file."""
    tokenizer = lookup(params, "tokenize.tokenizer.path")
    if isinstance(tokenizer, str) and lookup(params, "tokenize.tokenizer.name") == "from":
        yield "tokenize.tokenizer.path", tokenizer, True
    for stage in ENTRY_STAGES:
        for key, entry in entries_of(params, stage).items():
            yield from _entry_paths(f"{stage}.{key}", stage, entry)
    for part in PACKAGE_PARTS:
        path = lookup(params, f"package.{part}")
        if isinstance(path, str):
            yield f"package.{part}", path, True


def _graph(found: Links) -> "nx.DiGraph[str]":
    import networkx as nx

    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(found)
    makers = {link.folder: name for name, link in found.items() if link.stage != "evaluate"}
    graph.add_edges_from((makers[path], name) for name, link in found.items() for path in link.reads if path in makers)
    return graph


def _find_cycle(found: Links) -> list[str]:
    import networkx as nx

    try:
        return [first for first, _ in nx.find_cycle(_graph(found))]
    except nx.NetworkXNoCycle:
        return []


def _check_names(params: Params) -> Iterator[str]:
    for stage in ENTRY_STAGES:
        section = params.get(stage)
        for key in section if isinstance(section, dict) else ():
            if not isinstance(key, str) or not NAME.fullmatch(key):
                yield (
                    f"{stage}.{key}: found the name {key!r}, but a name is up to 63 letters, digits, - and _, and "
                    "begins with a letter, because it is part of paths, commands and URLs"
                )


def _check_path(where: str, path: str, found: Links, *, of_model: bool, params: Params) -> Iterator[str]:
    plain = posixpath.normpath(path)
    if plain != path:
        yield f"{where}: found {path!r}; write it as {plain!r}, so that equal folders have equal paths"
        return
    parts = path.split("/")
    folders = [link.folder for link in found.values() if link.stage != "evaluate"]
    if parts[0] != "data" or parts[1:2] == ["sources"] or not set(parts[1:2]) <= set(STAGES):
        return
    if path == INGESTED_CHECKPOINT:
        if lookup(params, "ingest.checkpoint") is None:
            yield f"{where}: found {path!r}, but ingest.checkpoint is null: set it to a model, or use another path"
    elif where == "tokenize.tokenizer.path":
        yield (
            f"{where}: found {path!r}, but all models of the graph are trained with this tokenizer; name a folder of "
            f"your own, or {INGESTED_CHECKPOINT}"
        )
    elif of_model and path not in folders:
        yield (
            f"{where}: found {path!r}, but no entry makes that; there are {', '.join(folders) or 'no entries'}. Name "
            "one of them, or a folder of your own"
        )


def _check_unused(params: Params, found: Links) -> Iterator[str]:
    """Report entries whose model nothing reads, so that training it is useless."""
    read = {path for link in found.values() for path in link.reads}
    read |= {str(lookup(params, f"package.{part}")) for part in PACKAGE_PARTS}
    evaluates = any(link.stage == "evaluate" for link in found.values())
    for link in found.values():
        used = link.stage == "evaluate" or (link.stage == "reward" and evaluates)
        if not used and link.folder not in read:
            yield (
                f"{link.name.replace('@', '.')}: no other entry, evaluation or package reads {link.folder}; refer "
                "to it in one of these, or remove this entry"
            )
