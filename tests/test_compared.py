"""Models to compare with the packaged one: what cannot answer is told before anything is exported."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flows import models
from tasks.common import identity
from tasks.common.settings import BessemerError, SettingsError
from tests.conftest import ROOT

KIND = {"architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's settings and a tuned model with its record; whoever exports fails the test."""
    (tmp_path / "params.yaml").write_text((ROOT / "profiles/smoke.yaml").read_text())
    write(tmp_path, KIND)

    def export(*arguments: object) -> None:
        pytest.fail("it was exported")

    monkeypatch.setattr(models, "_export", export)
    return tmp_path


def write(project: Path, config: dict[str, Any]) -> None:
    folder = project / "data/finetune/model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    record = {
        "stage": "finetune", "recipe": "a" * 64, "content": "b" * 64, "inputs": {},
        "outputs": {"data/finetune/model": identity.tree_hash(folder)},
    }  # fmt: skip
    (folder.parent / "record.json").write_text(json.dumps(record))


def refused(project: Path, names: Sequence[str], sentence: str) -> None:
    with pytest.raises(BessemerError, match=sentence):
        models.ready(project, names)


def test_the_models_that_can_be_added_are_the_sheets_decoders() -> None:
    assert list(models.known()) == ["base", "tuned", "policy", "pruned"]


def test_an_unknown_model_is_told_with_those_there_are(project: Path) -> None:
    refused(project, ["tuned", "int9"], "no model 'int9' to add; there are base, tuned, policy, pruned. The packaged")


def test_a_model_that_is_not_made_yet_is_told_with_the_command_that_makes_it(project: Path) -> None:
    refused(project, ["base"], "base is not there yet: `bessemer run -s pretrain@clm` makes data/pretrain/clm/model")


def test_a_model_that_its_record_does_not_speak_of_is_told(project: Path) -> None:
    (project / "data/finetune/model/more").touch()
    refused(project, ["tuned"], "is not what finetune made.*`bessemer run -s finetune`")


def test_a_classifier_answers_no_questions(project: Path) -> None:
    write(project, {"architectures": ["LlamaForSequenceClassification"]})
    refused(project, ["tuned"], "tuned is a LlamaForSequenceClassification, which answers no questions")


def test_wrong_settings_are_told(project: Path) -> None:
    (project / "params.yaml").write_text("base: {seed: one}\n")
    with pytest.raises(SettingsError, match="nothing was run"):
        models.ready(project, ["tuned"])
    assert models.ready(project, []) == {}


def test_a_lineage_holds_what_a_model_was_made_from_and_nothing_else(project: Path) -> None:
    def record(stage: str, inputs: dict[str, str], outputs: dict[str, str]) -> dict[str, Any]:
        found = {"stage": stage, "inputs": inputs, "outputs": outputs}
        path = project / "data" / stage.replace("@", "/") / "record.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        return found

    (project / "data/finetune/record.json").unlink()
    first = record("ingest", {"data/sources": "0"}, {"data/ingest/corpus": "1", "data/ingest/rankings": "2"})
    base = record("pretrain@clm", {"data/ingest/corpus": "1"}, {"data/pretrain/clm/model": "3"})
    record("reward", {"data/ingest/rankings": "2"}, {"data/reward/model": "4"})
    tuned = record("finetune", {"data/pretrain/clm/model": "3"}, {"data/finetune/model": "5"})
    assert models.lineage(project, tuned) == [first, base, tuned]
    record("ingest", {"data/sources": "9"}, {"data/ingest/corpus": "8", "data/ingest/rankings": "2"})
    assert models.lineage(project, tuned) == [base, tuned]  # what was made meanwhile is none of its parents
