"""Stage names in `dvc.yaml`, settings, modules, tests and data folders agree.

`dvc.yaml`, `params.yaml`, the profiles, `tasks/`, the tests and the paths of data and metrics must agree;
above all, the digests that a stage depends on must cover every local module that it imports, directly or not, or a
change of shared code would leave the stage "up to date". A failure prints the lines to add and to remove.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from tasks import code
from tasks.common import identity
from tasks.common.code import closure, stages
from tasks.common.defaults import settings_classes
from tasks.common.harness import job
from tasks.common.harness.job import module_of
from tasks.common.model_graph import links_of
from tasks.common.params_file import check, config_of
from tasks.common.raw_params import read_params
from tasks.common.settings import ENTRY_STAGES, STAGES
from tests.conftest import ROOT

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "pandas",
    "great_expectations",
    "openvino",
    "bentoml",
    "prefect",
    "dvc",
)
# Stages that read an open number of entries, and the sections whose folders they depend on for that.
OPEN = {"evaluate": ("reward",), "compare": ENTRY_STAGES, "package": STAGES[:-1]}
PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))
Sections = dict[str, set[str]]


def expected_sections(name: str, key: str | None) -> Sections:
    """Return a stage's sections of dvc.yaml, computed from its module's declarations and imports."""
    module, params = module_of(name), read_params(ROOT / "params.yaml")
    section, config = config_of(module, params, key)
    record = job.record_path(name, key).as_posix()
    made = {stages.digest_file(name).as_posix(), str(identity.LOCK_FILE)}
    inputs = set(job.declared_inputs(module, key, config, links_of(params)).values())
    folders = {f"data/{stage}" for stage in OPEN.get(name, ())}
    graph = ENTRY_STAGES if job.reads_graph(module) else ("reward",) if name == "evaluate" else ()
    numerics = ["numerics"] if job.uses_numerics(module) else []
    return {
        "cmd": {f"python -m tasks.{name}" + (f" {key}" if key is not None else "")},
        "deps": made | folders | {path for path in inputs if not any(path.startswith(f"{top}/") for top in folders)},
        "params": {
            section,
            "base",
            *graph,
            *job.shared_sections(module),
            *numerics,
        },
        "outs": set(job.declared_outputs(module, key).values()) | {record},
        "metrics": {job.metrics_path(name, key).as_posix()},
    }


@cache
def dvc_stages() -> dict[str, Sections]:
    """Return the stages of dvc.yaml by name as DVC reads them, with templates filled in."""
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        return {stage.name: _sections(stage) for stage in repo.index.stages}


def _sections(stage: Any) -> Sections:
    files = [dep for dep in stage.deps if not hasattr(dep, "params")]
    return {
        "cmd": {stage.cmd},
        "deps": {dep.def_path for dep in files},
        "params": {name for dep in stage.deps if hasattr(dep, "params") for name in dep.params},
        "outs": {out.def_path for out in stage.outs if not out.metric},
        "metrics": {out.def_path for out in stage.outs if out.metric and not out.use_cache},
    }


def every_stage() -> list[tuple[str, str | None]]:
    """Return every stage with each of its entries in `params.yaml`."""
    params = read_params(ROOT / "params.yaml")
    return [(name, key) for name in STAGES for key in (params[name] if name in ENTRY_STAGES else [None])]


def test_dvc_yaml_lists_exactly_the_stages() -> None:
    assert sorted(dvc_stages()) == sorted([code.NAME, *(job.stage_name(*pair) for pair in every_stage())])


def test_code_stage_reads_all_counted_code_and_writes_every_digest() -> None:
    counting = {path for name in STAGES for path in closure.files(stages.module_of_stage(name, ROOT), ROOT)}
    served = {path.as_posix() for path in counting if path.parts[0] != "tasks"}
    assert dvc_stages()[code.NAME] == {
        "cmd": {"python -m tasks.code"},
        "deps": {"tasks"} | served,
        "params": set(),
        "outs": {stages.digest_file(name).as_posix() for name in STAGES},
        "metrics": set(),
    }


@pytest.mark.parametrize("name", STAGES)
def test_stage_commands_match_module_paths(name: str) -> None:
    assert stages.module_of_stage(name, ROOT) == module_of(name).__name__


@pytest.mark.parametrize("name", STAGES)
def test_digests_cover_every_local_module_a_stage_imports(name: str) -> None:
    """The digests follow imports in the source text; this test compares them with the modules that Python loads."""
    module = module_of(name).__name__
    outside = {path.removesuffix(".py").replace("/", ".") for path in closure.EXCLUDED_MODULES}
    only_through_excluded = {
        module_name for path in outside for module_name in loaded_modules(path)
    }  # what only these import
    assert loaded_modules(module) - set(closure.modules(module, ROOT)) <= only_through_excluded


@cache
def loaded_modules(module: str) -> set[str]:
    """Return a module and the local modules that Python loads with it."""
    program = f"import {module}, sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split() if name.partition(".")[0] in closure.LOCAL_PACKAGES}


@pytest.mark.parametrize(("name", "key"), every_stage(), ids=lambda part: part or "-")
def test_dvc_yaml_matches_module_declarations(name: str, key: str | None) -> None:
    full = job.stage_name(name, key)
    declaration, definition = expected_sections(name, key), dvc_stages()[full]
    lines = [f"dvc.yaml and tasks/{name}.py disagree about {full}:"]
    for section in declaration:
        lines += [f"  {section}: add     - {item}" for item in sorted(declaration[section] - definition[section])]
        lines += [f"  {section}: remove  - {item}" for item in sorted(definition[section] - declaration[section])]
    if len(lines) > 1:
        pytest.fail("\n".join(lines), pytrace=False)


def test_dvc_yaml_has_no_duplicates() -> None:
    """DVC ignores repeated dependencies, so no other test would fail."""
    for name, sections in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].items():
        deps = sections.get("do", sections)["deps"]
        assert len(deps) == len(set(deps)), name


def test_every_input_is_committed_or_a_stage_output() -> None:
    outputs = {path for sections in dvc_stages().values() for path in sections["outs"] | sections["metrics"]}
    inputs = {(name, path) for name, sections in dvc_stages().items() for path in sections["deps"] - outputs}
    absent = sorted(f"{name}: {path}" for name, path in inputs if not (ROOT / path).exists())
    assert absent == [], "these inputs of dvc.yaml are made by no stage and do not exist"


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *PROFILES], ids=lambda path: path.name)
def test_settings_are_complete_and_within_bounds(path: Path) -> None:
    check(read_params(path))


def test_profiles_exist() -> None:
    assert {path.stem for path in PROFILES} == {"default", "smoke", "chat", "gpu", "multi-gpu"}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_its_test(name: str) -> None:
    assert (ROOT / "tests" / f"test_{name}.py").is_file(), f"tests/test_{name}.py says what is promised of {name}"


@pytest.mark.parametrize("name", STAGES)
def test_stages_never_import_each_other(name: str) -> None:
    local = closure.files(module_of(name).__name__, ROOT)
    owners = {path.parts[1].removesuffix(".py") for path in local if path.parts[0] == "tasks"}
    assert owners & set(STAGES) == {name}


@pytest.mark.parametrize("name", STAGES)
def test_every_setting_is_read(name: str) -> None:
    sharing = [other for other in STAGES if name == "evaluate" and job.shared_sections(module_of(other))]
    files = {path for stage in (name, *sharing) for path in closure.files(module_of(stage).__name__, ROOT)}
    trees = (ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in files)
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names_read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names_read |= {
        node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }  # getattr
    unread = {setting for config in configs(name) for setting, _ in fields(config)} - names_read
    assert unread == set(), f"nothing in tasks/{name}.py or what it imports reads these settings"


def configs(name: str) -> list[type[BaseModel]]:
    """Return the config classes of a stage."""
    module = module_of(name)
    return [*settings_classes(module.Config), *settings_classes(getattr(module, "AnyEvaluation", None))]


def fields(config: type[BaseModel]) -> Iterator[tuple[str, bool]]:
    """Yield a config's settings and whether each is described; of the groups inside it, their settings."""
    for name, field in config.model_fields.items():
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        groups = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        yield name, bool(field.description or groups)
        for group in groups:
            yield from fields(group)


@pytest.mark.parametrize("name", STAGES)
def test_every_setting_has_a_description(name: str) -> None:
    assert [setting for config in configs(name) for setting, description in fields(config) if not description] == []


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
