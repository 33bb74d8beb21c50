"""The code that a stage's results depend on: the stage's module and every local module that it imports, transitively.

Imports within functions count, imports for type checking do not. Code that does not affect results is excluded: reading
and checking settings, starting a stage and writing its log, and the placement of files and processes.
"""

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from tasks.common.code.canonical import is_type_checking

STATEMENT_FIELDS = ("body", "orelse", "finalbody", "handlers", "cases")  # AST fields that hold nested statements
LOCAL_PACKAGES = ("tasks", "serving")
# Modules that are excluded, and why; `tests/test_closure.py` checks each.
EXCLUDED_MODULES = {
    "tasks/common/defaults.py": "fills in defaults for checks and printing; each stage's class has its own defaults",
    "tasks/common/model_graph.py": "reads which entries exist; a stage that depends on them records them",
    "tasks/common/params_file.py": "checks params.yaml and describes problems; the settings are recorded",
    "tasks/common/raw_params.py": "reads params.yaml; the settings that it reads are recorded",
    "tasks/common/harness/execution.py": "starts a stage, moves its outputs into place and writes the record",
    "tasks/common/training/services.py": "a separate process that receives figures and returns nothing",
}
# Definitions that are excluded from modules that count, and why.
EXCLUDED_DEFINITIONS = {
    "tasks/common/settings.py": {
        **dict.fromkeys(
            ("Placement", "Checkpoints", "Timeouts", "Tracking", "Service"),
            "says where things run and are stored, which is not part of a recipe",
        ),
        **dict.fromkeys(
            ("STAGES", "ENTRY_STAGES", "ENTRY_SECTIONS", "SettingsError"),
            "used only for reading and checking params.yaml",
        ),
    },
    "tasks/common/harness/job.py": {"NO_TRACKING": "where curves are logged; they are not in any output"},
    "tasks/common/harness/records.py": dict.fromkeys(
        ("RUN_ID_VARIABLE", "RUN_OUTPUTS", "write_run", "peak_memory", "run_folder", "commit"),
        "measures a run and writes its log, which is outside all outputs",
    ),
}
# Definitions of the shared settings that count only in stages that compute with a model (`NUMERICS` of the module).
NUMERICS_DEFINITIONS = ("Numerics", "Parallel", "Dtypes", "ZERO_STAGES", "LOCKSTEP_ENGINES")
# Error classes whose messages a stage writes into its outputs (why a row was rejected), by the folder that raises them.
DATA_ERRORS = {"tasks/ingest": ("ValueError", "UnreadableFile")}


def modules(module: str, root: Path = Path()) -> list[str]:
    """Return the names of a module and of all local modules that it imports, without excluded ones, sorted.

    Raises SyntaxError, with the file's path, if one of them is not valid Python.
    """
    found: set[str] = set()
    pending = [*_existing(module, root)] or [module]
    while pending:
        name = pending.pop()
        path = file_of(name, root)
        if name not in found and path.relative_to(root).as_posix() not in EXCLUDED_MODULES:
            found.add(name)
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            try:
                imported = _imported(path.read_text(encoding="utf-8"), package)
            except SyntaxError as error:
                error.filename = path.relative_to(root).as_posix()
                raise
            pending += [part for dotted in imported for part in _existing(dotted, root)]
    return sorted(found)


def files(module: str, root: Path = Path()) -> list[Path]:
    """Return the files of the modules that `modules` returns, sorted, relative to the project."""
    return sorted(file_of(name, root).relative_to(root) for name in modules(module, root))


def file_of(module: str, root: Path = Path()) -> Path:
    """Return the path of a local module, which need not exist."""
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _existing(dotted: str, root: Path) -> Iterator[str]:
    """Yield a module and its parent packages, as far as they exist: importing the module executes them all."""
    parts = dotted.split(".")
    if parts[0] in LOCAL_PACKAGES:
        names = (".".join(parts[: end + 1]) for end in range(len(parts)))
        yield from (name for name in names if file_of(name, root).is_file())


@lru_cache(maxsize=512)
def _imported(source: str, package: str) -> tuple[str, ...]:
    """Return the dotted names that a source text imports; `from a import b` yields both `a` and `a.b`."""
    return tuple(sorted(set(_imports(ast.parse(source), package))))


def _imports(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
        origin = ".".join(part for part in (parent, node.module) if part)
        yield from (origin, *(f"{origin}.{alias.name}" for alias in node.names))
    elif isinstance(node, ast.If) and is_type_checking(node.test):
        yield from (name for branch in node.orelse for name in _imports(branch, package))
    else:
        nested = (part for field in STATEMENT_FIELDS for part in getattr(node, field, ()) if isinstance(part, ast.AST))
        yield from (name for part in nested for name in _imports(part, package))
