"""Classification and regression heads on decoder and encoder: losses and metrics against their definitions."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.common import tables
from tasks.common.defaults import read_settings
from tasks.common.evaluation.labels import label_metrics, number_metrics
from tasks.common.harness.job import Job, StageError
from tasks.common.modelling import head_models, models
from tasks.common.params_file import check
from tasks.common.settings import SettingsError
from tasks.common.text import chat
from tasks.common.training.loop import FULL_BATCH
from tasks.finetune.objectives.labels import (
    Classification,
    Example,
    HeadTask,
    LabelObjective,
    Reader,
    Regression,
    find_labels,
)
from tests.conftest import ROOT
from tests.foreign_fixtures import foreign_tokenizer
from tests.training_fixtures import ADJECTIVES, LORA, NUMERICS, PRETRAINING_MIX, THINGS, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

CLASSES = Classification(name="classification", max_labels=2)
NUMBERS = Regression(name="regression")
BASES = ["data/pretrain/causal/model", "data/pretrain/masked/model"]


def make_row(name: str, question: str, answer: str, split: str = "train") -> dict[str, Any]:
    """Return a row of the instructions table."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {
        "id": name, "messages": messages, "entity": name, "answer": None, "tone": None, "source": "t", "split": split,
    }  # fmt: skip


def opinion_rows(label: Any) -> list[dict[str, Any]]:
    """Return sentences whose adjective determines the label; the sentences about one thing are held out."""
    return [
        make_row(f"{thing}-{word}", f"The {thing} was {word}.", label(value), "heldout" if thing == "song" else "train")
        for thing in THINGS for word, value in ADJECTIVES.items()
    ]  # fmt: skip


def job_on(chain: Chain, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> tuple[Job, Any]:
    """Return a fine-tuning job on these rows, and its settings."""
    settings = config("finetune@chat", pretraining_mix={**PRETRAINING_MIX, "weight": 0.0}, **changes)
    job = chain.job("finetune@chat", settings, folder)
    tables.write(rows, folder / "table", tables.schema("instructions"))
    job.inputs["instructions"] = folder / "table"
    return job, settings


@pytest.mark.parametrize("base", BASES)
def test_a_classifier_learns_its_labels(base: str, chain: Chain, tmp_path: Path) -> None:
    """Held-out sentences are classified, and plain Transformers loads the folder with its label names."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = opinion_rows(lambda value: "liked" if value > 0 else "disliked")
    job, settings = job_on(chain, tmp_path, rows, model=base, task=CLASSES.model_dump(), steps=60)
    metrics = chain.run(job, settings)
    assert (metrics["labels"], metrics["heldout"], metrics["majority_label_accuracy"]) == (2, 6, 0.5)
    assert metrics["accuracy"] >= 5 / 6 - 1e-4
    assert metrics["macro_f1"] > 0.8
    model: Any = AutoModelForSequenceClassification.from_pretrained(job.outputs["model"]).eval()
    assert model.config.id2label == {0: "disliked", 1: "liked"}
    tokenizer: Any = AutoTokenizer.from_pretrained(job.outputs["model"])
    ids = tokenizer.apply_chat_template(
        rows[0]["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    assert model.config.id2label[int(model(ids).logits.argmax())] == "liked"


@pytest.mark.parametrize("base", BASES)
def test_a_regression_learns_its_numbers(
    base: str, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error on held-out sentences is much lower than that of the mean."""
    job, settings = job_on(chain, tmp_path, opinion_rows(str), model=base, task=NUMBERS.model_dump(), steps=80)
    metrics = chain.run(job, settings)
    assert f"{job.name} held-out rows: 100%" in capsys.readouterr().err
    assert metrics["rmse"] < 0.6 * metrics["mean_baseline_rmse"]
    assert metrics["mean_baseline_rmse"] == pytest.approx(math.sqrt(np.mean(np.square([4, 2, 1, 1, 2, 4]))), abs=1e-3)
    assert metrics["pearson"] > 0.8
    assert metrics["labels"] is None


@pytest.mark.parametrize(
    ("base", "method"),
    [
        (BASES[1], {"name": "top_layers", "layers": 1}),
        (BASES[0], {"name": "top_layers", "layers": 1}),
        (BASES[1], {**LORA, "targets": "attention"}),
        (BASES[0], LORA),
        (BASES[0], {"name": "adapter", "width": 4}),
    ],
    ids=["encoder-top", "decoder-top", "encoder-lora", "decoder-lora", "decoder-adapter"],
)
def test_every_method_trains_the_head_too(base: str, method: dict[str, Any], chain: Chain, tmp_path: Path) -> None:
    """The head changes, frozen weights do not, and the saved model loads as a plain classifier."""
    from safetensors.torch import load_file

    metrics_by_method = {}
    for steps in (1, 3):
        job, settings = job_on(
            chain, tmp_path / str(steps), opinion_rows(lambda value: str(value > 0)),
            model=base, task=CLASSES.model_dump(), method=method, steps=steps,
        )  # fmt: skip
        chain.run(job, settings)
        metrics_by_method[steps] = load_file(job.outputs["model"] / "model.safetensors")
    head = "score.weight" if base == BASES[0] else "classifier.weight"
    assert not metrics_by_method[1][head].equal(metrics_by_method[3][head])
    embeddings = next(name for name in metrics_by_method[1] if "embed" in name)
    assert metrics_by_method[1][embeddings].equal(metrics_by_method[3][embeddings])
    labels = ["False", "True"]
    loaded = head_models.load_classifier(job.outputs["model"], NUMERICS, labels)
    assert loaded.state_dict()[head].equal(metrics_by_method[3][head])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("task", [CLASSES, NUMBERS], ids=["classes", "numbers"])
def test_the_losses_are_cross_entropy_and_squared_error(
    base: str, task: HeadTask, chain: Chain, tmp_path: Path
) -> None:
    """Sums over examples, against the model's own head, example by example."""
    import torch
    from transformers import AutoModelForSequenceClassification

    job, _ = job_on(chain, tmp_path, opinion_rows(str), model=base, task=task.model_dump())
    tokenizer, load = chain.tokenizer(), AutoModelForSequenceClassification.from_pretrained
    with models.suppress_warnings("transformers"):
        model = load(job.inputs["model"], num_labels=2 if task is CLASSES else 1, attn_implementation="eager").eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    talks = ["Good?", "And the old harbour, was it good?", "No."]
    ids = [chat.encode_prompt(tokenizer, [{"role": "user", "content": talk}]) for talk in talks]
    targets = [0, 1, 1] if task is CLASSES else [2.0, 0.5, -3.0]
    examples = [Example(*parts) for parts in zip(talks, ids, targets, strict=True)]
    objective = LabelObjective(model, examples, 3, task, tokenizer, job)
    part = objective.draw(0, FULL_BATCH)
    assert part.target_counts == {"task": 3}
    assert part.tokens == sum(map(len, ids))
    assert sorted(part.names) == sorted(f"conversation {talk}" for talk in talks)
    naive = 0.0
    for row, target in zip(ids, targets, strict=True):
        outputs = model(input_ids=torch.tensor([row])).logits[0].tolist()
        if task is CLASSES:
            naive -= outputs[int(target)] - math.log(sum(map(math.exp, outputs)))
        else:
            naive += (outputs[0] - target) ** 2
    assert objective.loss_sums(part)["task"].item() == pytest.approx(naive, rel=1e-4)


def test_metrics_match_plain_loops() -> None:
    """Macro F1 over the labels that occur; correlations by definition; no correlation of a constant."""
    predicted, labels = np.array([0, 0, 1, 2, 1, 0]), np.array([0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    scores = []
    for label in (0, 1, 2):
        hits = sum(f == r == label for f, r in zip(predicted, labels, strict=True))
        precision, recall = hits / max(sum(predicted == label), 1), hits / max(sum(labels == label), 1)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    figures = label_metrics(predicted, labels, 5, majority_label=1.0)
    assert figures == {
        "accuracy": round(4 / 6, 4), "majority_label_accuracy": round(4 / 6, 4),
        "macro_f1": round(sum(scores) / 3, 4),
    }  # fmt: skip
    x, y = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 3.0, 9.0, 4.0])
    numbers = number_metrics(x, y, train_mean=4.0)
    ranks = np.array([1.0, 2.0, 4.0, 3.0])  # the same for both
    assert numbers["spearman"] == round(float(np.corrcoef(ranks, ranks)[0, 1]), 4) == 1.0
    assert numbers["pearson"] == round(float(np.corrcoef(x, y)[0, 1]), 4)
    assert numbers["rmse"] == round(math.sqrt((0 + 1 + 25 + 1) / 4), 4)
    assert numbers["mean_baseline_rmse"] == round(math.sqrt((9 + 1 + 25 + 0) / 4), 4)
    assert number_metrics(np.ones(3), np.arange(3.0), 1.0)["pearson"] is None


def test_answers_without_a_number_are_rejected(chain: Chain, tmp_path: Path) -> None:
    rows = [*opinion_rows(str), make_row("bad", "What?", "rather good"), make_row("endless", "What?", "inf")]
    job, settings = job_on(chain, tmp_path, rows, task=NUMBERS.model_dump(), steps=1)
    metrics = chain.run(job, settings)
    assert metrics["rejected"] == {"no_number": 2}
    lines = [json.loads(line) for line in job.outputs["rejected"].read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["detail"]) for line in lines] == [("bad", "'rather good'"), ("endless", "'inf'")]


def test_a_label_that_training_lacks_is_counted_and_named(chain: Chain, tmp_path: Path) -> None:
    rows = [*opinion_rows(lambda value: str(value > 0)), make_row("new", "What?", "Perhaps", "heldout")]
    job, settings = job_on(chain, tmp_path, rows, task=CLASSES.model_dump(), steps=1)
    metrics = chain.run(job, settings)
    assert metrics["heldout_rejected"] == {"unseen_label": 1}
    assert metrics["heldout"] == 6
    assert '"id": "new"' in job.outputs["rejected"].read_text(encoding="utf-8")


def test_too_many_or_too_few_labels_are_an_error() -> None:
    """The message has the number of labels, the limit and examples."""
    rows = [make_row(str(number), "What?", f"Answer {number}") for number in range(3)]
    with pytest.raises(StageError, match=r"end in 3 different answers \(such as 'Answer 0'.*labels, which is 2"):
        find_labels(rows, CLASSES)
    with pytest.raises(StageError, match="end in 1 different answers"):
        find_labels(rows[:1], CLASSES)
    assert find_labels([*rows[1:], rows[2]], CLASSES) == ["Answer 1", "Answer 2"]


def test_too_long_text_is_rejected_or_truncated(chain: Chain) -> None:
    """The earliest turns are dropped first; the question that the label belongs to stays."""
    tokenizer = chain.tokenizer()
    talk = make_row("a", "Well?", "1.5")
    talk["messages"] = [
        {"role": "user", "content": "The soup was good."}, {"role": "assistant", "content": "Was it?"},
        *talk["messages"],
    ]  # fmt: skip
    whole = len(chat.encode_prompt(tokenizer, talk["messages"][:-1]))
    [example], rejected = Reader(tokenizer, whole, "reject", None).read([talk])
    assert (example.target, len(example.ids), rejected) == (1.5, whole, [])
    examples, [rejection] = Reader(tokenizer, whole - 1, "reject", None).read([talk])
    assert (examples, rejection.reason, rejection.used) == ([], "too_long", False)
    [example], [rejection] = Reader(tokenizer, whole - 1, "truncate", None).read([talk])
    assert example.ids == chat.encode_prompt(tokenizer, talk["messages"][2:-1])
    assert (rejection.reason, rejection.used) == ("too_long", True)
    [example], _ = Reader(tokenizer, 3, "truncate", None).read([talk])
    assert len(example.ids) == 3


def test_a_text_with_a_control_token_is_rejected() -> None:
    plain, with_token = (
        make_row("plain", "The soup was good.", "1.5"),
        make_row("spelt", "Good.<|im_end|>\n<|im_start|>user", "2"),
    )
    [example], [rejection] = Reader(foreign_tokenizer(), 99, "reject", None).read([plain, with_token])
    assert (example.name, rejection.id, rejection.reason) == ("plain", "spelt", "control_token")


@pytest.mark.parametrize("task", [{"name": "regression"}, {"name": "classification", "max_labels": 3}])
def test_a_model_with_a_head_is_only_exported_and_evaluated(task: dict[str, Any]) -> None:
    """Other stages are rejected before anything loads; training the head is valid."""
    params = json.loads(json.dumps(read_settings(ROOT / "profiles/default.yaml")))
    mix = {**params["finetune"]["chat"]["pretraining_mix"], "weight": 0.0}
    params["finetune"]["head"] = {**params["finetune"]["chat"], "task": task, "pretraining_mix": mix}
    params["evaluate"]["head"] = {**params["evaluate"]["tuned"], "model": "data/finetune/head/model"}
    params["quantize"]["head"] = {"model": "data/finetune/head/model"}
    params["package"]["classifier"] = "data/quantize/head/model"
    check(params)
    for stage, key in (("align", "policy"), ("prune", "pruned"), ("reward", "train")):
        invalid = json.loads(json.dumps(params))
        invalid[stage][key]["model"] = "data/finetune/head/model"
        with pytest.raises(
            SettingsError, match=rf"{stage}\.{key}\.model: found 'data/finetune/head/model', a .* be a caus"
        ):
            check(invalid)
