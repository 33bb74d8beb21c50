"""The closure of a stage's code: everything that it imports, except listed code that does not affect results."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tasks.common.code import canonical, closure, stages
from tasks.common.settings import STAGES
from tests.conftest import ROOT
from tests.test_identity import write

# Excluded modules and definitions that counted code uses, and why that is safe. New ones need a reason here.
ALLOWED_EXCLUDED_NAMES = {
    ("tasks/common/harness/execution.py", "main"): "`python -m tasks.prune` starts the harness",
    ("tasks/common/training/services.py", "__file__"): "the tracker starts the process by its path",
    ("tasks/common/harness/job.py", "NO_TRACKING"): "a default of Job; a stage gets the value of its settings",
    ("tasks/common/settings.py", "Tracking"): "NO_TRACKING is one",
    ("tasks/common/settings.py", "ENTRY_STAGES"): "which sections hold entries does not change an entry's outputs",
    ("tasks/common/settings.py", "Timeouts"): "a default of the job's; a limit that is exceeded ends the stage",
    ("tasks/common/harness/records.py", "peak_memory"): "a point of the tracker's curves",
}
# Modules that import modules by a name that is known only at run time.
DYNAMIC = {
    "tasks/common/harness/job.py": "loads the module of a stage by its name, for the harness",
    "serving/folders.py": "imports OpenVINO once its telemetry is blocked",
    "tasks/align/rewards.py": "loads the user's own reward function, an input of the stage",
}
COMPUTING = {"torch", "numpy", "pandas", "transformers", "pyarrow", "scipy", "sklearn", "openvino"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A stage `tasks.cook` that imports a helper, which imports two more, one of them inside a function."""
    return write(
        tmp_path,
        {
            "tasks/__init__.py": "",
            "tasks/common/__init__.py": "",
            "tasks/cook.py": "import json\nfrom tasks.common import pots\n",
            "tasks/common/pots.py": "import tasks.common.fire\ndef boil():\n    from tasks.common.water import cup\n",
            "tasks/common/fire.py": "",
            "tasks/common/water.py": "from serving.tap import open_tap\ncup = 1\n",
            "tasks/common/unused.py": "",
            "serving/__init__.py": "",
            "serving/tap.py": "def open_tap(): ...\n",
            "flows/__init__.py": "",
        },
    )


@cache
def counted_modules() -> dict[str, ast.Module]:
    """Return the trees of all modules that count in some stage, without excluded definitions."""
    paths = {path for name in STAGES for path in closure.files(stages.module_of_stage(name, ROOT), ROOT)}
    trees = {path.as_posix(): ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in paths}
    return {path: _without_excluded(path, canonical.canonicalize(tree)) for path, tree in trees.items()}


def _without_excluded(path: str, tree: ast.Module) -> ast.Module:
    outside = closure.EXCLUDED_DEFINITIONS.get(path, {})
    tree.body = [item for item in tree.body if not outside.keys() & set(defined(item))]
    return tree


def defined(statement: ast.stmt) -> list[str]:
    """Return the names that a statement at the top level defines."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


@cache
def references(path: str) -> set[tuple[str, str]]:
    """Return the names that a counted module imports: (dotted module name, name), with `*` for the whole module."""
    pairs: set[tuple[str, str]] = set()
    bound: dict[str, str] = {}
    for node in ast.walk(counted_modules()[path]):
        if isinstance(node, ast.ImportFrom):
            pairs |= {(str(node.module), alias.name) for alias in node.names}
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            pairs |= {(alias.name, "*") for alias in node.names}
    attributes = [node for node in ast.walk(counted_modules()[path]) if isinstance(node, ast.Attribute)]
    named = [(node.value.id, node.attr) for node in attributes if isinstance(node.value, ast.Name)]
    return pairs | {(bound[name], attribute) for name, attribute in named if name in bound}


def names_used(path: str, other: str) -> set[str]:
    """Return the names that a counted module uses of another."""
    module = other.removesuffix(".py").replace("/", ".")
    return {name for origin, name in references(path) if origin == module}


class TestImports:
    def test_closure_includes_indirect_imports(self, project: Path) -> None:
        assert [path.as_posix() for path in closure.files("tasks.cook", project)] == [
            "serving/__init__.py",
            "serving/tap.py",
            "tasks/__init__.py",
            "tasks/common/__init__.py",
            "tasks/common/fire.py",
            "tasks/common/pots.py",
            "tasks/common/water.py",
            "tasks/cook.py",
        ]

    def test_circular_imports_terminate(self, tmp_path: Path) -> None:
        files = {"tasks/__init__.py": "", "tasks/a.py": "import tasks.b\n", "tasks/b.py": "import tasks.a\n"}
        assert len(closure.files("tasks.a", write(tmp_path, files))) == 3

    @pytest.mark.parametrize(
        "text",
        [
            "from .common import pots", "from .common.pots import boil",
            "if A: ...\nelse:\n    import tasks.common.pots",
            "try:\n    import tasks.common.pots\nexcept E: ...", "try: ...\nexcept E:\n    import tasks.common.pots",
            "class A:\n    def f(self):\n        with x:\n            from tasks.common import pots",
            "match x:\n    case 1:\n        from tasks.common import pots",
            "if not TYPE_CHECKING: import tasks.common.pots", "if TYPE_CHECKING: ...\nelse: import tasks.common.pots",
        ],
    )  # fmt: skip
    def test_import_inside_a_function_is_followed(self, project: Path, text: str) -> None:
        (project / "tasks" / "cook.py").write_text(text)
        assert "tasks.common.pots" in closure.modules("tasks.cook", project)

    def test_imports_in_a_package_are_relative_to_it(self, project: Path) -> None:
        files = {"tasks/bake/__init__.py": "from . import oven", "tasks/bake/oven.py": "from ..common import fire"}
        modules = closure.modules("tasks.bake", write(project, files))
        assert {"tasks.bake.oven", "tasks.common.fire"} <= set(modules)

    @pytest.mark.parametrize("test", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
    def test_import_for_type_checking_is_not_followed(self, project: Path, test: str) -> None:
        (project / "tasks" / "cook.py").write_text(f"if {test}:\n    from tasks.common import pots\n")
        assert closure.modules("tasks.cook", project) == ["tasks", "tasks.cook"]

    def test_excluded_modules_are_not_followed(self, project: Path) -> None:
        inside, outside = "from tasks.common import model_graph", "import tasks.odd"
        files = {"tasks/cook.py": inside, "tasks/common/model_graph.py": outside, "tasks/odd.py": ""}
        assert closure.modules("tasks.cook", write(project, files)) == ["tasks", "tasks.common", "tasks.cook"]


class TestOutside:
    @pytest.mark.parametrize("path", closure.EXCLUDED_MODULES)
    def test_excluded_modules_do_not_import_numerical_libraries(self, path: str) -> None:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in imported} & COMPUTING

    def test_excluded_definitions_exist(self) -> None:
        for path, names in closure.EXCLUDED_DEFINITIONS.items():
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            assert names.keys() <= {name for item in tree.body for name in defined(item)}, path

    def test_definitions_of_numerics_exist(self) -> None:
        tree = ast.parse((ROOT / "tasks/common/settings.py").read_text(encoding="utf-8"))
        assert set(closure.NUMERICS_DEFINITIONS) <= {name for item in tree.body for name in defined(item)}

    def test_counted_code_uses_only_listed_excluded_definitions(self) -> None:
        uses = {
            (path, name)
            for module in counted_modules()
            for path in closure.EXCLUDED_MODULES
            for name in names_used(module, path)
        }
        for path, names in closure.EXCLUDED_DEFINITIONS.items():
            uses |= {(path, name) for module in counted_modules() for name in names_used(module, path) & names.keys()}
            own = {node.id for node in ast.walk(counted_modules()[path]) if isinstance(node, ast.Name)}
            uses |= {(path, name) for name in own & names.keys()}
        assert uses <= ALLOWED_EXCLUDED_NAMES.keys()

    def test_stages_without_a_model_take_no_numerics(self) -> None:
        for name in STAGES:
            module = stages.module_of_stage(name, ROOT)
            if "Numerics" not in stages.digest_module(module, ROOT)["tasks/common/settings.py"]:
                paths = [path.as_posix() for path in closure.files(module, ROOT)]
                names = {part for path in paths for part in names_used(path, "tasks/common/settings.py")}
                assert not names & set(closure.NUMERICS_DEFINITIONS), name

    def test_only_these_modules_import_by_name(self) -> None:
        words = ("import_module", "__import__", "spec_from_file_location", "run_path", "run_module")
        modules = {
            path
            for path, tree in counted_modules().items()
            for node in ast.walk(tree)
            if getattr(node, "attr", getattr(node, "id", "")) in words
        }
        assert modules <= DYNAMIC.keys()

    def test_tasks_contain_only_python_files(self) -> None:
        """A template or table beside the code could affect results, but no digest would cover it."""
        files = [path for path in (ROOT / "tasks").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert [path for path in files if path.suffix != ".py"] == []
