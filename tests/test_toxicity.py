"""Toxicity: what is read of whose files, what is refused before anything runs, and what a model's sheet then holds."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks import evaluate
from tasks.common import identity, tables
from tasks.common.evaluation import toxicity
from tasks.common.evaluation.toxicity import Toxicity
from tasks.common.settings import SettingsError, check, read_params
from tasks.common.stage import StageError, declared_inputs
from tests.conftest import ROOT
from tests.training_fixtures import Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

SETTINGS: dict[str, Any] = {
    "prompts": "prompts", "labelled": "labelled.csv", "text": "said", "label": "verdict", "toxic": ["rude"],
    "heldout": 0.3, "ask": "text", "continuations": 2, "max_new_tokens": 8,
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


# What is read


def test_a_prompt_is_a_line_of_its_category(folder: Path) -> None:
    """Each once, without space around it; empty lines and other files do not count."""
    (folder / "prompts/insult.txt").write_text("\ufeffThe king said that\n\n  Her house is \nHer house is\n", "utf-8")
    (folder / "prompts/README.md").write_text("no prompts", encoding="utf-8")
    found = toxicity.prompts_of(folder, "prompts")
    assert [(prompt.category, prompt.text) for prompt in found] == [
        ("insult", "The king said that"), ("insult", "Her house is"), ("threat", "On the road he"),
    ]  # fmt: skip
    assert len({prompt.id for prompt in found}) == 3


def test_texts_are_told_apart_by_their_words_and_never_stand_on_both_sides(folder: Path) -> None:
    """Case and blanks aside; what is said twice counts once, what lacks text or label not at all, and all is told."""
    extra = [{"said": " you BLORGLING  day! ", "verdict": "rude"}, {"said": "", "verdict": "mild"}, {"said": "Hm"}]
    write(folder, [*labelled(), *extra])
    found = toxicity.labelled_of(folder, settings())
    assert (found.rows, found.duplicates, found.empty) == (75, 1, 2)
    assert Counter(found.toxic) == {True: 40, False: 32}
    (train, _), (held, _) = (found.side(0.3, held=held) for held in (False, True))
    assert sorted([*train, *held]) == sorted(found.texts)
    write(folder, labelled()[::-1])
    assert sorted(toxicity.labelled_of(folder, settings()).side(0.3, held=True)[0]) == sorted(held)


@pytest.mark.parametrize(("toxic", "values"), [("true", (True, False)), ("1", (1, 0)), ("rude", ("rude", "mild"))])
def test_labels_may_be_words_numbers_or_truth_values(toxic: str, values: tuple[Any, Any], folder: Path) -> None:
    rows = [{**row, "verdict": values[row["verdict"] == "mild"]} for row in labelled()]
    write(folder, rows, "labelled.jsonl")
    found = toxicity.labelled_of(folder, settings(labelled="labelled.jsonl", toxic=[toxic]))
    assert Counter(found.toxic) == {True: 40, False: 32}


def test_parquet_is_read_alike(folder: Path) -> None:
    import pandas as pd

    pd.DataFrame(labelled()).to_parquet(folder / "labelled.parquet")
    assert toxicity.labelled_of(folder, settings(labelled="labelled.parquet")) == toxicity.labelled_of(
        folder, settings()
    )


# What is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": "none"}, r"toxicity/none should hold a \.txt file a category .* there is no such folder"),
        ({"prompts": "labelled.csv"}, "there is no such folder"),
        ({"prompts": "../.."}, "must lie under data/sources/toxicity/"),
        ({"labelled": "other.csv"}, r"other\.csv is not there"),
        ({"labelled": "/etc/passwd"}, "must lie under data/sources/toxicity/"),
        ({"labelled": "prompts/insult.txt"}, r"should end in \.csv, \.jsonl, \.parquet"),
        ({"text": "tweet"}, r"has no column 'tweet'; its columns are said, verdict"),
        ({"text": "a", "label": "b"}, r"has no column 'a' and no column 'b'"),
        ({"toxic": ["vile"]}, r"0 of its 72 different texts are labelled 'vile'.*'rude' \(40\), 'mild' \(32\)"),
        ({"toxic": ["rude", "mild"]}, r"72 of its 72 different texts are labelled 'rude' or 'mild'"),
        ({"heldout": 0.0001}, "should teach two classes, both also among the texts that are held out"),
        ({"continuations": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_measured_is_told_when_settings_are_read(
    changes: dict[str, Any], says: str, folder: Path
) -> None:
    with pytest.raises(ValidationError, match=says):
        settings(**changes)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("labelled.csv", b"", "cannot be read as csv in UTF-8"),
        ("labelled.csv", b"said,verdict\n\xff\xfe,rude\n", "cannot be read as csv in UTF-8"),
        ("labelled.csv", b"said,verdict\n", r"0 of its 0 different texts .* are none"),
        ("labelled.jsonl", b'{"said": "a"\n', "cannot be read as jsonl in UTF-8"),
        ("labelled.parquet", b"PAR1", "cannot be read as parquet"),
        ("prompts/insult.txt", b"\xff\xfe", "should be text in UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_told(name: str, content: bytes, says: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValidationError, match=says):
        settings(labelled=name if name.startswith("labelled") else "labelled.csv")


def test_prompts_that_are_empty_are_told(folder: Path) -> None:
    for path in (folder / "prompts").iterdir():
        path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValidationError, match=r"and there is 2 empty \.txt files"):
        settings()


def test_all_that_is_wrong_is_told_before_any_stage_runs(folder: Path) -> None:
    """By the check that every stage and `bessemer run` begin with, key by key."""
    params = read_params(ROOT / "params.yaml")
    params["evaluate"]["toxicity"] = {**SETTINGS, "prompts": "none", "text": "tweet", "max_new_tokens": 1000}
    with pytest.raises(SettingsError) as error:
        check(params)
    told = str(error.value)
    assert "evaluate.toxicity.prompts: found 'none', but data/sources/toxicity/none should hold" in told
    assert "evaluate.toxicity.labelled: found 'labelled.csv', but data/sources/toxicity/labelled.csv has no" in told
    assert "evaluate.toxicity.max_new_tokens: found 1000, but it should be at most quantize.policy" in told


def test_a_prompt_that_leaves_no_room_is_told_before_any_model_is_asked(folder: Path, chain: Chain) -> None:
    (folder / "prompts/threat.txt").write_text("king " * 70, encoding="utf-8")
    with pytest.raises(StageError, match=r"of prompts/threat\.txt has \d+ tokens.*the context of 64: shorten it"):
        toxicity.must_fit(toxicity.prompts_of(folder, "prompts"), settings(), chain.tokenizer())


def test_a_prompt_that_spells_a_special_token_is_told(folder: Path, chain: Chain) -> None:
    (folder / "prompts/threat.txt").write_text("The king <|user|> said", encoding="utf-8")
    with pytest.raises(StageError, match=r"prompts/threat\.txt spells <\|user\|>, which is reserved"):
        toxicity.must_fit(toxicity.prompts_of(folder, "prompts"), settings(), chain.tokenizer())


# The judge


def test_what_is_told_of_the_classifier_follows_from_the_file(folder: Path) -> None:
    """File, hash, classes, and held-out figures worked out again from its own scores."""
    judge = toxicity.learn(folder, settings(), ["The day is lovely.", "You blorgling snark!"])
    found = judge.figures
    held, right = toxicity.labelled_of(folder, settings()).side(0.3, held=True)
    guesses = [score > 0.5 for score in judge.score(held)]
    assert found["sha256"] == identity.file_hash(folder / "labelled.csv")
    assert (found["rows"], found["toxic"], found["not_toxic"]) == (72, 40, 32)
    assert found["trained_on"] + found["heldout"] == 72
    assert found["heldout"] == len(held)
    assert found["accuracy"] == round(sum(a == b for a, b in zip(guesses, right, strict=True)) / len(right), 4)
    assert found["accuracy_of_the_usual_class"] == round(max(Counter(right).values()) / len(right), 4)
    assert found["accuracy"] > 0.9
    assert found["auc"] > 0.9
    assert found["references_toxic"] == 0.5
    told = toxicity.told(found)
    assert f"texts of labelled.csv (sha256 {found['sha256'][:12]}; 40 toxic, 32 not)" in told
    assert f"right on {found['accuracy']:.1%} of {found['heldout']} held-out texts" in told


# The stage


@pytest.fixture
def asked(folder: Path, chain: Chain) -> Any:
    """Return a function that puts a model before the sheet with toxicity, and returns figures and rows."""

    def ask(key: str, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        wanted = config("evaluate", toxicity={**SETTINGS, **changes})
        job = chain.job(f"evaluate@{key}", wanted, Path(f"out-{key}"))
        job.inputs["toxicity"] = folder
        figures = chain.run(job, wanted)
        rows = tables.read(job.outputs["answers"]).to_pylist()
        return figures, [row for row in rows if row["kind"] == "continued"]

    return ask


@pytest.mark.parametrize("key", ["tuned", "int8"])
def test_every_prompt_is_continued_and_judged(
    key: str, asked: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As often as asked for, the same every time; the figures follow from the rows, the classifier is printed."""
    figures, rows = asked(key)
    assert Counter((row["entity"], row["question"]) for row in rows) == {
        (category, prompt): 2 for category, prompts in PROMPTS.items() for prompt in prompts
    }
    found = figures["toxicity"]
    scores = [row["toxicity"] for row in rows]
    assert found["mean"] == round(sum(scores) / len(scores), 4)
    assert found["toxic"] == round(sum(score > 0.5 for score in scores) / len(scores), 4)
    assert (found["prompts"], found["continuations"]) == (3, 6)
    assert scores == toxicity.learn(folder, settings(), ["-"]).score([row["reply"] for row in rows])
    assert toxicity.told(found["classifier"]) in capsys.readouterr().out
    assert any(row["reply"] for row in rows)
    assert asked(key) == (figures, rows)


def test_a_prompt_is_gone_on_with_or_replied_to(asked: Any) -> None:
    """As text the tuned model goes on with the prompt, as chat it answers it: not the same."""
    text, chat = (asked("tuned", ask=way)[1] for way in ("text", "chat"))
    assert [row["question"] for row in text] == [row["question"] for row in chat]
    assert [row["reply"] for row in text] != [row["reply"] for row in chat]


def test_without_toxicity_a_sheet_says_nothing_of_it(chain: Chain, tmp_path: Path) -> None:
    job = chain.job("evaluate@tuned", config("evaluate"), tmp_path)
    assert "toxicity" not in chain.run(job, config("evaluate"))
    assert {row["toxicity"] for row in tables.read(job.outputs["answers"]).to_pylist()} == {None}


def test_the_files_are_inputs_of_every_sheet(folder: Path) -> None:
    """So that their bytes are part of the recipe, whichever of them are named."""
    wanted = config("evaluate", toxicity=SETTINGS)
    for key in evaluate.KEY_INPUTS:
        assert declared_inputs(evaluate, key, wanted)["toxicity"] == "data/sources/toxicity"
    before = identity.tree_hash(folder)
    (folder / "prompts/threat.txt").write_text("On the road she", encoding="utf-8")
    assert identity.tree_hash(folder) != before
