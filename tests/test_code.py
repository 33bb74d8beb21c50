"""The stage `code` under real DVC: rewording runs only it, and a change of the computation runs the affected stages.

The chain is not run for this: each stage's outputs are made up, and DVC commits them as results of its inputs.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import code_changes, commands, graph
from tasks import code
from tasks.common.code import canonical, closure, stages
from tasks.common.code.digests import digest_source
from tasks.common.identity import file_hash
from tasks.common.settings import STAGES
from tests.conftest import ROOT, Project, copy_project

GAE = "tasks/align/estimates.py"
# Functions that handle an error other than by printing it, and what happens to its text. An error whose text is written
# to an output must be in closure.DATA_ERRORS.
HANDLED = {
    ("tasks/align/learner.py", "compute_rewards"): "raised again",
    ("tasks/align/rewards.py", "_make_endpoint_fn"): "part of an error",
    ("tasks/align/rollouts.py", "_request"): "raised again",
    ("tasks/align/timeouts.py", "work"): "raised again in the thread that waits",
    ("tasks/align/vllm_worker.py", "main"): "the stage reports it",
    ("tasks/common/training/loop.py", "_explain_out_of_memory"): "torch's text, which says what kind of error it is",
    ("serving/batching.py", "_run"): "an error for everybody who waits",
    ("serving/folders.py", "load_model"): "a line of an error",
    ("serving/folders.py", "load_pipeline"): "a line of an error",
    ("serving/templates.py", "render"): "part of an error",
    ("tasks/ingest/hub_dataset.py", "_read_rows"): "whether the error is one that another sentence explains",
    ("tasks/ingest/json_values.py", "value"): "whether a value goes on after the text that has been read",
    ("tasks/ingest/row_loading.py", "_load"): "the reason of a rejected row: the ValueErrors of DATA_ERRORS",
    ("tasks/ingest/row_loading.py", "_peek"): "raised again, or part of an error of DATA_ERRORS",
    ("tasks/ingest/source_reading.py", "_read_member"): "the reason of a rejected file: the errors of DATA_ERRORS",
    ("tasks/ingest/sql.py", "_read_rows"): "part of an error",
    ("tasks/ingest/survey.py", "_open_files"): "part of an error",
    ("tasks/ingest/survey.py", "_survey_llamafactory"): "part of an error",
    ("tasks/quantize/prompts.py", "_try"): "whether a template rejects a conversation",
    ("tasks/tokenize/stage.py", "_encode_rows"): "raised again",
}


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which every stage is up to date: `code` has run, the other outputs are fake."""
    from dvc.repo import Repo

    project = copy_project(tmp_path_factory.mktemp("committed") / "bessemer", "smoke")
    dvc(project, "repro", code.NAME)
    with Repo(str(project.path)) as repo:
        for out in (out for stage in repo.index.stages if stage.name != code.NAME for out in stage.outs):
            path = Path(out.fs_path)
            file = path if path.suffix else path / "made-up"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{out.def_path}\n")
    dvc(project, "commit", "--force")
    return project


@pytest.fixture
def project(committed: Project, tmp_path: Path) -> Project:
    """A copy of the committed project to edit."""
    shutil.copytree(committed.path, tmp_path / "bessemer", symlinks=True)
    return Project(tmp_path / "bessemer")


def dvc(project: Project, *arguments: str) -> str:
    """Run DVC in a project with the project's own code; return its output."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=project.path, env=os.environ | {"PYTHONPATH": str(project.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def edit(project: Project, path: str, old: str, new: str) -> None:
    """Replace the first occurrence of a text in a file."""
    text = (project.path / path).read_text(encoding="utf-8")
    assert old in text, f"{path} has no {old!r} any more"
    (project.path / path).write_text(text.replace(old, new, 1), encoding="utf-8")


def dirty(project: Project) -> dict[str, tuple[str, ...]]:
    """Return the stages that must run, with the reasons."""
    return {name: stage.reasons for name, stage in graph.read(project.path).items() if stage.dirty}


def changed(project: Project) -> set[str]:
    """Return the stages that `dvc status` reports as changed."""
    from dvc.repo import Repo

    with Repo(str(project.path)) as repo:
        return {name.rpartition(":")[2] for name in repo.status()}  # `PATH:STAGE` from another working directory


def downstream(project: Project, name: str) -> set[str]:
    """Return a stage and all stages downstream of it, except through code."""
    modules = {name}
    for other, stage in graph.read(project.path).items():
        if modules & set(stage.needs):
            modules.add(other)
    return modules


REWORDINGS = (
    (GAE, "def gae(", "# A comment.\ndef gae("),
    (GAE, '"""', '"""Reworded: '),
    (GAE, ") -> ", ') -> "Any | " + '),
    ("tasks/common/harness/job.py", "the store of checkpoints and", "the folder of checkpoints and"),
    ("tasks/common/training/checkpoints.py", 'print(f"resuming at step', 'print(f"going on at step'),
    ("tasks/rules/consistency.py", "isinstance(value, int) and value > 0", "isinstance(value, int) and 0 < value"),
    ("tasks/common/settings.py", 'description="Seed of', 'description="The seed of'),
    ("serving/errors.py", '"""', '"""Reworded: '),
)


def test_rewording_reruns_only_the_code_stage(project: Project) -> None:
    assert dirty(project) == {}
    for path, old, new in REWORDINGS:
        edit(project, path, old, new)
    assert changed(project) == {code.NAME}
    assert set(dirty(project)) == graph.affected(graph.read(project.path)) == {code.NAME}
    output = dvc(project, "repro")
    assert [line.split("'")[1] for line in output.splitlines() if line.startswith("Running")] == [code.NAME]
    assert changed(project) == set()
    assert dirty(project) == {}


@pytest.mark.parametrize("rewording", REWORDINGS, ids=lambda rewording: rewording[2].split()[0])
def test_rewording_keeps_each_module_digest(rewording: tuple[str, str, str]) -> None:
    path, old, new = rewording
    text = (ROOT / path).read_text(encoding="utf-8")
    assert old in text
    outside = path in closure.EXCLUDED_MODULES or path.startswith("tasks/rules/")  # which no stage imports
    assert digest_source(text.replace(old, new, 1)) == digest_source(text) or outside


def test_changed_gae_operator_reruns_align_and_downstream_stages(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    estimates = (project.path / GAE).read_text(encoding="utf-8")
    tree = ast.parse(estimates)
    gae = next(node for node in tree.body if getattr(node, "name", "") == "gae")
    next(node for node in ast.walk(gae) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)).op = ast.Sub()
    (project.path / GAE).write_text(ast.unparse(tree), encoding="utf-8")
    expected = (f"code: {GAE}: gae",)
    stages_to_run = dirty(project)
    assert set(stages_to_run) == {code.NAME, "align@policy"}
    assert stages_to_run["align@policy"] == expected
    affected = graph.affected(graph.read(project.path))
    assert affected == {code.NAME} | downstream(project, "align@policy")
    assert not any(name.startswith(("pretrain", "finetune", "reward", "tokenize")) for name in affected)
    commands.plan(project.path, ())
    output = capsys.readouterr().out
    assert expected[0] in output
    assert "after code" not in output
    assert changed(project) == {code.NAME}  # DVC itself knows more once the stage has run
    dvc(project, "repro", code.NAME)
    assert changed(project) == {"align@policy"}
    assert dirty(project) == {"align@policy": expected}
    assert graph.reasons(project.path, "align@policy") == expected
    (project.path / GAE).write_text(estimates, encoding="utf-8")
    assert set(dirty(project)) == graph.affected(graph.read(project.path)) == {code.NAME}
    dvc(project, "repro")
    assert dirty(project) == {}


def test_changed_settings_default_reruns_its_stage(project: Project) -> None:
    path = project.path / "tasks/prune.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    config = next(node for node in tree.body if getattr(node, "name", "") == "Config")
    field = next(node for node in ast.walk(config) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Field")
    field.args, field.keywords = [], [item for item in field.keywords if item.arg != "default"]
    field.keywords.append(ast.keyword("default", ast.Constant(4711)))
    path.write_text(ast.unparse(tree), encoding="utf-8")
    stages_to_run = dirty(project)
    assert set(stages_to_run) == {code.NAME, "prune@pruned"}
    assert stages_to_run["prune@pruned"] == ("code: tasks/prune.py: Config",)


def test_shared_code_reruns_exactly_its_stages(project: Project) -> None:
    edit(project, "tasks/common/training/lamb.py", "def ", "def added() -> int:\n    return 1\n\n\ndef ")
    stages_to_run = dirty(project)
    assert {"pretrain", "align"} <= {name.partition("@")[0] for name in stages_to_run}
    assert not {"ingest", "validate", "tokenize", "evaluate", "compare", "package"} & {
        name.partition("@")[0] for name in stages_to_run
    }
    assert stages_to_run["align@policy"] == ("code: tasks/common/training/lamb.py: added (new)",)


def test_changed_numerics_rerun_only_stages_with_a_model(project: Project) -> None:
    head = "class Numerics(Settings):"
    edit(project, "tasks/common/settings.py", head, f"{head}\n    added: int = 1")
    stages_to_run = {name.partition("@")[0] for name in dirty(project)}
    assert {"pretrain", "align", "quantize", "evaluate"} <= stages_to_run
    assert not {"ingest", "validate", "tokenize", "compare", "package"} & stages_to_run


def test_syntax_error_is_reported_before_anything_runs(project: Project) -> None:
    edit(project, GAE, "def gae(", "def gae((")
    with pytest.raises(code_changes.CodeError, match=r"tasks/align/estimates\.py, line \d+: .*; fix it first"):
        graph.read(project.path)


def test_missing_stage_module_is_reported(project: Project) -> None:
    (project.path / "tasks/prune.py").unlink()
    with pytest.raises(code_changes.CodeError, match=r"tasks/prune\.py is missing"):
        graph.read(project.path)


def test_changes_are_reported_without_former_digests(project: Project) -> None:
    edit(project, GAE, "def gae(", "def added() -> int:\n    return 1\n\n\ndef gae(")
    dvc(project, "repro", code.NAME)
    shutil.rmtree(project.path / ".dvc/cache")
    reason = dirty(project)["align@policy"][0]
    assert reason.startswith("code: data/code/align.json (its previous version is not in DVC's cache)")
    (project.path / "data/code/align.json").unlink()
    assert graph.reasons(project.path, "align@policy")[0] == "code: data/code/align.json is missing"


class TestFiles:
    def test_digest_files_are_small_and_sorted(self, committed: Project) -> None:
        for name in STAGES:
            text = (committed.path / stages.digest_file(name)).read_text(encoding="utf-8")
            by_module: dict[str, dict[str, str]] = json.loads(text)
            assert len(text) < 60_000
            assert list(by_module) == sorted(by_module)
            assert all(list(digests) == sorted(digests) for digests in by_module.values())
            assert stages.module_of_stage(name, ROOT).replace(".", "/") + ".py" in by_module
        align = json.loads((committed.path / "data/code/align.json").read_text(encoding="utf-8"))
        assert "gae" in align[GAE]
        assert not closure.EXCLUDED_MODULES.keys() & align.keys()

    def test_module_digest_matches_the_file_hash(self, committed: Project) -> None:
        for name in STAGES:
            digests = stages.digest_module(stages.module_of_stage(name, committed.path), committed.path)
            assert stages.digest_code(digests) == file_hash(committed.path / stages.digest_file(name))

    def test_code_command_writes_a_log(self, project: Project) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "tasks.code"], cwd=project.path, env=os.environ | {"BESSEMER_RUN_ID": "run-1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        log = json.loads((project.path / "runs/run-1/code.json").read_text())
        assert (done.stdout, log["stage"]) == ("", "code")
        assert log["seconds"] > 0

    def test_changes_name_modules_and_definitions(self) -> None:
        before = {"a.py": {"f": "1", "g": "1", "(imports)": "1"}, "b.py": {"f": "1"}, "c.py": {"(imports)": "1"}}
        now = {"a.py": {"f": "2", "h": "1", "(imports)": "2"}, "c.py": {"(imports)": "2"}, "d.py": {"f": "1"}}
        assert list(stages.changed_definitions(before, now)) == [
            "a.py: f, g (removed), h (new)", "b.py (removed)", "c.py: imports", "d.py (new)",
        ]  # fmt: skip


def handlers(node: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.ExceptHandler]]:
    """Yield the handlers that bind their error, with the enclosing function."""
    for child in ast.iter_child_nodes(node):
        name = child.name if isinstance(child, ast.FunctionDef) else inside
        if isinstance(child, ast.ExceptHandler) and child.name:
            yield name, child
        yield from handlers(child, name)


def test_every_error_handler_is_listed() -> None:
    """An error text that is written to an output is data, not a message."""
    handlers_by_place: dict[tuple[str, str], str] = {}
    for path in {path for name in STAGES for path in closure.files(stages.module_of_stage(name, ROOT), ROOT)}:
        tree = canonical.canonicalize(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        for function, handler in handlers(tree):
            nodes: list[Any] = [node for item in handler.body for node in ast.walk(item)]
            attributes = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
            names = [node for node in nodes if isinstance(node, ast.Name) and id(node) not in attributes]
            if any(node.id == handler.name for node in names):
                handlers_by_place[path.as_posix(), function] = ast.unparse(handler)
    assert handlers_by_place.keys() == HANDLED.keys()
