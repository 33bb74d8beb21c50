"""Additional models of the endpoint: unsuitable ones are rejected before anything is exported."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flows import models
from tasks.common import identity
from tasks.common.raw_params import read_params
from tasks.common.settings import BessemerError, SettingsError
from tests.conftest import ROOT

KIND = {"architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's settings and a fine-tuned model with its record; an export fails the test."""
    (tmp_path / "params.yaml").write_text((ROOT / "profiles/smoke.yaml").read_text())
    write(tmp_path, KIND)

    def export(*arguments: object) -> None:
        pytest.fail("it was exported")

    monkeypatch.setattr(models, "_export", export)
    return tmp_path


def write(project: Path, config: dict[str, Any]) -> None:
    folder = project / "data/finetune/chat/model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    record = {
        "stage": "finetune@chat", "recipe": "a" * 64, "content": "b" * 64, "inputs": {},
        "outputs": {"data/finetune/chat/model": identity.tree_hash(folder)},
    }  # fmt: skip
    (folder.parent / "record.json").write_text(json.dumps(record))


def assert_rejected(project: Path, names: Sequence[str], sentence: str) -> None:
    with pytest.raises(BessemerError, match=sentence):
        models.prepare_models(project, names)


def test_available_models_are_causal_models(project: Path) -> None:
    """They are named by evaluations and by stages; the packaged one is omitted, because it is always served."""
    available = models.available_models(read_params(project / "params.yaml"))
    assert [name for name in available if "@" not in name] == ["base", "tuned", "policy", "pruned"]
    assert [name for name in available if "@" in name] == [
        "pretrain@causal", "finetune@chat", "align@policy", "prune@pruned",
    ]  # fmt: skip
    assert available["policy"] == available["align@policy"] == "data/align/policy/model"


def test_user_folder_is_available(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its provenance is the hash of the folder and of its files."""
    folder = project / "models/mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(KIND))
    text = (project / "params.yaml").read_text()
    line = "  mine: {<<: *scorecard, model: models/mine}\n"
    (project / "params.yaml").write_text(text.replace("  tuned: {<<", f"{line}  tuned: {{<<"))
    for part in ("requirements.lock", "tasks", "serving"):
        (project / part).symlink_to(ROOT / part)
    monkeypatch.setattr(models, "_export", lambda source, target, *rest: (target / "chat").mkdir(parents=True))
    provenance = json.loads((models.prepare_models(project, ["mine"], print)["mine"] / "provenance.json").read_text())
    assert provenance["content"] == identity.tree_hash(folder)
    assert provenance["stages"] == []
    assert provenance["sources"][-1]["files"] == identity.file_hashes(folder)


def test_unknown_model_lists_available_models(project: Path) -> None:
    assert_rejected(
        project,
        ["tuned", "int9"],
        "no additional model 'int9'; available are pretrain@causal, finetune@chat, .*The packaged",
    )


def test_missing_model_names_the_command_that_makes_it(project: Path) -> None:
    assert_rejected(
        project, ["base"], "base does not exist yet: `bessemer run -s pretrain@causal` makes data/pretrain/causal/model"
    )


def test_model_with_other_hash_than_its_record_is_an_error(project: Path) -> None:
    (project / "data/finetune/chat/model/more").touch()
    assert_rejected(
        project, ["tuned"], "differs from the output recorded by finetune@chat.*`bessemer run -s finetune@chat`"
    )


def test_classifier_is_rejected(project: Path) -> None:
    write(project, {"architectures": ["LlamaForSequenceClassification"]})
    assert_rejected(project, ["tuned"], "tuned is a LlamaForSequenceClassification, not a causal language model")


def test_invalid_settings_are_reported(project: Path) -> None:
    (project / "params.yaml").write_text("base: {seed: one}\n")
    with pytest.raises(SettingsError, match="nothing was run"):
        models.prepare_models(project, ["tuned"])
    assert models.prepare_models(project, []) == {}


def test_lineage_contains_exactly_the_ancestors(project: Path) -> None:
    def record(stage: str, inputs: dict[str, str], outputs: dict[str, str]) -> dict[str, Any]:
        entry = {"stage": stage, "inputs": inputs, "outputs": outputs}
        path = project / "data" / stage.replace("@", "/") / "record.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entry))
        return entry

    (project / "data/finetune/chat/record.json").unlink()
    first = record("ingest", {"data/sources": "0"}, {"data/ingest/corpus": "1", "data/ingest/rankings": "2"})
    base = record("pretrain@causal", {"data/ingest/corpus": "1"}, {"data/pretrain/causal/model": "3"})
    record("reward", {"data/ingest/rankings": "2"}, {"data/reward/model": "4"})
    tuned = record("finetune", {"data/pretrain/causal/model": "3"}, {"data/finetune/chat/model": "5"})
    assert models.lineage(project, tuned) == [first, base, tuned]
    record("ingest", {"data/sources": "9"}, {"data/ingest/corpus": "8", "data/ingest/rankings": "2"})
    assert models.lineage(project, tuned) == [base, tuned]  # a model trained in the meantime is not a parent
