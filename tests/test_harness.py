"""Tasks of lm-evaluation-harness: figures equal to its own command's, exports included, nothing downloaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common import tables
from tasks.common.modelling import torch_setup
from tasks.evaluate.evaluation import Facts
from tasks.evaluate.harness import FOLDER, Harness
from tests.foreign_fixtures import write_foreign
from tests.training_fixtures import CAPITALS, NUMERICS, Chain, chain, config, evaluations

__all__ = ["chain"]

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

TASKS = {
    "capitals_choice": """
task: capitals_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.jsonl, train: FOLDER/capitals.jsonl}}
output_type: multiple_choice
training_split: train
fewshot_split: train
test_split: test
num_fewshot: 2
doc_to_text: "What is the capital of {{country}}?"
doc_to_choice: ["{{capital}}", "Springfield", "Atlantis"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.5}
""",
    "capitals_reply": """
task: capitals_reply
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "The capital of {{country}} is"
doc_to_target: "{{capital}}"
generation_kwargs: {until: [".", "\\n"], do_sample: false, max_gen_toks: 12}
filter_list:
  - {name: trimmed, filter: [{function: remove_whitespace}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 2}
""",
    "capitals_text": """
task: capitals_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1}
""",
}
SETTINGS: dict[str, Any] = {"kind": "harness", "tasks": list(TASKS), "include": "mine"}
ONLY: dict[str, Any] = dict.fromkeys(("exact_match", "reward", "judge", "diversity", "text", "masked_names"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the files of three tasks: choices, replies, and text longer than the models' context."""
    monkeypatch.chdir(tmp_path)
    mine = FOLDER / "mine"
    mine.mkdir(parents=True)
    rows = [
        {"country": country, "capital": capital, "text": f"The capital of {country} is {capital}. " * (1 + number * 5)}
        for number, (country, capital) in enumerate(CAPITALS.items())
    ]
    (mine / "capitals.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    for name, text in TASKS.items():
        (mine / f"{name}.yaml").write_text(text.replace("FOLDER", mine.as_posix()), encoding="utf-8")
    return FOLDER


def run(chain: Chain, model: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return figures and rows of a model's tasks."""
    sections = {"evaluations": evaluations(**{**ONLY, "harness": {**SETTINGS, **changes}})}
    job = chain.job("evaluate@tuned", config("evaluate@tuned"), Path("out"), sections=sections)
    job.inputs.update(model=model, evaluation=FOLDER)
    return chain.run(job, config(job.name)), tables.read(job.outputs["answers"]).to_pylist()


def reference(model: Path) -> dict[str, Any]:
    """Return the figures of `lm_eval --model hf` on the same folder."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": str(model), "dtype": "float32", "device": "cpu", "attn_implementation": "eager"}
    found = simple_evaluate(
        model="hf", model_args=arguments, tasks=list(TASKS), bootstrap_iters=10,
        task_manager=TaskManager(include_path=str(FOLDER / "mine"), include_defaults=False),
    )  # fmt: skip
    assert found is not None
    results: dict[str, Any] = found["results"]
    return results


@pytest.mark.parametrize("origin", ["chain", "foreign"])
def test_figures_equal_those_of_the_harness_command(origin: str, folder: Path, chain: Chain) -> None:
    """To four decimals, for a model of ours and for one without BOS handling of ours; with few-shot examples."""
    model = chain.path("data/finetune/chat/model") if origin == "chain" else Path("models/foreign").absolute()
    if origin == "foreign":
        write_foreign(model)
    torch_setup.prepare_torch(NUMERICS, 1)
    theirs = reference(model)
    figures, rows = run(chain, model)
    for task, metric, key in (
        ("capitals_choice", "acc", "acc,none"),
        ("capitals_choice", "acc_norm", "acc_norm,none"),
        ("capitals_choice", "acc_stderr", "acc_stderr,none"),
        ("capitals_reply", "exact_match_trimmed", "exact_match,trimmed"),
        ("capitals_text", "word_perplexity", "word_perplexity,none"),
        ("capitals_text", "bits_per_byte", "bits_per_byte,none"),
    ):
        assert figures[task][metric] == pytest.approx(theirs[task][key], abs=5e-5, rel=1e-6), (task, metric)
    described = figures["evaluations"]["harness"]
    assert described["versions"] | {"lm_eval": ""} == {
        "lm_eval": "", "capitals_choice": 1.5, "capitals_reply": 2, "capitals_text": 1,
    }  # fmt: skip
    assert described["shots"] == {"capitals_choice": 2, "capitals_reply": 0, "capitals_text": 0}
    assert {row["entity"] for row in rows} == set(TASKS)
    assert len(rows) == 3 * len(CAPITALS)


def test_an_export_runs_the_same_tasks(folder: Path, chain: Chain) -> None:
    """Close to the model that it was exported from, reproducibly; replies come from the serving engine."""
    figures, rows = run(chain, chain.path("data/quantize/chat/model"))
    parent, parent_rows = run(chain, chain.path("data/prune/pruned/model"))
    assert figures["capitals_text"]["bits_per_byte"] == pytest.approx(parent["capitals_text"]["bits_per_byte"], rel=0.1)
    replies, parent_replies = (
        [row["reply"] for row in found if row["entity"] == "capitals_reply"] for found in (rows, parent_rows)
    )
    assert sum(a == b for a, b in zip(replies, parent_replies, strict=True)) >= len(replies) // 2
    assert run(chain, chain.path("data/quantize/chat/model")) == (figures, rows)


def test_shots_and_limit_are_settings(folder: Path, chain: Chain) -> None:
    model = chain.path("data/finetune/chat/model")
    figures, rows = run(chain, model, tasks=["capitals_choice"], shots=1, limit=3)
    assert figures["evaluations"]["harness"]["shots"] == {"capitals_choice": 1}
    assert len(rows) == 3
    assert rows[0]["question"].count("What is the capital of") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["capitals_choice", "other"]}, "has no task 'other'; its tasks are capitals_choice, capitals_reply"),
        ({"include": "nothing"}, "should contain the tasks' .yaml files, found none"),
        ({"include": "../.."}, "must be relative to data/sources/evaluation/"),
        ({"tasks": []}, "at least 1 item"),
    ],
)
def test_invalid_settings_are_reported_before_anything_runs(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(ValidationError, match=message):
        Harness.model_validate({**SETTINGS, **changes})


def test_missing_data_file_and_malformed_task_are_reported(folder: Path) -> None:
    (folder / "mine/capitals.jsonl").unlink()
    with pytest.raises(ValidationError, match=r"reads data/sources/evaluation/mine/capitals\.jsonl, which does not"):
        Harness.model_validate(SETTINGS)
    (folder / "mine/broken.yaml").write_text("task: [", encoding="utf-8")
    with pytest.raises(ValidationError, match=r"broken\.yaml is not valid YAML"):
        Harness.model_validate(SETTINGS)


def test_missing_package_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.evaluate.harness.PACKAGE", "no_such_package")
    with pytest.raises(ValidationError, match=r"pip install -c requirements\.lock lm-eval"):
        Harness.model_validate(SETTINGS)


def test_possible_figures_come_from_the_task_files(folder: Path) -> None:
    """Gates on them are checked before anything runs; of a task of the package any figure is possible."""
    figures = Harness.model_validate(SETTINGS).possible_figures(Facts(kind="causal"))
    assert {"capitals_choice.acc*", "capitals_reply.exact_match*", "capitals_text.bits_per_byte*"} <= set(figures)
    package = Harness.model_validate({"kind": "harness", "tasks": ["arc_easy"]})
    assert package.possible_figures(Facts(kind="causal")) == ("arc_easy.*",)
