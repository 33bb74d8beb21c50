"""Limits on imports between packages and on the size of `tasks/common` and of files.

Imports within functions count; those for type checking do not, because they never run.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

from tasks.common.code.canonical import is_type_checking
from tasks.common.settings import STAGES
from tests.conftest import ROOT

# Of serving, stages may import what opens and runs the served engine: they evaluate the served files.
ENGINE_MODULES = {
    f"serving.{name}"
    for name in ("batching", "classification", "decoding", "engine", "errors", "folders", "names", "templates")
}
OF_TRAINING = {"torch", "transformers", "tokenizers", "datasets", "trl", "peft"}
COMMON_LINES = 8000
FILE_LINES = 350
# Files that may be longer, and why.
LONGER: dict[str, str] = {}


@cache
def modules() -> dict[str, Path]:
    """Return every module of the product by its name."""
    files = [path for folder in ("flows", "serving", "tasks") for path in sorted((ROOT / folder).rglob("*.py"))]
    dotted = {path: path.relative_to(ROOT).with_suffix("").parts for path in files}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in dotted.items()}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a module imports: for `from a import b` the module `a.b` if it exists, else `a`."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and is_type_checking(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules() else str(node.module) for name in whole)
        pending += ast.iter_child_nodes(node)


@cache
def imports() -> "nx.DiGraph[str]":
    """Return which module imports which, libraries included."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(modules())
    for name, path in modules().items():
        graph.add_edges_from((name, other) for other in imported(ast.parse(path.read_text(encoding="utf-8"))))
    return graph


def test_no_modules_import_each_other_in_a_circle() -> None:
    local = imports().subgraph(modules())
    assert [sorted(circle) for circle in nx.strongly_connected_components(local) if len(circle) > 1] == []


@pytest.mark.parametrize("stage", STAGES)
def test_stage_imports_itself_tasks_common_and_the_engine_alone(stage: str) -> None:
    own = {name for name in modules() if f"{name}.".startswith(f"tasks.{stage}.")}
    wrong = [
        f"{name} imports {other}" for name in own for other in imports()[name]
        if other in modules() and other not in own | ENGINE_MODULES and not other.startswith("tasks.common")
    ]  # fmt: skip
    assert own
    assert wrong == []


def test_tasks_common_imports_no_stage_no_flow_and_no_service() -> None:
    wrong = [
        f"{name} imports {other}" for name in modules() if name.startswith("tasks.common")
        for other in imports()[name] if other in modules() and not f"{other}.".startswith("tasks.common.")
    ]  # fmt: skip
    assert wrong == []


def test_flows_import_no_library_of_training() -> None:
    """Indirect imports at the top of a module are checked in `test_mirror.py`."""
    wrong = [
        f"{name} imports {other}" for name in modules() if name.startswith("flows")
        for other in imports()[name] if other.partition(".")[0] in OF_TRAINING
    ]  # fmt: skip
    assert wrong == []


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_tasks_common_stays_small() -> None:
    """Code that a single stage uses belongs to that stage."""
    assert sum(lines(path) for path in (ROOT / "tasks/common").rglob("*.py")) < COMMON_LINES


def test_no_file_holds_several_things() -> None:
    long = {path.relative_to(ROOT).as_posix() for path in modules().values() if lines(path) > FILE_LINES}
    assert long - LONGER.keys() == set(), f"split them: a file has at most {FILE_LINES} lines"
    assert LONGER.keys() - long == set(), "these are short enough by now"
