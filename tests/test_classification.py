"""Classifiers from fine-tuning to the endpoint's engine and the scorecard: accuracy, calibration, numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.classification import ClassifierEngine
from serving.errors import InputError
from tasks.common import tables
from tasks.common.harness.job import Job, StageError
from tasks.common.modelling import head_models, labels, models
from tasks.common.text import chat
from tasks.evaluate.heldout_loss import expected_calibration_error
from tests.test_heads import BASES, CLASSES, NUMBERS, job_on, opinion_rows
from tests.training_fixtures import NUMERICS, Chain, chain, config, evaluations

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

ONLY: dict[str, Any] = dict.fromkeys(("exact_match", "reward", "judge", "diversity", "text", "masked_names"))
KINDS: dict[str, Any] = {"classification": {"kind": "classification"}, "regression": {"kind": "regression"}}


def train(chain: Chain, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Job:
    job, settings = job_on(chain, folder, rows, **changes)
    chain.run(job, settings)
    return job


def export(chain: Chain, trained: Job, folder: Path) -> Path:
    job = chain.job("quantize@encoder", config("quantize@encoder"), folder)
    job.inputs["model"] = trained.outputs["model"]
    chain.run(job, config("quantize@encoder"))
    return job.outputs["model"]


def evaluate(chain: Chain, model: Path, table: Path, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    sections = {"evaluations": evaluations(**{**ONLY, **KINDS})}
    job = chain.job("evaluate@encoder", config("evaluate@encoder"), folder, sections=sections)
    job.inputs.update(model=model, instructions=table)
    return chain.run(job, config(job.name)), tables.read(job.outputs["answers"]).to_pylist()


@pytest.mark.parametrize("base", BASES)
def test_a_classifier_is_scored_alike_before_and_after_export(base: str, chain: Chain, tmp_path: Path) -> None:
    rows = opinion_rows(lambda value: "liked" if value > 0 else "disliked")
    trained = train(chain, tmp_path, rows, model=base, task=CLASSES.model_dump(), steps=60)
    exported = export(chain, trained, tmp_path / "export")
    sizes = []
    for name, folder in (("torch", trained.outputs["model"]), ("int8", exported)):
        figures, answers = evaluate(chain, folder, trained.inputs["instructions"], tmp_path / name)
        hits = [row["reply"] == row["reference"] for row in answers]
        assert figures["accuracy"] == pytest.approx(sum(hits) / 6, abs=1e-4)
        assert [row["correct"] for row in answers] == hits
        assert figures["accuracy"] >= 5 / 6 - 1e-4
        assert (figures["macro_f1"] > 0.8, figures["majority_label_accuracy"]) == (True, 0.5)
        details = figures["evaluations"]["classification"]
        assert {key: details[key] for key in ("texts", "unknown_label", "too_long")} == {
            "texts": 6, "unknown_label": 0, "too_long": 0,
        }  # fmt: skip
        sizes.append(figures["bytes"])
    assert sizes[1] < 0.5 * sizes[0]
    engine, tokenizer = ClassifierEngine(exported, 1), chat.load_tokenizer(trained.outputs["model"])
    for row in rows[:3]:
        assert engine.encode_messages(row["messages"][:-1]) == chat.encode_prompt(tokenizer, row["messages"][:-1])
    heldout = [row for row in rows if row["split"] == "heldout"]
    best = [engine.classify(row["messages"][0]["content"], 1).labels[0] for row in heldout]
    correct = np.array(
        [found.label == row["messages"][-1]["content"] for found, row in zip(best, heldout, strict=True)]
    )
    expected = expected_calibration_error(np.array([found.score for found in best]), correct)
    assert figures["label_calibration_error"] == pytest.approx(expected, abs=1e-4)


def test_rows_with_unknown_labels_or_too_long_texts_are_counted(chain: Chain, tmp_path: Path) -> None:
    rows = opinion_rows(lambda value: "liked" if value > 0 else "disliked")
    trained = train(chain, tmp_path, rows, model=BASES[1], task=CLASSES.model_dump(), steps=2)
    heldout = [row for row in rows if row["split"] == "heldout"]
    heldout[0]["messages"][-1]["content"] = "loved"
    heldout[1]["messages"][0]["content"] = "song " * 100
    tables.write(rows, tmp_path / "changed", tables.schema("instructions"))
    figures, answers = evaluate(chain, trained.outputs["model"], tmp_path / "changed", tmp_path / "evaluated")
    details = figures["evaluations"]["classification"]
    assert (details["texts"], details["unknown_label"], details["too_long"], len(answers)) == (4, 1, 1, 4)


def test_a_regression_model_is_served_with_its_numbers(chain: Chain, tmp_path: Path) -> None:
    """And has errors and correlations instead of an accuracy."""
    rows = opinion_rows(str)
    trained = train(chain, tmp_path, rows, model=BASES[1], task=NUMBERS.model_dump(), steps=20)
    exported = export(chain, trained, tmp_path / "export")
    engine = ClassifierEngine(exported, 1)
    model = head_models.load_scorer(trained.outputs["model"], NUMERICS, heads=None).eval()
    tokenizer = chat.load_tokenizer(trained.outputs["model"])
    assert engine.labels is None
    for row in opinion_rows(str)[:4]:
        text = row["messages"][0]["content"]
        found = engine.classify(text)
        ids = [engine.encode(text)]
        [[expected]] = head_models.head_outputs(model, tokenizer, ids, NUMERICS, 1).tolist()
        assert found.labels == []
        assert found.value == pytest.approx(expected, abs=0.05)
    figures, answers = evaluate(chain, exported, trained.inputs["instructions"], tmp_path / "evaluated")
    assert figures["evaluations"]["classification"]["absent"] == "the model gives a number and no label"
    assert figures["parameters"] == models.parameter_count(model)
    errors = [abs(float(row["reply"]) - float(row["reference"])) for row in answers]
    assert [row["absolute_error"] for row in answers] == pytest.approx(errors, abs=1e-4)
    assert figures["mean_absolute_error"] == pytest.approx(sum(errors) / len(errors), abs=1e-4)
    assert figures["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))), abs=1e-3)
    numbers = [float(row["messages"][-1]["content"]) for row in rows if row["split"] == "train"]
    targets = np.array([float(row["reference"]) for row in answers])
    expected_baseline = np.sqrt(np.mean((np.mean(numbers) - targets) ** 2))
    assert figures["mean_baseline_rmse"] == pytest.approx(expected_baseline, abs=1e-3)
    assert -1 <= figures["spearman"] <= 1
    next(row for row in rows if row["split"] == "heldout")["messages"][-1]["content"] = "loud"
    tables.write(rows, tmp_path / "changed", tables.schema("instructions"))
    details = evaluate(chain, exported, tmp_path / "changed", tmp_path / "again")[0]["evaluations"]["regression"]
    assert (details["texts"], details["no_number"]) == (len(answers) - 1, 1)
    with pytest.raises(InputError, match="The text is too long"):
        engine.encode("song " * 100)


def test_a_reward_model_is_not_exported(chain: Chain, tmp_path: Path) -> None:
    job = chain.job("quantize@encoder", config("quantize@encoder"), tmp_path)
    job.inputs["model"] = chain.path("data/reward/train/model")
    with pytest.raises(StageError, match="found another model with a head"):
        chain.run(job, config("quantize@encoder"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"id2label": {"1": "b", "0": "a", "10": "k", "2": "c"}}, ["a", "b", "c", "k"]),
        ({}, ["LABEL_0", "LABEL_1"]),
        ({"id2label": {"0": "LABEL_0"}, "problem_type": "regression"}, None),
    ],
    ids=["in-order", "two-by-default", "number"],
)
def test_labels_are_in_the_order_of_the_outputs(config: dict[str, Any], expected: list[str] | None) -> None:
    config["architectures"] = ["BertForSequenceClassification"]
    assert labels.is_text_classifier(config)
    assert labels.labels_of(config) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}},
        {"architectures": ["BertForTokenClassification"]},
    ],
    ids=["reward", "tokens"],
)
def test_other_heads_are_no_text_classifiers(config: dict[str, Any]) -> None:
    assert not labels.is_text_classifier(config)
