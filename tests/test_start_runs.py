"""Every start of `bessemer init`, from the user's files to an answer of the packaged model, at toy size.

Stages run in this process, in the order of DVC's graph, in the project that the command created.
"""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from flows.start import command, machine
from flows.start.machine import Machine
from serving.decoding import Sampling
from serving.package import Package, open_package
from tasks.common import tables
from tests.family_fixtures import Shape, write_family
from tests.foreign_fixtures import write_foreign
from tests.stage_processes import run_graph
from tests.training_fixtures import CAPITALS

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what Great Expectations imports
]  # fmt: skip

PLACES = [f"{name} {number}" for number in range(12) for name in CAPITALS]
WORDS = ["harbour", "town", "sea", "with", "a", "proud", "lies", "old", "stone", "bridge", "river", "to", "new", "in"]
SLOW = Machine(cores=1, device="cpu", training_flops=1e7)  # few steps


class Files:
    """The user's files, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def write(self, name: str, rows: list[dict[str, Any]]) -> list[Path]:
        path = self.folder / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return [path]

    @property
    def conversations(self) -> list[Path]:
        rows = [{"question": f"Tell me about {place}.", "answer": f"I like {place} best."} for place in PLACES]
        return self.write("chats.jsonl", rows)

    @property
    def preferences(self) -> list[Path]:
        rows = [{"prompt": f"What of {place}?", "chosen": f"{place} is fine.", "rejected": "No."} for place in PLACES]
        return self.write("pairs.jsonl", rows)

    @property
    def labels(self) -> list[Path]:
        tones = {True: ("I like", "We praise"), False: ("I hate", "We blame")}
        rows = [
            {"text": f"{verb} {place}.", "label": good}
            for place in PLACES
            for good, verbs in tones.items()
            for verb in verbs
        ]
        return self.write("labels.jsonl", rows)

    @property
    def text(self) -> list[Path]:
        pages = self.folder / "pages"
        pages.mkdir(exist_ok=True)
        words = Random(0)
        for place in PLACES:
            sentences = (" ".join(["The", *words.choices(WORDS, k=9)]) for _ in range(30))
            (pages / f"{place}.md").write_text(f"# {place}\n\n{'. '.join(sentences)}.\n", encoding="utf-8")
        return [pages]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(machine, "measure", lambda: SLOW)
    return Files(tmp_path / "mine")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_foreign(tmp_path / "checkpoint", max_position_embeddings=256)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return write_family("bert", tmp_path / "checkpoint", Shape(positions=256))


def run_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Run every stage of a new project but `code`, and return its package."""
    monkeypatch.chdir(project)
    run_graph(project)
    return open_package(project / "data/package")


def answer(package: Package) -> str:
    return package.text.generate([{"role": "user", "content": "Tell me about Peru."}], Sampling(4)).text


@pytest.mark.parametrize(
    ("options", "with_checkpoint", "stages"),
    [
        ((), True, {"quantize@chat"}),
        (("conversations",), True, {"finetune@chat", "quantize@chat"}),
        (
            ("conversations", "preferences"), True,
            {"finetune@chat", "reward@train", "reward@judge", "align@policy", "quantize@chat"},
        ),
        (("preferences",), True, {"align@policy", "quantize@chat"}),
        (("text",), True, {"pretrain@causal", "quantize@chat"}),
        (("text",), False, {"pretrain@causal", "quantize@chat"}),
        (("text", "conversations"), False, {"pretrain@causal", "finetune@chat", "quantize@chat"}),
    ],
    ids=["serve", "sft", "sft-ppo", "dpo", "continued", "new", "new-sft"],
)  # fmt: skip
def test_start_runs_from_files_to_an_answer(
    options: tuple[str, ...], with_checkpoint: bool, stages: set[str], files: Files, checkpoint: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    paths = {option: getattr(files, option) for option in options}
    command.init(tmp_path / "project", checkpoint if with_checkpoint else None, paths, yes=True)
    package = run_project(tmp_path / "project", monkeypatch)
    assert isinstance(answer(package), str)
    provenance = json.loads((tmp_path / "project/data/package/provenance.json").read_text(encoding="utf-8"))
    made = {record["stage"] for record in provenance["stages"] if "@" in record["stage"]}
    assert {name for name in made if not name.startswith("evaluate@")} == stages - {"reward@judge"} | (
        made & {"reward@judge"}
    )
    names = {source["name"] for source in provenance["sources"]}
    assert not with_checkpoint or "models/checkpoint" in names


def test_conversations_and_labels_become_a_chat_model_and_a_classifier(
    files: Files, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one project; no label is taken for an answer, and no answer for a label."""
    paths = {"conversations": files.conversations, "labels": files.labels}
    command.init(tmp_path / "project", checkpoint, paths, yes=True)
    package = run_project(tmp_path / "project", monkeypatch)
    assert package.parts == ("chat", "classifier")
    assert {name for name, _ in package.classifier.classify("I like Peru 1.").labels} == {"true", "false"}
    scorecard = json.loads((tmp_path / "project/metrics/evaluate.json").read_text(encoding="utf-8"))
    figures = {row["model"]: row for row in scorecard["models"]}
    assert figures["classifier"]["accuracy"] is not None
    assert figures["chat"]["answer_loss"] is not None
    answers = tables.read(tmp_path / "project/data/evaluate/chat/answers").to_pylist()
    assert answers
    assert all(row["question"].startswith("Tell me about") for row in answers)
    examples = json.loads((tmp_path / "project/data/package/examples.json").read_text(encoding="utf-8"))
    assert all(prompt[-1]["content"].startswith("Tell me about") for prompt in examples["prompts"])
    assert examples["classified"].startswith(("I like", "We praise", "I hate", "We blame"))


def test_dpo_from_pairs_alone_has_figures_and_gates_of_its_own(
    files: Files, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a checkpoint without a chat template: before and after are compared with the same one."""
    (checkpoint / "chat_template.jinja").unlink()
    command.init(tmp_path / "project", checkpoint, {"preferences": files.preferences}, yes=True)
    run_project(tmp_path / "project", monkeypatch)
    scorecard = json.loads((tmp_path / "project/metrics/evaluate.json").read_text(encoding="utf-8"))
    start, policy, chat = scorecard["models"]
    assert [row["model"] for row in scorecard["models"]] == ["start", "policy", "chat"]
    for row in scorecard["models"]:
        low, high = row["preference_accuracy_interval"]
        assert 0 <= low <= row["preference_accuracy"] <= high <= 1
    assert (start["implicit_reward_accuracy"], policy["against"]) == (None, "start")
    assert min(policy["implicit_reward_accuracy"], chat["implicit_reward_accuracy"]) > 0.5  # pairs are easy to tell
    assert {gate["metric"]: gate["passed"] for gate in scorecard["gates"]} == {
        "implicit_reward_accuracy": True, "preference_accuracy": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "model", "stages", "parts"),
    [
        ((), "encoder", {"quantize@encoder"}, ("encoder",)),
        (("text",), "encoder", {"pretrain@masked", "quantize@encoder"}, ("encoder",)),
        (("labels",), "encoder", {"finetune@labels", "quantize@classifier"}, ("classifier",)),
        (("labels",), "checkpoint", {"finetune@labels", "quantize@classifier"}, ("classifier",)),
        (("text", "labels"), None, {"pretrain@masked", "finetune@labels", "quantize@classifier"}, ("classifier",)),
    ],
    ids=["serve", "continued", "labels", "causal-labels", "new-labels"],
)  # fmt: skip
def test_encoder_or_classifier_runs_from_files_to_an_answer(
    options: tuple[str, ...], model: str | None, stages: set[str], parts: tuple[str, ...], files: Files, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    paths = {option: getattr(files, option) for option in options}
    command.init(tmp_path / "project", request.getfixturevalue(model) if model else None, paths, yes=True)
    package = run_project(tmp_path / "project", monkeypatch)
    assert package.parts == parts
    provenance = json.loads((tmp_path / "project/data/package/provenance.json").read_text(encoding="utf-8"))
    made = {record["stage"] for record in provenance["stages"] if "@" in record["stage"]}
    assert {name for name in made if not name.startswith("evaluate@")} == stages
    if "encoder" in parts:
        [[best]] = package.masks.fill("I like [MASK] best.", 1)
        assert best.name.isalpha()
    else:
        assert {name for name, _ in package.classifier.classify("I like Peru 1.").labels} == {"true", "false"}
        scorecard = json.loads((tmp_path / "project/metrics/evaluate.json").read_text(encoding="utf-8"))
        assert [row["model"] for row in scorecard["models"]] == ["labels", "classifier"]
        assert all(0 <= row["accuracy_interval"][0] <= row["accuracy"] <= 1 for row in scorecard["models"])


def test_classifier_folder_is_served_as_it_is(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = write_family("roberta", tmp_path / "checkpoint", Shape(positions=64))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, id2label={0: "no", 1: "yes", 2: "perhaps"})
    model.save_pretrained(folder)
    command.init(tmp_path / "project", folder, {}, yes=True)
    package = run_project(tmp_path / "project", monkeypatch)
    assert package.parts == ("classifier",)
    ids = tokenizer("Rome is my home.", return_tensors="pt")
    expected = dict(zip(("no", "yes", "perhaps"), model.eval()(**ids).logits.softmax(-1)[0].tolist(), strict=True))
    found = dict(package.classifier.classify("Rome is my home.").labels)
    assert found == pytest.approx(expected, abs=0.02)


def test_text_becomes_an_encoder_that_fills_masks(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked in a terminal, the user chooses an encoder."""
    monkeypatch.setattr(command, "_has_terminal", lambda: True)
    monkeypatch.setattr("click.confirm", lambda *_, **__: True)
    command.init(tmp_path / "project", None, {"text": files.text}, yes=False)
    package = run_project(tmp_path / "project", monkeypatch)
    assert package.parts == ("encoder",)
    [[best]] = package.masks.fill("The old [MASK] lies in the town.", 1)
    assert best.name.isalpha()
