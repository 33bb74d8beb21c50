"""One key runs through everything: the stage's name.

`dvc.yaml`, `params.yaml`, the profiles, `tasks/`, the tests and the paths of data and metrics must tell the same story;
above all, every local module that a stage imports, directly or not, must be among its inputs in `dvc.yaml`, or a change
of shared code would leave the stage "up to date". A failure prints the lines to add and to remove.
"""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from tasks.common import identity, stage
from tasks.common.settings import STAGES, check, config_of, read_params, stage_keys
from tests.conftest import ROOT

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "pandas",
    "great_expectations",
    "onnxruntime",
    "bentoml",
    "prefect",
    "dvc",
)
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
Sections = dict[str, set[str]]


def module_of(name: str) -> ModuleType:
    """Return a stage's module."""
    return importlib.import_module(f"tasks.{name}")


def expected(name: str, key: str | None) -> Sections:
    """Return what dvc.yaml must say of a stage, from what its module declares and imports."""
    module = module_of(name)
    section, config = config_of(module, read_params(ROOT / "params.yaml"), key)
    code = {path.as_posix() for path in identity.code_files(f"tasks.{name}", ROOT)}
    record = stage.record_path(name, key).as_posix()
    return {
        "cmd": {f"python -m tasks.{name}" + (f" {key}" if key is not None else "")},
        "deps": code | {str(identity.LOCK)} | set(stage.declared_inputs(module, key, config).values()),
        "params": {section, "base", *(["numerics"] if stage.computes(module) else [])},
        "outs": set(stage.declared_outputs(module, key).values()) | {record},
        "metrics": {stage.metrics_path(name, key).as_posix()},
    }


@cache
def declared() -> dict[str, Sections]:
    """Return what dvc.yaml says, as DVC reads it: stages by name, templates filled in."""
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        return {found.name: _sections(found) for found in repo.index.stages}


def _sections(found: Any) -> Sections:
    files = [dep for dep in found.deps if not hasattr(dep, "params")]
    return {
        "cmd": {found.cmd},
        "deps": {dep.def_path for dep in files},
        "params": {name for dep in found.deps if hasattr(dep, "params") for name in dep.params},
        "outs": {out.def_path for out in found.outs if not out.metric},
        "metrics": {out.def_path for out in found.outs if out.metric and not out.use_cache},
    }


def stages() -> list[tuple[str, str | None]]:
    """Return every stage with each of its keys."""
    return [(name, key) for name in STAGES for key in stage.keys_of(module_of(name))]


def test_dvc_yaml_knows_exactly_these_stages() -> None:
    assert sorted(declared()) == sorted(stage.name_of(*pair) for pair in stages())


@pytest.mark.parametrize(("name", "key"), stages(), ids=lambda part: part or "-")
def test_dvc_yaml_says_of_a_stage_what_its_module_declares(name: str, key: str | None) -> None:
    full = stage.name_of(name, key)
    want, have = expected(name, key), declared()[full]
    lines = [f"dvc.yaml and tasks/{name}.py disagree about {full}:"]
    for section in want:
        lines += [f"  {section}: add     - {item}" for item in sorted(want[section] - have[section])]
        lines += [f"  {section}: remove  - {item}" for item in sorted(have[section] - want[section])]
    if len(lines) > 1:
        pytest.fail("\n".join(lines), pytrace=False)


def test_dvc_yaml_says_nothing_twice() -> None:
    """DVC takes a repeated dependency for one, so that nothing else would show it."""
    for name, told in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].items():
        deps = told.get("do", told)["deps"]
        assert len(deps) == len(set(deps)), name


def test_every_input_is_committed_or_another_stage_makes_it() -> None:
    made = {path for sections in declared().values() for path in sections["outs"] | sections["metrics"]}
    inputs = {(name, path) for name, sections in declared().items() for path in sections["deps"] - made}
    absent = sorted(f"{name}: {path}" for name, path in inputs if not (ROOT / path).exists())
    assert absent == [], "these inputs of dvc.yaml are made by no stage and do not exist"


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *PROFILES], ids=lambda path: path.name)
def test_settings_are_complete_and_within_bounds(path: Path) -> None:
    check(read_params(path))


def test_there_are_profiles() -> None:
    assert {"default", "smoke"} <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_its_test(name: str) -> None:
    assert (ROOT / "tests" / f"test_{name}.py").is_file(), f"tests/test_{name}.py says what is promised of {name}"


@pytest.mark.parametrize("name", STAGES)
def test_stages_never_import_each_other(name: str) -> None:
    others = {Path("tasks", f"{other}.py") for other in STAGES if other != name}
    assert others.intersection(identity.code_files(f"tasks.{name}", ROOT)) == set()


@pytest.mark.parametrize("name", STAGES)
def test_every_setting_is_read(name: str) -> None:
    trees = (
        ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in identity.code_files(f"tasks.{name}", ROOT)
    )
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # getattr
    unread = {setting for config in configs(name) for setting, _ in fields(config)} - read
    assert unread == set(), f"nothing in tasks/{name}.py or what it imports reads these settings"


def configs(name: str) -> list[type[BaseModel]]:
    """Return the config of a stage, or one for each of its keys."""
    module = module_of(name)
    return [*stage_keys(module).values()] or [module.Config]


def fields(config: type[BaseModel]) -> Iterator[tuple[str, bool]]:
    """Yield a config's settings and whether each is described; of the groups inside it, their settings."""
    for name, field in config.model_fields.items():
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        groups = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        yield name, bool(field.description or groups)
        for group in groups:
            yield from fields(group)


@pytest.mark.parametrize("name", STAGES)
def test_every_setting_says_what_it_is(name: str) -> None:
    assert [setting for config in configs(name) for setting, described in fields(config) if not described] == []


MADE_OF_HEAVY_PARTS = (
    "compiled_entropy.py", "growing_cache.py", "pipeline.py", "poll.py", "run.py", "service.py", "trl_trainers.py",
)  # fmt: skip


def test_importing_loads_nothing_heavy() -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("flows", "tasks", "serving")
        for path in (ROOT / folder).rglob("*.py")
        if path.stem != "__init__" and path.name not in MADE_OF_HEAVY_PARTS
    )
    code = f"""
import importlib, sys
loaded = {{}}
for name in {modules!r}:
    importlib.import_module(name)
    for heavy in {HEAVY!r}:
        if heavy in sys.modules:
            loaded.setdefault(heavy, name)
print(loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{}", "a library is loaded on import, first by this module"
