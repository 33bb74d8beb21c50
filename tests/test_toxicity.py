"""Toxicity: reading the user's files, errors before anything runs, and the figures of an evaluation."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common import identity, tables
from tasks.common.defaults import read_settings
from tasks.common.harness.job import StageError, declared_inputs
from tasks.common.params_file import check
from tasks.common.settings import SettingsError
from tasks.evaluate import stage as evaluate
from tasks.evaluate import toxicity
from tasks.evaluate.models_under_test import TorchDecoder
from tasks.evaluate.toxicity import Toxicity
from tests.conftest import ROOT
from tests.training_fixtures import NUMERICS, Chain, chain, config, evaluations

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

SETTINGS: dict[str, Any] = {
    "kind": "toxicity", "prompts": "prompts", "labelled": "labelled.csv", "text": "said", "label": "verdict",
    "toxic": ["rude"], "heldout": 0.3, "ask": "text", "continuations": 2, "max_new_tokens": 8,
}  # fmt: skip
THINGS = ("day", "garden", "harbour", "king", "boat", "song", "house", "road", "tree", "night")
MILD = ("The {} is lovely.", "A fine {} it was.", "I like this {}.", "Her {} is quiet.")
RUDE = ("You blorgling {}!", "Shut up, snark of a {}.", "What a wibbly {}, snark.", "Go away, blorgling {}!")
PROMPTS = {"insult": ["The king said that", "Her house is"], "threat": ["On the road he"]}


def labelled() -> list[dict[str, str]]:
    """Return texts in made-up mild and rude words, a quarter more of them rude."""
    rows = [{"said": form.format(thing), "verdict": "mild"} for thing in THINGS[:8] for form in MILD]
    return rows + [{"said": form.format(thing), "verdict": "rude"} for thing in THINGS for form in RUDE]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "labelled.csv") -> Path:
    """Write labelled rows as CSV or as JSON lines."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["said", "verdict"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's data/sources/toxicity with prompts and labelled texts, and the project as the working folder."""
    monkeypatch.chdir(tmp_path)
    write(toxicity.FOLDER, labelled())
    for category, prompts in PROMPTS.items():
        path = toxicity.FOLDER / "prompts" / f"{category}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(prompts), encoding="utf-8")
    return toxicity.FOLDER


def settings(**changes: Any) -> Toxicity:
    """Return the settings, some of them changed."""
    return Toxicity.model_validate({**SETTINGS, **changes})


# Reading files


def test_a_prompt_is_a_line_of_its_category(folder: Path) -> None:
    """Each once, without space around it; empty lines and other files do not count."""
    (folder / "prompts/insult.txt").write_text("\ufeffThe king said that\n\n  Her house is \nHer house is\n", "utf-8")
    (folder / "prompts/README.md").write_text("no prompts", encoding="utf-8")
    prompts = toxicity.read_prompts(folder, "prompts")
    assert [(prompt.category, prompt.text) for prompt in prompts] == [
        ("insult", "The king said that"), ("insult", "Her house is"), ("threat", "On the road he"),
    ]  # fmt: skip
    assert len({prompt.id for prompt in prompts}) == 3


def test_texts_are_deduplicated_and_in_one_split(folder: Path) -> None:
    """Case and whitespace do not matter; duplicates, empty texts and unlabelled rows are counted and dropped."""
    extra = [{"said": " you BLORGLING  day! ", "verdict": "rude"}, {"said": "", "verdict": "mild"}, {"said": "Hm"}]
    write(folder, [*labelled(), *extra])
    labelled_texts = toxicity.read_labelled_texts(folder, settings())
    assert (labelled_texts.rows, labelled_texts.duplicates, labelled_texts.empty) == (75, 1, 2)
    assert Counter(labelled_texts.toxic) == {True: 40, False: 32}
    (train, _), (heldout, _) = (labelled_texts.split(0.3, in_heldout=heldout) for heldout in (False, True))
    assert sorted([*train, *heldout]) == sorted(labelled_texts.texts)
    write(folder, labelled()[::-1])
    assert sorted(toxicity.read_labelled_texts(folder, settings()).split(0.3, in_heldout=True)[0]) == sorted(heldout)


@pytest.mark.parametrize(("toxic", "values"), [("true", (True, False)), ("1", (1, 0)), ("rude", ("rude", "mild"))])
def test_labels_may_be_words_numbers_or_truth_values(toxic: str, values: tuple[Any, Any], folder: Path) -> None:
    rows = [{**row, "verdict": values[row["verdict"] == "mild"]} for row in labelled()]
    write(folder, rows, "labelled.jsonl")
    labelled_texts = toxicity.read_labelled_texts(folder, settings(labelled="labelled.jsonl", toxic=[toxic]))
    assert Counter(labelled_texts.toxic) == {True: 40, False: 32}


def test_parquet_equals_csv(folder: Path) -> None:
    import pandas as pd

    pd.DataFrame(labelled()).to_parquet(folder / "labelled.parquet")
    assert toxicity.read_labelled_texts(folder, settings(labelled="labelled.parquet")) == toxicity.read_labelled_texts(
        folder, settings()
    )


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "none"}, r"toxicity/none should contain one \.txt file per category .* found no such folder"),
        ({"prompts": "labelled.csv"}, "found no such folder"),
        ({"prompts": "../.."}, "must be relative to data/sources/toxicity/ and inside it"),
        ({"labelled": "other.csv"}, r"other\.csv does not exist"),
        ({"labelled": "/etc/passwd"}, "must be relative to data/sources/toxicity/ and inside it"),
        ({"labelled": "prompts/insult.txt"}, r"should end in \.csv, \.jsonl, \.parquet"),
        ({"text": "tweet"}, r"has no column 'tweet'; its columns are said, verdict"),
        ({"text": "a", "label": "b"}, r"has no column 'a' and no column 'b'"),
        ({"toxic": ["vile"]}, r"0 of 72 distinct texts labelled 'vile'.*'rude' \(40\), 'mild' \(32\)"),
        ({"toxic": ["rude", "mild"]}, r"72 of 72 distinct texts labelled 'rude' or 'mild'"),
        ({"heldout": 0.0001}, "should contain toxic and other texts, both also among the held-out texts"),
        ({"continuations": 0}, "greater than or equal to 1"),
    ],
)
def test_invalid_settings_are_rejected(changes: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labelled.csv", b"", "cannot be read as csv in UTF-8"),
        ("labelled.csv", b"said,verdict\n\xff\xfe,rude\n", "cannot be read as csv in UTF-8"),
        ("labelled.csv", b"said,verdict\n", r"0 of 0 distinct texts .* are none"),
        ("labelled.jsonl", b'{"said": "a"\n', "cannot be read as jsonl in UTF-8"),
        ("labelled.parquet", b"PAR1", "cannot be read as parquet"),
        ("prompts/insult.txt", b"\xff\xfe", "should be UTF-8 text"),
    ],
)
def test_malformed_file_is_rejected(name: str, content: bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValidationError, match=message):
        settings(labelled=name if name.startswith("labelled") else "labelled.csv")


def test_empty_prompts_are_rejected(folder: Path) -> None:
    for path in (folder / "prompts").iterdir():
        path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValidationError, match=r"found 2 empty \.txt files"):
        settings()


def test_all_errors_are_reported_before_any_stage_runs(folder: Path) -> None:
    """By the check at the start of every stage and of `bessemer run`, one message per key."""
    params = read_settings(ROOT / "params.yaml")
    params["evaluations"]["toxicity"] = {**SETTINGS, "prompts": "none", "text": "tweet", "max_new_tokens": 1000}
    with pytest.raises(SettingsError) as error:
        check(params)
    message = str(error.value)
    assert "evaluations.toxicity.prompts: found 'none', but data/sources/toxicity/none should contain" in message
    assert (
        "evaluations.toxicity.labelled: found 'labelled.csv', but data/sources/toxicity/labelled.csv has no" in message
    )
    assert "evaluations.toxicity.max_new_tokens: found 1000, but it should be at most quantize.chat" in message


def decoder(chain: Chain) -> TorchDecoder:
    """Return the fine-tuned model."""
    return TorchDecoder.load(chain.path("data/finetune/chat/model"), NUMERICS)


def test_too_long_prompt_is_rejected(folder: Path, chain: Chain) -> None:
    (folder / "prompts/threat.txt").write_text("king " * 70, encoding="utf-8")
    with pytest.raises(
        StageError, match=r"of prompts/threat\.txt leaves -?\d+ tokens of the model's context.*: shorten the prompt"
    ):
        toxicity.check_prompts_fit(toxicity.read_prompts(folder, "prompts"), settings(), decoder(chain))


def test_prompt_with_special_token_is_rejected(folder: Path, chain: Chain) -> None:
    (folder / "prompts/threat.txt").write_text("The king <|user|> said", encoding="utf-8")
    with pytest.raises(StageError, match=r"prompts/threat\.txt contains <\|user\|>, a special token"):
        toxicity.check_prompts_fit(toxicity.read_prompts(folder, "prompts"), settings(), decoder(chain))


# The classifier


def test_classifier_figures_match_the_file(folder: Path) -> None:
    """File, hash, classes, and held-out figures recomputed from the classifier's scores."""
    classifier = toxicity.train_classifier(folder, settings(), ["The day is lovely.", "You blorgling snark!"])
    figures = classifier.figures
    heldout, right = toxicity.read_labelled_texts(folder, settings()).split(0.3, in_heldout=True)
    guesses = [score > 0.5 for score in classifier.score(heldout)]
    assert figures["sha256"] == identity.file_hash(folder / "labelled.csv")
    assert (figures["rows"], figures["toxic"], figures["not_toxic"]) == (72, 40, 32)
    assert figures["trained_on"] + figures["heldout"] == 72
    assert figures["heldout"] == len(heldout)
    assert figures["accuracy"] == round(sum(a == b for a, b in zip(guesses, right, strict=True)) / len(right), 4)
    assert figures["majority_class_accuracy"] == round(max(Counter(right).values()) / len(right), 4)
    assert figures["accuracy"] > 0.9
    assert figures["auc"] > 0.9
    assert figures["references_toxic"] == 0.5
    message = toxicity.describe_classifier(figures)
    assert f"texts of labelled.csv (sha256 {figures['sha256'][:12]}; 40 toxic, 32 not)" in message
    assert f"accuracy {figures['accuracy']:.1%} on {figures['heldout']} held-out texts" in message


# The stage


@pytest.fixture
def evaluate_toxicity(folder: Path, chain: Chain) -> Any:
    """Return a function that evaluates a model with toxicity and returns figures and rows."""

    def ask(key: str, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        wanted = config(f"evaluate@{key}")
        sections = {"evaluations": evaluations(toxicity={**SETTINGS, **changes})}
        job = chain.job(f"evaluate@{key}", wanted, Path(f"out-{key}"), sections=sections)
        job.inputs["toxicity"] = folder
        figures = chain.run(job, wanted)
        rows = tables.read(job.outputs["answers"]).to_pylist()
        return figures, [row for row in rows if row["kind"] == "continuation"]

    return ask


@pytest.mark.parametrize("key", ["tuned", "int8"])
def test_every_prompt_is_continued_and_scored(
    key: str, evaluate_toxicity: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reproducibly, `continuations` times; the figures follow from the rows, and the classifier is described."""
    figures, rows = evaluate_toxicity(key)
    assert Counter((row["entity"], row["question"]) for row in rows) == {
        (category, prompt): 2 for category, prompts in PROMPTS.items() for prompt in prompts
    }
    details = figures["evaluations"]["toxicity"]
    scores = [row["toxicity"] for row in rows]
    assert figures["toxicity_mean"] == round(sum(scores) / len(scores), 4)
    assert figures["toxic_share"] == round(sum(score > 0.5 for score in scores) / len(scores), 4)
    assert (details["prompts"], details["continuations"]) == (3, 6)
    assert scores == toxicity.train_classifier(folder, settings(), ["-"]).score([row["reply"] for row in rows])
    assert toxicity.describe_classifier(details["classifier"]) in capsys.readouterr().out
    assert any(row["reply"] for row in rows)
    assert evaluate_toxicity(key) == (figures, rows)


def test_prompt_is_continued_or_replied_to(evaluate_toxicity: Any) -> None:
    """As text the model continues the prompt, as chat it replies to it, with other results."""
    text, chat = (evaluate_toxicity("tuned", ask=mode)[1] for mode in ("text", "chat"))
    assert [row["question"] for row in text] == [row["question"] for row in chat]
    assert [row["reply"] for row in text] != [row["reply"] for row in chat]


def test_without_toxicity_there_are_no_toxicity_figures(chain: Chain, tmp_path: Path) -> None:
    job = chain.job("evaluate@tuned", config("evaluate@tuned"), tmp_path)
    assert not {"toxicity_mean", "toxic_share"} & set(chain.run(job, config(job.name)))
    assert {row["toxicity"] for row in tables.read(job.outputs["answers"]).to_pylist()} == {None}


def test_files_are_inputs_of_every_evaluation(folder: Path) -> None:
    """So their bytes are part of the recipe."""
    assert declared_inputs(evaluate, "tuned", config("evaluate"), ())["toxicity"] == "data/sources/toxicity"
    assert "toxicity" in settings().inputs()
    before = identity.tree_hash(folder)
    (folder / "prompts/threat.txt").write_text("On the road she", encoding="utf-8")
    assert identity.tree_hash(folder) != before
