"""Fine-tuning on conversations: as the template writes them, loss on the answers alone, no row skipped in silence."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks import finetune
from tasks.common import tables
from tasks.common.modelling import models
from tasks.common.settings import read_params
from tasks.common.stage import Job, StageError
from tasks.common.text import chat
from tasks.common.text.packing import Encoded
from tasks.common.text.shards import Mixture, Split
from tasks.common.training import answering
from tasks.common.training.answering import Answers
from tasks.common.training.loop import WHOLE, Share
from tests.conftest import ROOT
from tests.training_fixtures import MIX, MIXTURE, NUMERICS, QLORA, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is the capital of Åland?"},
    {"role": "assistant", "content": "Mariehamn, obviously."},
    {"role": "user", "content": "  And of  Italy?\n"},
    {"role": "assistant", "content": "Rome."},
]
TALKS = [TURNS, TURNS[1:3], TURNS[1:], [TURNS[1], {"role": "assistant", "content": ""}]]


@pytest.fixture(scope="module")
def tokenizer(chain: Chain) -> Any:
    """The chain's tokenizer."""
    return chain.tokenizer()


@pytest.fixture
def model(chain: Chain) -> Any:
    """A fresh copy of the base decoder."""
    return models.load_decoder(chain.path("data/pretrain/clm/model"), NUMERICS)


# Conversations


@pytest.mark.parametrize("messages", TALKS)
def test_a_conversation_is_what_the_template_writes(messages: list[dict[str, str]], tokenizer: Any) -> None:
    """Our encoding, which knows what belongs to an answer, has the ids of the chat template that is served."""
    ids, answers = chat.encode_chat(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert len(answers) == len(ids)
    written = "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)
    assert tokenizer.decode(ids) == f"<|bos|>{written}"


@pytest.mark.parametrize("messages", TALKS)
def test_the_loss_is_asked_on_answers_and_their_ends(messages: list[dict[str, str]], tokenizer: Any) -> None:
    """Neither the question, nor the role, nor the system's words are learnt; every reply with its end token is."""
    ids, answers = chat.encode_chat(tokenizer, messages)
    asked = tokenizer.decode([token for token, answer in zip(ids, answers, strict=True) if answer])
    assert asked == "".join(f"{m['content']}<|end|>" for m in messages if m["role"] == "assistant")


def test_a_prompt_is_a_conversation_up_to_the_reply(tokenizer: Any) -> None:
    """What a model is asked with begins as what it was trained on."""
    prompt, (ids, answers) = chat.encode_prompt(tokenizer, TURNS[:-1]), chat.encode_chat(tokenizer, TURNS)
    assert ids[: len(prompt)] == prompt
    assert all(answers[len(prompt) :])


CHATML = (  # as SmolLM2's instruction models have it
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def foreign(chain: Chain) -> Any:
    """A tokenizer with ChatML's template and its marks."""
    tokenizer = chain.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHATML
    tokenizer.model_max_length = 128  # its default system message alone fills the chain's context
    return tokenizer


@pytest.mark.parametrize("messages", TALKS)
def test_any_template_tells_what_is_an_answer(messages: list[dict[str, str]], tokenizer: Any, foreign: Any) -> None:
    """Of our own template the same as we know; of another each reply with its end token, and not what follows it."""
    assert chat.encode_by_template(tokenizer, messages) == chat.encode_chat(tokenizer, messages)
    ids, answers = chat.encode_chat(foreign, messages)
    assert ids == foreign.apply_chat_template(messages, return_dict=False)
    asked = foreign.decode([token for token, answer in zip(ids, answers, strict=True) if answer])
    assert asked == "".join(f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant")


def test_a_template_that_rewrites_earlier_turns_is_refused(foreign: Any) -> None:
    """As some do that leave an earlier answer's thoughts out: the beginning alone is another text."""
    foreign.chat_template = CHATML.replace("message['content']", "(message['content'] if loop.last else '...')")
    with pytest.raises(StageError, match="writes the first 3 of 5 turns otherwise alone"):
        chat.encode_chat(foreign, TURNS)
    foreign.chat_template = None
    with pytest.raises(StageError, match="no chat template"):
        chat.encode_chat(foreign, TURNS)


def test_a_model_with_a_template_of_its_own_is_tuned(model: Any, foreign: Any, chain: Chain, tmp_path: Path) -> None:
    """Through the stage; what is saved keeps that template."""
    model.resize_token_embeddings(len(foreign), mean_resizing=False)
    models.save(model, foreign, tmp_path / "foreign")
    settings = config("finetune", steps=20)
    job = chain.job("finetune", settings, tmp_path)
    job.inputs["model"] = tmp_path / "foreign"
    metrics = chain.run(job, settings)
    assert metrics["aside"] == {}
    assert metrics["heldout_loss_after"] < 0.5 * metrics["heldout_loss_before"]
    assert chat.load_tokenizer(job.outputs["model"]).chat_template == CHATML


# transformers' own: its Trainer hands `tokenizer` to itself under the older name
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_answer_loss_is_that_of_trl(model: Any, tokenizer: Any, chain: Chain, tmp_path: Path) -> None:
    """TRL's SFTTrainer, given the same questions and answers as text, encodes them as we do and finds the same loss."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    asked = [TURNS[:3], TURNS[1:3], [TURNS[3], TURNS[4]]]
    rows = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in asked]
    settings = SFTConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=3, completion_only_loss=True, bf16=False,
        use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    [batch] = trainer.get_train_dataloader()
    ours = [chat.encode_chat(tokenizer, messages) for messages in asked]
    assert sorted(map(tuple, batch["input_ids"].tolist())) == sorted(
        map(tuple, chat.pad([ids for ids, _ in ours], tokenizer.pad_token_id))
    )
    ours_loss = answering.mean_surprise(model, ours, tokenizer.pad_token_id, NUMERICS)
    assert ours_loss == pytest.approx(trainer.compute_loss(model, batch).item(), rel=1e-5)


def objective(chain: Chain, model: Any, encoded: list[Encoded], folder: Path, **changes: Any) -> Answers:
    """Return the objective of these conversations, all of them in each batch."""
    settings = config("finetune", **changes)
    named = [(f"talk-{number}", item) for number, item in enumerate(encoded)]
    job, fill = chain.job("finetune", settings, folder), chain.tokenizer().pad_token_id
    return Answers(model, named, len(named), settings.task, settings.mix, fill, job)


@pytest.mark.parametrize("packing", [None, 64])
def test_the_answer_loss_is_the_sum_over_all_answer_tokens(
    packing: int | None, model: Any, tokenizer: Any, chain: Chain, tmp_path: Path
) -> None:
    """Against each conversation by itself, without padding, position by position."""
    import torch

    batch = [chat.encode_chat(tokenizer, messages) for messages in TALKS]
    task = {"name": "chat", "answers": "all", "packing": packing}
    answers = objective(chain, model, batch, tmp_path, task=task)
    part = answers.draw(0, WHOLE)
    naive = []
    for ids, answered in batch:
        logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        naive += [-logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if answered[t]]
    assert answers.sums(part)["task"].item() == pytest.approx(sum(naive), rel=1e-5)
    assert part.targets == {"task": len(naive), "pretraining": MIX["batch"] * (MIX["window"] - 1)}
    assert part.tokens == sum(len(ids) for ids, _ in batch) + MIX["batch"] * MIX["window"]
    assert sorted(part.names) == [f"conversation talk-{number}" for number in range(len(batch))]


@pytest.mark.parametrize("packing", [None, 64])
def test_parts_of_a_batch_add_up_to_it(packing: int | None, model: Any, chain: Chain, tmp_path: Path) -> None:
    """Sums and targets of the parts are those of the whole, also where there are more parts than windows."""
    rows = tables.read(chain.path("data/validate/instructions"), "train").to_pylist()[:6]
    encoded = [chat.encode_chat(chain.tokenizer(), row["messages"]) for row in rows]
    task = {"name": "chat", "answers": "all", "packing": packing}
    answers = objective(chain, model, encoded, tmp_path, task=task)
    whole = answers.draw(3, WHOLE)
    parts = [answers.draw(3, Share(index, 6)) for index in range(6)]
    sums = [answers.sums(part) for part in parts]
    for term, value in answers.sums(whole).items():
        assert sum(part.targets[term] for part in parts) == whole.targets[term]
        assert sum(found[term].item() for found in sums) == pytest.approx(value.item(), rel=1e-5)
    assert sum(part.tokens for part in parts) == whole.tokens
    assert parts[5].targets["pretraining"] == 0
    assert sorted(name for part in parts for name in part.names) == sorted(whole.names)


def test_the_loss_is_the_task_plus_weighted_pretraining(chain: Chain, tmp_path: Path) -> None:
    """Row by row of the curves: loss = task loss + w x pretraining loss; with w = 0 there is no second term."""
    curves = {}
    for weight in (0.0, 0.25):
        settings = config("finetune", steps=4, mix={**MIX, "weight": weight})
        job = chain.job("finetune", settings, tmp_path / str(weight))
        chain.run(job, settings)
        with job.outputs["history"].open(newline="") as file:
            curves[weight] = list(csv.DictReader(file))
    assert set(curves[0.0][0]) == {"step", "loss", "gradient_norm", "learning_rate"}
    for row in curves[0.25]:
        expected = float(row["task_loss"]) + 0.25 * float(row["pretraining_loss"])
        assert float(row["loss"]) == pytest.approx(expected, abs=2e-6)


def test_the_pretraining_loss_is_that_of_pretraining(model: Any, chain: Chain, tmp_path: Path) -> None:
    """The mixed-in term is the mean surprise of each next token of the step's windows."""
    import torch

    answers = objective(chain, model, [([1, 2], [False, True])], tmp_path)
    part = answers.draw(2, WHOLE)
    mixture = Mixture(Split.open(chain.path("data/tokenize/shards") / "train"), 16, 4, MIXTURE, 1)
    ids = torch.from_numpy(mixture.batch(2))
    expected = model(input_ids=ids, labels=ids).loss
    assert answers.sums(part)["pretraining"].item() == pytest.approx(expected.item() * 4 * 15, rel=1e-5)


# Too much and too little


def rewritten(chain: Chain, folder: Path, content: str, count: int) -> Path:
    """Write an instruction table whose first replies are another text."""
    rows = tables.read(chain.path("data/validate/instructions")).to_pylist()
    for row in [row for row in rows if row["split"] == "train"][:count]:
        row["messages"][-1]["content"] = content
    tables.write(rows, folder, tables.schema("instructions"))
    return folder


def aside(job: Job) -> list[dict[str, Any]]:
    """Return the rows that a job kept aside."""
    return [json.loads(line) for line in job.outputs["aside"].read_text(encoding="utf-8").splitlines()]


def test_conversations_that_are_too_long_are_counted_and_named(chain: Chain, tmp_path: Path) -> None:
    """They are left out; the metrics say how many they were, and a list which."""
    settings = config("finetune", steps=1)
    job = chain.job("finetune", settings, tmp_path)
    job.inputs["instructions"] = rewritten(chain, tmp_path / "table", "word " * 200, 5)
    metrics = chain.run(job, settings)
    assert metrics["aside"] == {"too_long": 5}
    assert metrics["conversations"] == 48 - 5
    assert [row["id"] for row in aside(job)][:3] == ["France-0-plain", "France-0-warm", "France-0-curt"]
    assert {(row["reason"], row["used"], row["split"]) for row in aside(job)} == {("too_long", False, "train")}


def test_conversations_that_are_cut_are_trained_on_and_named(chain: Chain, tmp_path: Path) -> None:
    settings = config("finetune", steps=1, too_long="truncate")
    job = chain.job("finetune", settings, tmp_path)
    job.inputs["instructions"] = rewritten(chain, tmp_path / "table", "word " * 200, 5)
    metrics = chain.run(job, settings)
    assert (metrics["aside"], metrics["conversations"]) == ({"shortened": 5}, 48)
    assert len(aside(job)) == 5
    assert all(row["used"] for row in aside(job))


def test_conversations_with_an_empty_answer_are_kept_aside(chain: Chain, tmp_path: Path) -> None:
    settings = config("finetune", steps=1)
    job = chain.job("finetune", settings, tmp_path)
    job.inputs["instructions"] = rewritten(chain, tmp_path / "table", "  ", 2)
    metrics = chain.run(job, settings)
    assert (metrics["aside"], metrics["conversations"]) == ({"empty_answer": 2}, 46)
    assert [row["id"] for row in aside(job)] == ["France-0-plain", "France-0-warm"]


def test_no_conversation_that_fits_is_told(chain: Chain, tmp_path: Path) -> None:
    """The message says how many there were, why none is left, how long they may be, and which setting says so."""
    settings = config("finetune", steps=1)
    job = chain.job("finetune", settings, tmp_path)
    job.inputs["instructions"] = rewritten(chain, tmp_path / "table", "word " * 200, 48)
    sentence = (
        r"none of the 48 conversations .* \(48 too_long\)\. .* No more than 64 tokens are read \(tokenize\.context\)"
    )
    with pytest.raises(StageError, match=sentence):
        chain.run(job, settings)


def test_text_without_names_needs_no_statements(chain: Chain, tmp_path: Path) -> None:
    """Where the pretraining term has no weight, a corpus that cannot give it is no obstacle."""
    from tasks.common.text.shards import write_split

    settings = config("finetune", steps=1, mix={**MIX, "weight": 0.0})
    job = chain.job("finetune", settings, tmp_path)
    write_split(tmp_path / "shards/train", [], 420)
    job.inputs["shards"] = tmp_path / "shards"
    assert chain.run(job, settings)["loss"] > 0


# Held out


def test_the_heldout_loss_is_told_before_and_after(chain: Chain, tmp_path: Path) -> None:
    """Before: the base model's loss on drawn held-out answers. Tuning lowers it; without any there is none."""
    settings = config("finetune", heldout=7, steps=30)
    job = chain.job("finetune", settings, tmp_path)
    metrics = chain.run(job, settings)
    tokenizer, base = chain.tokenizer(), models.load_decoder(job.inputs["model"], NUMERICS)
    rows = tables.read(job.inputs["instructions"], "heldout").to_pylist()
    named = [(row["id"], chat.encode_chat(tokenizer, row["messages"])) for row in rows]
    chosen, fill = finetune.drawn(named, 7, job.seed), tokenizer.pad_token_id
    assert metrics["heldout_conversations"] == len(chosen) == 7
    assert metrics["heldout_loss_before"] == answering.mean_surprise(base, chosen, fill, NUMERICS)
    assert metrics["heldout_loss_after"] < metrics["heldout_loss_before"]
    assert answering.mean_surprise(base, [], fill, NUMERICS) is None
    assert finetune.drawn(named, 100, 1) == [encoded for _, encoded in named]


# Settings that do not go together


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": finetune.ENCODER}, "task chat needs the decoder"),
        ({"task": {"name": "regression"}}, "reads no pretraining text: set mix.weight to 0"),
        ({"task": {"name": "ranking"}}, "'chat', 'classification', 'regression'"),
        ({"task": {"name": "regression", "packing": 64}}, "Extra inputs"),
        ({"model": finetune.ENCODER, "method": {"name": "adapter", "width": 4}}, "take method lora for the encoder"),
        ({"task": {"name": "regression"}, "method": QLORA}, "qlora trains the task chat only"),
    ],
)
def test_what_does_not_go_together_is_told(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        config("finetune", **changes)


def test_the_settings_in_the_documentation_are_sound() -> None:
    """Every YAML block of docs/finetune.md is a part of this section."""
    from ruamel.yaml import YAML

    default = read_params(ROOT / "profiles/default.yaml")["finetune"]
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/finetune.md").read_text(encoding="utf-8"), re.S)
    shown = [YAML(typ="safe", pure=True).load(block) for block in blocks]
    for changes in shown:
        finetune.Config.model_validate({**default, **changes})
    assert {changes["method"]["name"] for changes in shown if "method" in changes} == {
        "top",
        "lora",
        "qlora",
        "adapter",
    }
    assert {changes["task"]["name"] for changes in shown if "task" in changes} == {
        "chat",
        "classification",
        "regression",
    }
