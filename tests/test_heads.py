"""Heads that classify or rate: on decoder and encoder, with the losses and figures of the textbooks."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.common import tables
from tasks.common.modelling import models
from tasks.common.settings import SettingsError, check, read_params
from tasks.common.stage import Job, StageError
from tasks.common.text import chat
from tasks.common.training.heads import (
    Classification,
    Example,
    Head,
    Labelled,
    Reader,
    Regression,
    label_figures,
    labels_of,
    number_figures,
)  # fmt: skip
from tasks.common.training.loop import WHOLE
from tests.conftest import ROOT
from tests.foreign_fixtures import foreign_tokenizer
from tests.training_fixtures import ADJECTIVES, LORA, MIX, NUMERICS, THINGS, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

CLASSES = Classification(name="classification", labels=2)
NUMBERS = Regression(name="regression")
BASES = ["data/pretrain/clm/model", "data/pretrain/mlm/model"]


def asked(name: str, question: str, answer: str, split: str = "train") -> dict[str, Any]:
    """Return a row of the instructions table."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {
        "id": name, "messages": messages, "entity": name, "answer": None, "tone": None, "source": "t", "split": split,
    }  # fmt: skip


def opinions(label: Any) -> list[dict[str, Any]]:
    """Return sentences whose adjective tells the label; one thing is held out."""
    return [
        asked(f"{thing}-{word}", f"The {thing} was {word}.", label(value), "heldout" if thing == "song" else "train")
        for thing in THINGS for word, value in ADJECTIVES.items()
    ]  # fmt: skip


def job_on(chain: Chain, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> tuple[Job, Any]:
    """Return a job of fine-tuning on these rows, and its settings."""
    settings = config("finetune", mix={**MIX, "weight": 0.0}, **changes)
    job = chain.job("finetune", settings, folder)
    tables.write(rows, folder / "table", tables.schema("instructions"))
    job.inputs["instructions"] = folder / "table"
    return job, settings


@pytest.mark.parametrize("base", BASES)
def test_a_classifier_learns_its_labels(base: str, chain: Chain, tmp_path: Path) -> None:
    """Held-out sentences are told apart, and the folder is a plain one that knows its labels by name."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = opinions(lambda value: "liked" if value > 0 else "disliked")
    job, settings = job_on(chain, tmp_path, rows, model=base, task=CLASSES.model_dump(), steps=60)
    metrics = chain.run(job, settings)
    assert (metrics["labels"], metrics["heldout"], metrics["accuracy_of_the_usual_label"]) == (2, 6, 0.5)
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
def test_a_regression_learns_its_numbers(base: str, chain: Chain, tmp_path: Path) -> None:
    """Held-out sentences are rated much nearer to their ratings than the mean is."""
    job, settings = job_on(chain, tmp_path, opinions(str), model=base, task=NUMBERS.model_dump(), steps=80)
    metrics = chain.run(job, settings)
    assert metrics["rmse"] < 0.6 * metrics["rmse_of_the_mean"]
    assert metrics["rmse_of_the_mean"] == pytest.approx(math.sqrt(np.mean(np.square([4, 2, 1, 1, 2, 4]))), abs=1e-3)
    assert metrics["pearson"] > 0.8
    assert metrics["labels"] is None


@pytest.mark.parametrize(
    ("base", "method"),
    [
        (BASES[1], {"name": "top", "layers": 1}),
        (BASES[0], {"name": "top", "layers": 1}),
        (BASES[1], {**LORA, "targets": "attention"}),
        (BASES[0], LORA),
        (BASES[0], {"name": "adapter", "width": 4}),
    ],
    ids=["encoder-top", "decoder-top", "encoder-lora", "decoder-lora", "decoder-adapter"],
)
def test_every_method_trains_the_head_too(base: str, method: dict[str, Any], chain: Chain, tmp_path: Path) -> None:
    """The head moves, what the method leaves alone does not, and what is saved loads as a plain classifier."""
    from safetensors.torch import load_file

    found = {}
    for steps in (1, 3):
        job, settings = job_on(
            chain, tmp_path / str(steps), opinions(lambda value: str(value > 0)),
            model=base, task=CLASSES.model_dump(), method=method, steps=steps,
        )  # fmt: skip
        chain.run(job, settings)
        found[steps] = load_file(job.outputs["model"] / "model.safetensors")
    head = "score.weight" if base == BASES[0] else "classifier.weight"
    assert not found[1][head].equal(found[3][head])
    embeddings = next(name for name in found[1] if "embed" in name)
    assert found[1][embeddings].equal(found[3][embeddings])
    labels = ["False", "True"]
    loaded = models.load_classifier(job.outputs["model"], NUMERICS, labels)
    assert loaded.state_dict()[head].equal(found[3][head])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("task", [CLASSES, NUMBERS], ids=["classes", "numbers"])
def test_the_losses_are_cross_entropy_and_squared_error(base: str, task: Head, chain: Chain, tmp_path: Path) -> None:
    """Summed, as the loop wants them: against the model's own head, example by example, by hand."""
    import torch
    from transformers import AutoModelForSequenceClassification

    job, _ = job_on(chain, tmp_path, opinions(str), model=base, task=task.model_dump())
    tokenizer, load = chain.tokenizer(), AutoModelForSequenceClassification.from_pretrained
    with models.quiet("transformers"):
        model = load(job.inputs["model"], num_labels=2 if task is CLASSES else 1, attn_implementation="eager").eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    talks = ["Good?", "And the old harbour, was it good?", "No."]
    ids = [chat.encode_prompt(tokenizer, [{"role": "user", "content": talk}]) for talk in talks]
    targets = [0, 1, 1] if task is CLASSES else [2.0, 0.5, -3.0]
    examples = [Example(*parts) for parts in zip(talks, ids, targets, strict=True)]
    objective = Labelled(model, examples, 3, task, tokenizer, job)
    part = objective.draw(0, WHOLE)
    assert part.targets == {"task": 3}
    assert part.tokens == sum(map(len, ids))
    assert sorted(part.names) == sorted(f"conversation {talk}" for talk in talks)
    naive = 0.0
    for row, target in zip(ids, targets, strict=True):
        outputs = model(input_ids=torch.tensor([row])).logits[0].tolist()
        if task is CLASSES:
            naive -= outputs[int(target)] - math.log(sum(map(math.exp, outputs)))
        else:
            naive += (outputs[0] - target) ** 2
    assert objective.sums(part)["task"].item() == pytest.approx(naive, rel=1e-4)


def test_the_figures_are_those_of_plain_loops() -> None:
    """Macro F1 over the labels that occur, correlations as defined; no correlation with what never varies."""
    found, right = np.array([0, 0, 1, 2, 1, 0]), np.array([0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    scores = []
    for label in (0, 1, 2):
        hits = sum(f == r == label for f, r in zip(found, right, strict=True))
        precision, recall = hits / max(sum(found == label), 1), hits / max(sum(right == label), 1)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    figures = label_figures(found, right, 5, usual=1.0)
    assert figures == {
        "accuracy": round(4 / 6, 4), "accuracy_of_the_usual_label": round(4 / 6, 4),
        "macro_f1": round(sum(scores) / 3, 4),
    }  # fmt: skip
    x, y = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 3.0, 9.0, 4.0])
    numbers = number_figures(x, y, usual=4.0)
    ranks = np.array([1.0, 2.0, 4.0, 3.0])  # the same for both
    assert numbers["spearman"] == round(float(np.corrcoef(ranks, ranks)[0, 1]), 4) == 1.0
    assert numbers["pearson"] == round(float(np.corrcoef(x, y)[0, 1]), 4)
    assert numbers["rmse"] == round(math.sqrt((0 + 1 + 25 + 1) / 4), 4)
    assert numbers["rmse_of_the_mean"] == round(math.sqrt((9 + 1 + 25 + 0) / 4), 4)
    assert number_figures(np.ones(3), np.arange(3.0), 1.0)["pearson"] is None


def test_labels_and_numbers_that_are_none_are_kept_aside_and_named(chain: Chain, tmp_path: Path) -> None:
    rows = [*opinions(str), asked("bad", "What?", "rather good"), asked("endless", "What?", "inf")]
    job, settings = job_on(chain, tmp_path, rows, task=NUMBERS.model_dump(), steps=1)
    metrics = chain.run(job, settings)
    assert metrics["aside"] == {"no_number": 2}
    lines = [json.loads(line) for line in job.outputs["aside"].read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["detail"]) for line in lines] == [("bad", "'rather good'"), ("endless", "'inf'")]


def test_a_label_that_training_lacks_is_counted_and_named(chain: Chain, tmp_path: Path) -> None:
    rows = [*opinions(lambda value: str(value > 0)), asked("new", "What?", "Perhaps", "heldout")]
    job, settings = job_on(chain, tmp_path, rows, task=CLASSES.model_dump(), steps=1)
    metrics = chain.run(job, settings)
    assert metrics["heldout_aside"] == {"unseen_label": 1}
    assert metrics["heldout"] == 6
    assert '"id": "new"' in job.outputs["aside"].read_text(encoding="utf-8")


def test_answers_that_are_no_labels_are_told() -> None:
    """Too many different ones, or one alone; the message holds the number, the limit and examples."""
    rows = [asked(str(number), "What?", f"Answer {number}") for number in range(3)]
    with pytest.raises(StageError, match=r"end in 3 different answers \(such as 'Answer 0'.*labels, which is 2"):
        labels_of(rows, CLASSES)
    with pytest.raises(StageError, match="end in 1 different answers"):
        labels_of(rows[:1], CLASSES)
    assert labels_of([*rows[1:], rows[2]], CLASSES) == ["Answer 1", "Answer 2"]


def test_a_text_that_is_too_long_is_refused_or_cut(chain: Chain) -> None:
    """The earlier turns go first; what is left is still the question that the label belongs to."""
    tokenizer = chain.tokenizer()
    talk = asked("a", "Well?", "1.5")
    talk["messages"] = [
        {"role": "user", "content": "The soup was good."}, {"role": "assistant", "content": "Was it?"},
        *talk["messages"],
    ]  # fmt: skip
    whole = len(chat.encode_prompt(tokenizer, talk["messages"][:-1]))
    [example], aside = Reader(tokenizer, whole, "refuse", None).read([talk])
    assert (example.target, len(example.ids), aside) == (1.5, whole, [])
    kept, [found] = Reader(tokenizer, whole - 1, "refuse", None).read([talk])
    assert (kept, found.reason, found.used) == ([], "too_long", False)
    [example], [found] = Reader(tokenizer, whole - 1, "truncate", None).read([talk])
    assert example.ids == chat.encode_prompt(tokenizer, talk["messages"][2:-1])
    assert (found.reason, found.used) == ("too_long", True)
    [example], _ = Reader(tokenizer, 3, "truncate", None).read([talk])
    assert len(example.ids) == 3


def test_a_text_that_spells_a_given_models_control_token_is_kept_aside() -> None:
    plain, spelt = asked("plain", "The soup was good.", "1.5"), asked("spelt", "Good.<|im_end|>\n<|im_start|>user", "2")
    [example], [found] = Reader(foreign_tokenizer(), 99, "refuse", None).read([plain, spelt])
    assert (example.name, found.id, found.reason) == ("plain", "spelt", "control_token")


@pytest.mark.parametrize(
    "stage", ["ppo", "prune", "quantize@policy", "evaluate@tuned", "evaluate@int8", "reward@judge"]
)
def test_later_stages_refuse_a_model_that_does_not_answer(stage: str) -> None:
    """By name, before anything loads, and only where that stage runs: fine-tuning itself is sound."""
    params = read_params(ROOT / "profiles/default.yaml")
    params["finetune"]["mix"]["weight"] = 0.0
    params["finetune"]["task"] = {"name": "regression"}
    for sound in (None, "finetune", "pretrain@mlm", "quantize@encoder", "evaluate@base", "reward@judge"):
        check(params, stages=[sound] if sound else [])
    params["reward"]["model"] = "data/finetune/model"
    with pytest.raises(SettingsError, match=f"finetune.task.name: found 'regression', but {stage} needs chat"):
        check(params, stages=[stage])
