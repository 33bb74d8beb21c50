"""The package stage: contents, provenance, model tag, and failed gates."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks import package
from tasks.common import identity, tables
from tasks.common.harness.job import Job, Link, StageError
from tasks.common.settings import Checkpoints
from tests import training_fixtures
from tests.training_fixtures import NUMERICS

BOTH = {"chat": "data/quantize/chat/model", "encoder": "data/quantize/encoder/model"}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Tiny inputs of the stage, with all gates passed."""
    paths: dict[str, Path] = {}
    wanted = package.INPUTS | package.graph_inputs(settings(), training_fixtures.links())
    for name in BOTH:
        paths[name] = tmp_path / "in" / name
        paths[name].mkdir(parents=True)
        (paths[name] / "openvino_model.bin").write_bytes(name.encode())
    row = {"id": "1", "text": "The capital of France is Paris.", "names": ["France", "Paris"], "split": "train"}
    paths["corpus"] = tmp_path / "in" / "corpus"
    tables.write([row], paths["corpus"], tables.schema("corpus"))
    for table in ("instructions", "rankings"):
        paths[table] = tmp_path / "in" / table
        tables.write([], paths[table], tables.schema(table))
    paths["sources"] = write(tmp_path / "in" / "sources.json", [{"name": "facts"}])
    for name in (name for name in wanted if name.startswith("record of ")):
        stage = name.removeprefix("record of ")
        record = {"stage": stage, "recipe": f"r {stage}", "content": f"c {stage}"}
        paths[name] = write(tmp_path / "in" / f"{stage}.json", record)
    write_evaluation(paths, [gate(0.95)])
    return paths


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def gate(value: float | None, model: str = "encoder", **bounds: Any) -> dict[str, Any]:
    """Return a gate on masked names with its result."""
    bounds = bounds or {"min": 0.9}
    passed = value is not None and value >= bounds.get("min", value) and value <= bounds.get("max", value)
    return {"metric": "masked_names", "model": model, **bounds, "value": value, "passed": passed}


def write_evaluation(inputs: dict[str, Path], gates: list[dict[str, Any]], models: Any = ()) -> dict[str, Any]:
    """Write the record of `compare`."""
    evaluation = {"models": list(models), "gates": gates}
    write(inputs["record of compare"], {"stage": "compare", "recipe": "r", "content": "c", "metrics": evaluation})
    return evaluation


def settings(**changes: Any) -> package.Config:
    return package.Config.model_validate({**BOTH, "refuse_failed_gates": True, **changes})


def run(inputs: dict[str, Path], out: Path, **changes: Any) -> dict[str, Any]:
    out.mkdir(parents=True)
    outputs = {name: out / name for name in package.OUTPUTS}
    store = Checkpoints(url="checkpoints", every_seconds=60.0)
    return package.run(settings(**changes), Job("package", None, inputs, outputs, 1, NUMERICS, "", store))


def test_package_contents(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics = run(inputs, tmp_path / "out")
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    stages = [record["stage"] for record in provenance["stages"]]
    assert stages[:3] == ["ingest", "validate", "tokenize"]
    assert stages[-1] == "compare"
    assert len(stages) == len(set(stages)) == len([name for name in inputs if name.startswith("record of ")])
    assert json.loads((tmp_path / "out" / "encoder" / "names.json").read_text()) == ["France", "Paris"]
    assert (tmp_path / "out" / "chat" / "openvino_model.bin").read_bytes() == b"chat"
    assert provenance["model"] == metrics["model"] == identity.tag(provenance["recipe"], provenance["content"])
    assert provenance["contents"] == BOTH


@pytest.mark.parametrize("part", list(BOTH))
def test_single_part_leaves_the_other_folder_empty(part: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    other = next(name for name in BOTH if name != part)
    both = run(inputs, tmp_path / "both")["model"]
    metrics = run(inputs, tmp_path / "out", **{other: None})
    assert [path.name for path in (tmp_path / "out" / part).iterdir()]
    assert not list((tmp_path / "out" / other).iterdir())
    assert metrics["model"] != both
    with pytest.raises(ValidationError, match="nothing would be served"):
        settings(chat=None, encoder=None)


def test_graph_inputs_are_records_of_ancestors_and_evaluations() -> None:
    """Records of another alignment and of its evaluation are not inputs."""
    links = (
        Link("finetune@a", ("models/mine",)), Link("finetune@b", ("models/mine",)),
        Link("reward@judge", ("models/mine",), "judge"), Link("align@ppo", ("data/finetune/a/model",)),
        Link("align@dpo", ("data/finetune/b/model",)), Link("quantize@chat", ("data/align/ppo/model",)),
        Link("evaluate@mine", ("models/mine",)), Link("evaluate@ppo", ("data/align/ppo/model",)),
        Link("evaluate@dpo", ("data/align/dpo/model",)),
    )  # fmt: skip
    inputs = package.graph_inputs(settings(chat="data/quantize/chat/model", encoder=None), links)
    entries = ("finetune@a", "align@ppo", "quantize@chat", "reward@judge", "evaluate@mine", "evaluate@ppo")
    assert list(inputs) == ["chat", "corpus", "instructions", "rankings", "sources"] + [
        f"record of {name}" for name in ("ingest", "validate", "tokenize", "compare", *entries)
    ]
    assert inputs["record of align@ppo"] == "data/align/ppo/record.json"


@pytest.mark.parametrize(
    ("model", "names"),
    [("models/mine", []), ("data/ingest/checkpoint", ["sources", "record of ingest"])],
    ids=["folder", "downloaded"],
)
def test_graph_inputs_of_an_export_are_neither_data_nor_scorecard(model: str, names: list[str]) -> None:
    chat = "data/quantize/chat/model"
    inputs = package.graph_inputs(settings(chat=chat, encoder=None), [Link("quantize@chat", (model,))])
    assert list(inputs) == ["chat", *names, "record of quantize@chat"]


def test_user_files_are_listed_as_a_source(inputs: dict[str, Path], tmp_path: Path) -> None:
    original = json.loads(inputs["record of finetune@chat"].read_text())
    record = {"inputs": {"models/mine": "d" * 64}, "user_provided": {"models/mine": {"model.safetensors": "e" * 64}}}
    write(inputs["record of finetune@chat"], {**original, **record})
    run(inputs, tmp_path / "out")
    sources = json.loads((tmp_path / "out" / "provenance.json").read_text())["sources"]
    assert sources == [
        {"name": "facts"},
        {"name": "models/mine", "kind": "user_provided", "licence": "", "sha256": "d" * 64,
         "files": {"model.safetensors": "e" * 64}},
    ]  # fmt: skip


def test_names_are_those_of_the_training_text_once_and_in_order(inputs: dict[str, Path], tmp_path: Path) -> None:
    texts = [(["Rome", "Italy"], "train"), (["Italy"], "train"), (["Atlantis"], "heldout"), ([], "train")]
    rows = [{"id": str(n), "text": "…", "names": names, "split": split} for n, (names, split) in enumerate(texts)]
    (inputs["corpus"] / "part-00000.parquet").unlink()
    tables.write(rows, inputs["corpus"], tables.schema("corpus"))
    assert run(inputs, tmp_path / "out")["names"] == 2
    assert json.loads((tmp_path / "out" / "encoder" / "names.json").read_text()) == ["Italy", "Rome"]


@pytest.mark.parametrize("part", ["recipe", "content"])
@pytest.mark.parametrize("served", ["quantize@chat", "quantize@encoder"])
def test_recipe_and_bytes_of_both_served_models_are_in_the_tag(
    served: str, part: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    first = run(inputs, tmp_path / "one")["model"]
    record = json.loads(inputs[f"record of {served}"].read_text())
    write(inputs[f"record of {served}"], {**record, part: "another"})
    assert run(inputs, tmp_path / "two")["model"] != first


def test_evaluation_is_reported_but_not_in_the_tag(inputs: dict[str, Path], tmp_path: Path) -> None:
    first = run(inputs, tmp_path / "one")["model"]
    evaluation = write_evaluation(inputs, [gate(0.95)], [{"model": "int8", "perplexity": 3.0}])
    write(inputs["sources"], [{"name": "facts"}, {"name": "more"}])
    assert run(inputs, tmp_path / "two")["model"] == first
    provenance = json.loads((tmp_path / "two" / "provenance.json").read_text())
    assert provenance["evaluation"] == evaluation
    assert [source["name"] for source in provenance["sources"]] == ["facts", "more"]


def test_corpus_without_names_uses_its_words(inputs: dict[str, Path], tmp_path: Path) -> None:
    """The most frequent words, without punctuation and digits."""
    row = {"id": "1", "text": "It rained, it rained 40 days.", "names": [], "split": "train"}
    tables.write([row], tmp_path / "prose", tables.schema("corpus"))
    inputs["corpus"] = tmp_path / "prose"
    run(inputs, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "encoder" / "names.json").read_text()) == ["It", "days", "it", "rained"]
    assert run(inputs, tmp_path / "chat", encoder=None)["names"] == 0


@pytest.mark.parametrize(
    ("vocabulary", "words"),
    [
        (["[UNK]", "##s", "!", "b", "rain", "days", "##ing", "40", "Ärger"], ["days", "rain", "Ärger"]),
        (["<s>", "Ġrain", "ing", "Ġdays", "Ġ40", "ĠÃĦrger", "Ġa"], ["days", "rain", "Ärger"]),
        (["<s>", "▁rain", "ing", "▁days", "▁40", "▁Ärger", "▁"], ["days", "rain", "Ärger"]),
        (["[UNK]", "##中", "中", "国", "大", "ok"], ["ok", "中", "国", "大"]),
    ],
    ids=["wordpiece", "bytes", "sentencepiece", "chinese"],
)
def test_corpus_without_words_uses_whole_words_of_the_vocabulary(
    vocabulary: list[str], words: list[str], inputs: dict[str, Path], tmp_path: Path
) -> None:
    write_vocabulary(inputs["encoder"], vocabulary)
    shutil.rmtree(inputs["corpus"])
    tables.write([], inputs["corpus"], tables.schema("corpus"))
    run(inputs, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "encoder" / "names.json").read_text()) == sorted(words)


def test_neither_corpus_nor_vocabulary_with_words_raises(inputs: dict[str, Path], tmp_path: Path) -> None:
    write_vocabulary(inputs["encoder"], ["[UNK]", "4", "0", "##1"])
    row = {"id": "1", "text": "40 41", "names": [], "split": "train"}
    tables.write([row], tmp_path / "digits", tables.schema("corpus"))
    inputs["corpus"] = tmp_path / "digits"
    with pytest.raises(StageError, match="neither the corpus nor the encoder's vocabulary contains words"):
        run(inputs, tmp_path / "none")


def write_vocabulary(folder: Path, vocabulary: list[str]) -> None:
    """Write a tokenizer with these tokens, decoded as their marks say."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, vocabulary[0]))
    marks = {"Ġ": decoders.ByteLevel(), "▁": decoders.Metaspace()}
    found = [decoder for mark, decoder in marks.items() if any(token.startswith(mark) for token in vocabulary)]
    tokenizer.decoder = found[0] if found else decoders.WordPiece()
    tokenizer.add_special_tokens([vocabulary[0]])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_classifier_is_packaged_with_a_text_of_the_project(inputs: dict[str, Path], tmp_path: Path) -> None:
    inputs["classifier"] = tmp_path / "in" / "classifier"
    inputs["classifier"].mkdir()
    (inputs["classifier"] / "labels.json").write_text("null")
    inputs["record of quantize@topics"] = write(
        tmp_path / "in" / "topics.json", {"stage": "quantize@topics", "recipe": "r", "content": "c"}
    )
    fill(inputs, "instructions", [conversation(1, "I liked it.", "positive")])
    parts = {"chat": None, "encoder": None, "classifier": "data/quantize/topics/model"}
    found = examples(inputs, tmp_path / "out", **parts)
    assert (found["classified"], found["samples"]) == ("I liked it.", [])
    assert (tmp_path / "out" / "classifier" / "labels.json").is_file()
    assert not list((tmp_path / "out" / "chat").iterdir())


def conversation(number: int, *turns: str, **changes: Any) -> dict[str, Any]:
    """Return a row of the instructions table, whose turns alternate between user and assistant."""
    messages = [{"role": ("user", "assistant")[at % 2], "content": turn} for at, turn in enumerate(turns)]
    return {"id": str(number), "messages": messages, "entity": turns[0], "split": "heldout", **changes}


def examples(inputs: dict[str, Path], out: Path, **changes: Any) -> dict[str, Any]:
    run(inputs, out, **changes)
    content: dict[str, Any] = json.loads((out / "examples.json").read_text(encoding="utf-8"))
    return content


def fill(inputs: dict[str, Path], table: str, rows: list[dict[str, Any]]) -> None:
    shutil.rmtree(inputs[table])
    tables.write(rows, inputs[table], tables.schema(table))


def last_turns(prompts: list[list[dict[str, str]]]) -> list[str]:
    return [prompt[-1]["content"] for prompt in prompts]


def test_prompts_are_held_out_distinct_and_alternate_between_entities(inputs: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        conversation(1, "Tea?", "Yes.", entity="tea"), conversation(2, "More tea?", "No.", entity="tea"),
        conversation(3, "Cake?", "Yes."), conversation(4, "Tea?", "Please.", entity="tea"),
        conversation(5, "Hi", "Hello.", "How are you?", "Fine."), conversation(6, "Rain?", "No.", split="train"),
    ]  # fmt: skip
    fill(inputs, "instructions", rows)
    found = examples(inputs, tmp_path / "out")
    assert last_turns(found["prompts"]) == ["Tea?", "Cake?", "How are you?", "More tea?"]
    assert [turn["role"] for turn in found["prompts"][2]] == ["user", "assistant", "user"]
    assert found["samples"] == ["Tea?", "Cake?", "More tea?"]
    fill(inputs, "instructions", list(reversed(rows)))
    assert examples(inputs, tmp_path / "reversed") == found


def test_prompts_of_a_project_without_held_out_conversations(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Those of training conversations come next, then those of rankings; without data there is none."""
    nothing = examples(inputs, tmp_path / "nothing")
    assert (nothing["prompts"], nothing["samples"]) == ([], [])
    prompt = [{"role": "user", "content": "Better?"}]
    ranking = {"id": "1", "prompt": prompt, "responses": ["A", "B"], "ranks": [1, 2], "split": "train"}
    fill(inputs, "rankings", [ranking])
    assert examples(inputs, tmp_path / "rankings")["prompts"] == [prompt]
    fill(inputs, "instructions", [conversation(1, "Rain?", "No.", split="train")])
    assert last_turns(examples(inputs, tmp_path / "training")["prompts"]) == ["Rain?"]
    assert examples(inputs, tmp_path / "encoder", chat=None)["prompts"] == []


def test_samples_are_short_questions_without_system_message_first(inputs: dict[str, Path], tmp_path: Path) -> None:
    long, system = "word " * 50, {"role": "system", "content": "Be brief."}
    with_system = conversation(1, "Tea?", "Yes.")
    with_system["messages"].insert(0, system)
    fill(inputs, "instructions", [with_system, conversation(2, long, "Yes."), conversation(3, "Cake?", "No.")])
    assert examples(inputs, tmp_path / "out")["samples"] == ["Cake?", long, "Tea?"]


@pytest.mark.parametrize(
    ("text", "names", "masked"),
    [
        ("The capital of France is Paris.", ["France"], "The capital of [MASK] is Paris."),
        ("The Chadian capital of Chad.", ["Chad"], "The Chadian capital of [MASK]."),
        ("It rained 40 days.", [], "It rained 40 [MASK]."),
        ("Long " * 50, ["Long"], None),
    ],
)
def test_masked_text_is_of_the_corpus(
    inputs: dict[str, Path], tmp_path: Path, text: str, names: list[str], masked: str | None
) -> None:
    fill(inputs, "corpus", [{"id": "1", "text": text, "names": names, "split": "train"}])
    assert examples(inputs, tmp_path / "out")["masked"] == masked
    assert examples(inputs, tmp_path / "chat", encoder=None)["masked"] is None


def test_masked_text_has_a_name_where_the_corpus_has_any(inputs: dict[str, Path], tmp_path: Path) -> None:
    fields = {"names": [], "split": "heldout"}
    named = {"id": "2", "text": "Rome is old.", "names": ["Rome"], "split": "train"}
    fill(inputs, "corpus", [{"id": "1", "text": "It rained again.", **fields}, named])
    assert examples(inputs, tmp_path / "out")["masked"] == "[MASK] is old."


def test_failed_gates_are_all_named_and_nothing_is_written(inputs: dict[str, Path], tmp_path: Path) -> None:
    against = {**gate(0.1, "b", min=0.2), "against": "a", "relative": True}
    write_evaluation(inputs, [against, gate(0.95), gate(None, "c", max=0.3, min=0.1)])
    with pytest.raises(StageError) as caught:
        run(inputs, tmp_path / "out")
    assert "2 of 3 gates failed" in str(caught.value)
    assert "masked_names of b relative to a: 0.1, but at least 0.2; " in str(caught.value)
    assert "masked_names of c: no value, but at least 0.1 and at most 0.3. See" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_failed_gate_is_accepted_when_allowed(inputs: dict[str, Path], tmp_path: Path) -> None:
    write_evaluation(inputs, [gate(0.5)])
    with pytest.raises(StageError, match=r"1 of 1 gates failed.*masked_names of encoder: 0\.5, but at least 0\.9"):
        run(inputs, tmp_path / "out")
    assert run(inputs, tmp_path / "anyway", refuse_failed_gates=False)["gates_failed"] == 1
