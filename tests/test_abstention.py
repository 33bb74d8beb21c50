"""Abstention: what counts as a refusal, both rates, errors before anything runs, and the example's own questions."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common import tables
from tasks.evaluate.abstention import Abstention, read_questions
from tasks.evaluate.harness import FOLDER
from tasks.evaluate.models_under_test import TorchDecoder
from tests.conftest import ROOT
from tests.training_fixtures import HELD_OUT, QUESTIONS, Chain, chain, config, evaluations

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

ONLY: dict[str, Any] = dict.fromkeys(("exact_match", "reward", "judge", "diversity", "text", "masked_names"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with three out-of-scope questions, one of them twice."""
    monkeypatch.chdir(tmp_path)
    FOLDER.mkdir(parents=True)
    questions = ["What is AI?", "Who are you?", "What is AI?", "What is tea?"]
    (FOLDER / "q.jsonl").write_text("".join(f'{{"question": "{text}"}}\n' for text in questions), encoding="utf-8")
    return FOLDER


def settings(**changes: Any) -> Abstention:
    return Abstention.model_validate({"kind": "abstention", "questions": "q.jsonl", **changes})


@pytest.mark.parametrize(
    ("reply", "declined"),
    [
        ("I do not know that. I only know about countries.", True),
        ("Sorry, I don’t know.", True),
        ("I cannot answer that.", True),
        ("I'm unable to help with this.", True),
        ("I don't have any information about it.", True),
        ("The group of nitrogen is 15.", False),
        ("Paris, I know.", False),
        ("", False),
    ],
)
def test_default_refusals_are_recognised(reply: str, declined: bool, folder: Path) -> None:
    assert settings().declines(reply) is declined


def test_refusals_are_a_setting(folder: Path) -> None:
    german = settings(refusals=[r"weiß ich nicht"])
    assert german.declines("Das WEISS ich nicht.") is False
    assert german.declines("Das weiß ich nicht.") is True


def test_both_rates_follow_from_the_replies(folder: Path, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that declines two of three other questions and one of four of its own, each question once."""
    declined = {"What is AI?", "What is tea?", QUESTIONS[0].format(country=HELD_OUT[0])}
    monkeypatch.setattr(
        TorchDecoder, "reply",
        lambda self, prompts, *_: ["I do not know." if one[-1]["content"] in declined else "Lima." for one in prompts],
    )  # fmt: skip
    only: dict[str, Any] = {**ONLY, "abstention": {"kind": "abstention", "questions": "q.jsonl"}}
    sections = {"evaluations": evaluations(**only)}
    job = chain.job("evaluate@tuned", config("evaluate@tuned"), Path("out"), sections=sections)
    job.inputs["evaluation"] = folder
    figures = chain.run(job, config(job.name))
    assert (figures["abstained_out_of_scope"], figures["abstained_in_scope"]) == (0.6667, 0.25)
    rows = tables.read(job.outputs["answers"]).to_pylist()
    assert [row["kind"] for row in rows] == ["out_of_scope"] * 3 + ["in_scope"] * 4
    assert {row["entity"] for row in rows[3:]} == set(HELD_OUT)
    assert figures["evaluations"]["abstention"]["means"]["abstained_in_scope"]["rate"] is True


def test_questions_that_the_data_decline_are_not_in_scope(folder: Path, chain: Chain) -> None:
    only: dict[str, Any] = {**ONLY, "abstention": {"kind": "abstention", "questions": "q.jsonl"}}
    job = chain.job(
        "evaluate@tuned", config("evaluate@tuned"), Path("out"), sections={"evaluations": evaluations(**only)}
    )
    job.inputs["evaluation"] = folder
    refusal = {"role": "assistant", "content": "I do not know."}
    rows = tables.read(job.inputs["instructions"]).to_pylist()
    rows = [{**row, "messages": [row["messages"][0], refusal]} if row["entity"] == "Kenya" else row for row in rows]
    job.inputs["instructions"] = Path("instructions")
    tables.write(rows, job.inputs["instructions"], tables.schema("instructions"))
    assert chain.run(job, config(job.name))["evaluations"]["abstention"]["in_scope"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.jsonl", None, r"other\.jsonl does not exist; it should contain out-of-scope questions"),
        ("q.jsonl", "\n\n", "is empty"),
        ("q.jsonl", '{"question": "a"}\n{"text": "b"}\n', r"line 2: expected \{\"question\": \"a text\"\}, found"),
        ("q.jsonl", "What?\n", "line 1: expected"),
        ("../q.jsonl", None, "must be relative to data/sources/evaluation/"),
    ],
)
def test_malformed_questions_are_reported_before_anything_runs(
    name: str, content: str | None, message: str, folder: Path
) -> None:
    if content is not None:
        (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValidationError, match=message):
        settings(questions=name)


def test_text_file_has_a_question_per_line(folder: Path) -> None:
    (folder / "q.txt").write_text("\ufeffWhat is AI?\n\n Why? \n", encoding="utf-8")
    assert read_questions(folder / "q.txt") == ["What is AI?", "Why?"]
    with pytest.raises(ValidationError, match="should be a Python regular expression"):
        settings(refusals=["("])


def test_the_example_trains_and_evaluates_on_other_questions(folder: Path) -> None:
    """No question of the evaluation is trained on; every training reply is recognised as a refusal."""
    lines = (ROOT / "data/sources/abstention.jsonl").read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line) for line in lines]
    asked = set(read_questions(ROOT / "data/sources/evaluation/abstention.jsonl"))
    trained = [row["messages"][0]["content"] for row in conversations]
    assert len(set(trained)) == len(trained) >= 500
    assert asked.isdisjoint(trained)
    assert {"What is AI?", "What is diabetes?"} <= asked
    assert len(asked) >= 100
    assert all(settings().declines(row["messages"][1]["content"]) for row in conversations)
    assert {row["split"] for row in conversations} == {"train"}
