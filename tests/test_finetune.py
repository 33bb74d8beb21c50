"""Fine-tuning on conversations: encoding by the chat template, loss on answers only, and reports of rejected rows."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common import tables
from tasks.common.defaults import read_settings
from tasks.common.harness.job import Job, StageError
from tasks.common.modelling import models
from tasks.common.text import chat
from tasks.common.text.mixtures import Mixture
from tasks.common.text.shards import Split
from tasks.common.training.loop import FULL_BATCH, Shard
from tasks.finetune import stage as finetune
from tasks.finetune.objectives.chat import ChatObjective, mean_nll
from tasks.finetune.packing import Encoded
from tests.conftest import ROOT
from tests.training_fixtures import MIXTURE, NUMERICS, PRETRAINING_MIX, QLORA, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

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
    return models.load_decoder(chain.path("data/pretrain/causal/model"), NUMERICS)


# Conversations


@pytest.mark.parametrize("messages", TALKS)
def test_a_conversation_is_what_the_template_writes(messages: list[dict[str, str]], tokenizer: Any) -> None:
    """Our encoding, which also gives the answer mask, has the ids of the served chat template."""
    ids, answers = chat.encode_chat(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert len(answers) == len(ids)
    written = "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)
    assert tokenizer.decode(ids) == f"<|bos|>{written}"


@pytest.mark.parametrize("messages", TALKS)
def test_the_loss_covers_answers_and_their_end_tokens(messages: list[dict[str, str]], tokenizer: Any) -> None:
    """Questions, roles and system messages are not in the loss; every reply with its end token is."""
    ids, answers = chat.encode_chat(tokenizer, messages)
    trained_text = tokenizer.decode([token for token, answer in zip(ids, answers, strict=True) if answer])
    assert trained_text == "".join(f"{m['content']}<|end|>" for m in messages if m["role"] == "assistant")


def test_a_prompt_is_a_conversation_up_to_the_reply(tokenizer: Any) -> None:
    """A prompt is a prefix of the training sequence."""
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
    """A tokenizer with ChatML's template and control tokens."""
    tokenizer = chain.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHATML
    tokenizer.model_max_length = 128  # its default system message alone fills the chain's context
    return tokenizer


@pytest.mark.parametrize("messages", TALKS)
def test_any_template_gives_the_answer_mask(messages: list[dict[str, str]], tokenizer: Any, foreign: Any) -> None:
    """For our own template the known one; for another each reply with its end token, and nothing after it."""
    assert chat.encode_by_template(tokenizer, messages) == chat.encode_chat(tokenizer, messages)
    ids, answers = chat.encode_chat(foreign, messages)
    assert ids == foreign.apply_chat_template(messages, return_dict=False)
    trained_text = foreign.decode([token for token, answer in zip(ids, answers, strict=True) if answer])
    assert trained_text == "".join(f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant")


def test_template_that_rewrites_earlier_turns_is_rejected(foreign: Any) -> None:
    """Some templates drop the reasoning of earlier answers, so a prefix of a conversation is another text."""
    foreign.chat_template = CHATML.replace("message['content']", "(message['content'] if loop.last else '...')")
    with pytest.raises(StageError, match="renders the first 3 of 5 turns differently alone"):
        chat.encode_chat(foreign, TURNS)
    foreign.chat_template = None
    with pytest.raises(StageError, match="no chat template"):
        chat.encode_chat(foreign, TURNS)


def test_model_with_own_chat_template_is_fine_tuned(model: Any, foreign: Any, chain: Chain, tmp_path: Path) -> None:
    """Through the stage; the saved model keeps that template."""
    model.resize_token_embeddings(len(foreign), mean_resizing=False)
    model.config.max_position_embeddings = 256  # its tokenizer needs more tokens for the same texts
    models.save(model, foreign, tmp_path / "foreign")
    settings = config("finetune@chat", steps=20)
    job = chain.job("finetune@chat", settings, tmp_path)
    job.inputs["model"] = tmp_path / "foreign"
    metrics = chain.run(job, settings)
    assert metrics["rejected"] == {}
    assert metrics["heldout_loss_after"] < 0.5 * metrics["heldout_loss_before"]
    assert chat.load_tokenizer(job.outputs["model"]).chat_template == CHATML


# transformers' own: its Trainer hands `tokenizer` to itself under the older name
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_answer_loss_is_that_of_trl(model: Any, tokenizer: Any, chain: Chain, tmp_path: Path) -> None:
    """TRL's SFTTrainer has the same token ids and the same loss on the same conversations."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    conversations = [TURNS[:3], TURNS[1:3], [TURNS[3], TURNS[4]]]
    rows = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in conversations]
    settings = SFTConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=3, completion_only_loss=True, bf16=False,
        use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    [batch] = trainer.get_train_dataloader()
    ours = [chat.encode_chat(tokenizer, messages) for messages in conversations]
    assert sorted(map(tuple, batch["input_ids"].tolist())) == sorted(
        map(tuple, chat.pad([ids for ids, _ in ours], tokenizer.pad_token_id))
    )
    ours_loss = mean_nll(model, ours, tokenizer.pad_token_id, NUMERICS)
    assert ours_loss == pytest.approx(trainer.compute_loss(model, batch).item(), rel=1e-5)


def objective(chain: Chain, model: Any, encoded: list[Encoded], folder: Path, **changes: Any) -> ChatObjective:
    """Return the objective of these conversations, all of them in each batch."""
    settings = config("finetune@chat", **changes)
    named = [(f"talk-{number}", item) for number, item in enumerate(encoded)]
    job, pad_id = chain.job("finetune@chat", settings, folder), chain.tokenizer().pad_token_id
    return ChatObjective(model, named, len(named), settings.task, settings.pretraining_mix, pad_id, job)


@pytest.mark.parametrize("packing", [None, 64])
def test_the_answer_loss_is_the_sum_over_all_answer_tokens(
    packing: int | None, model: Any, tokenizer: Any, chain: Chain, tmp_path: Path
) -> None:
    """Against each conversation alone, without padding, position by position."""
    import torch

    batch = [chat.encode_chat(tokenizer, messages) for messages in TALKS]
    task = {"name": "chat", "answers": "all", "packing": packing}
    answers = objective(chain, model, batch, tmp_path, task=task)
    part = answers.draw(0, FULL_BATCH)
    naive = []
    for ids, answer_mask in batch:
        logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        naive += [-logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if answer_mask[t]]
    assert answers.loss_sums(part)["task"].item() == pytest.approx(sum(naive), rel=1e-5)
    assert part.target_counts == {
        "task": len(naive),
        "pretraining": PRETRAINING_MIX["batch"] * (PRETRAINING_MIX["window"] - 1),
    }
    assert part.tokens == sum(len(ids) for ids, _ in batch) + PRETRAINING_MIX["batch"] * PRETRAINING_MIX["window"]
    assert sorted(part.names) == [f"conversation talk-{number}" for number in range(len(batch))]


@pytest.mark.parametrize("packing", [None, 64])
def test_parts_of_a_batch_add_up_to_it(packing: int | None, model: Any, chain: Chain, tmp_path: Path) -> None:
    """Sums and target counts of the shards add up to those of the batch, even with more shards than windows."""
    rows = tables.read(chain.path("data/validate/instructions"), "train").to_pylist()[:6]
    encoded = [chat.encode_chat(chain.tokenizer(), row["messages"]) for row in rows]
    task = {"name": "chat", "answers": "all", "packing": packing}
    answers = objective(chain, model, encoded, tmp_path, task=task)
    whole = answers.draw(3, FULL_BATCH)
    parts = [answers.draw(3, Shard(index, 6)) for index in range(6)]
    sums = [answers.loss_sums(part) for part in parts]
    for term, value in answers.loss_sums(whole).items():
        assert sum(part.target_counts[term] for part in parts) == whole.target_counts[term]
        assert sum(part_sums[term].item() for part_sums in sums) == pytest.approx(value.item(), rel=1e-5)
    assert sum(part.tokens for part in parts) == whole.tokens
    assert parts[5].target_counts["pretraining"] == 0
    assert sorted(name for part in parts for name in part.names) == sorted(whole.names)


def test_the_loss_is_the_task_plus_weighted_pretraining(chain: Chain, tmp_path: Path) -> None:
    """Every row of the history: loss = task loss + w x pretraining loss; with w = 0 there is no second term."""
    curves = {}
    for weight in (0.0, 0.25):
        settings = config("finetune@chat", steps=4, pretraining_mix={**PRETRAINING_MIX, "weight": weight})
        job = chain.job("finetune@chat", settings, tmp_path / str(weight))
        chain.run(job, settings)
        with job.outputs["history"].open(newline="") as file:
            curves[weight] = list(csv.DictReader(file))
    assert set(curves[0.0][0]) == {"step", "loss", "gradient_norm", "learning_rate"}
    for row in curves[0.25]:
        expected = float(row["task_loss"]) + 0.25 * float(row["pretraining_loss"])
        assert float(row["loss"]) == pytest.approx(expected, abs=2e-6)


def test_the_pretraining_loss_is_that_of_pretraining(model: Any, chain: Chain, tmp_path: Path) -> None:
    """It is the negative log-likelihood of each next token of the step's windows."""
    import torch

    answers = objective(chain, model, [([1, 2], [False, True])], tmp_path)
    part = answers.draw(2, FULL_BATCH)
    mixture = Mixture(Split.open(chain.path("data/tokenize/shards") / "train"), 16, 4, MIXTURE, 1)
    ids = torch.from_numpy(mixture.batch(2))
    expected = model(input_ids=ids, labels=ids).loss
    assert answers.loss_sums(part)["pretraining"].item() == pytest.approx(expected.item() * 4 * 15, rel=1e-5)


# Too long and empty conversations


def rewrite_replies(chain: Chain, folder: Path, content: str, count: int) -> Path:
    """Write an instructions table in which the first `count` training replies are replaced."""
    rows = tables.read(chain.path("data/validate/instructions")).to_pylist()
    for row in [row for row in rows if row["split"] == "train"][:count]:
        row["messages"][-1]["content"] = content
    tables.write(rows, folder, tables.schema("instructions"))
    return folder


def rejected_rows(job: Job) -> list[dict[str, Any]]:
    """Return the rows that a job rejected or shortened."""
    return [json.loads(line) for line in job.outputs["rejected"].read_text(encoding="utf-8").splitlines()]


def test_conversations_that_are_too_long_are_counted_and_named(chain: Chain, tmp_path: Path) -> None:
    """They are rejected; the metrics have their number and a file lists them."""
    settings = config("finetune@chat", steps=1)
    job = chain.job("finetune@chat", settings, tmp_path)
    job.inputs["instructions"] = rewrite_replies(chain, tmp_path / "table", "word " * 200, 5)
    metrics = chain.run(job, settings)
    assert metrics["rejected"] == {"too_long": 5}
    assert metrics["conversations"] == 48 - 5
    assert [row["id"] for row in rejected_rows(job)][:3] == ["France-0-plain", "France-0-warm", "France-0-curt"]
    assert {(row["reason"], row["used"], row["split"]) for row in rejected_rows(job)} == {("too_long", False, "train")}


def test_max_tokens_below_the_context_rejects_longer_conversations(chain: Chain, tmp_path: Path) -> None:
    settings = config("finetune@chat", steps=1, max_tokens=40)
    job = chain.job("finetune@chat", settings, tmp_path)
    job.inputs["instructions"] = rewrite_replies(chain, tmp_path / "table", "word " * 10, 5)
    assert chain.run(job, settings)["rejected"] == {"too_long": 5}


def test_conversations_that_are_cut_are_trained_on_and_named(chain: Chain, tmp_path: Path) -> None:
    settings = config("finetune@chat", steps=1, too_long="truncate")
    job = chain.job("finetune@chat", settings, tmp_path)
    job.inputs["instructions"] = rewrite_replies(chain, tmp_path / "table", "word " * 200, 5)
    metrics = chain.run(job, settings)
    assert (metrics["rejected"], metrics["conversations"]) == ({"shortened": 5}, 48)
    assert len(rejected_rows(job)) == 5
    assert all(row["used"] for row in rejected_rows(job))


def test_conversations_with_an_empty_answer_are_rejected(chain: Chain, tmp_path: Path) -> None:
    settings = config("finetune@chat", steps=1)
    job = chain.job("finetune@chat", settings, tmp_path)
    job.inputs["instructions"] = rewrite_replies(chain, tmp_path / "table", "  ", 2)
    metrics = chain.run(job, settings)
    assert (metrics["rejected"], metrics["conversations"]) == ({"empty_answer": 2}, 46)
    assert [row["id"] for row in rejected_rows(job)] == ["France-0-plain", "France-0-warm"]


def test_no_usable_conversation_is_an_error(chain: Chain, tmp_path: Path) -> None:
    """The message has the number of rows, the reasons, the limit, and the setting that sets it."""
    settings = config("finetune@chat", steps=1)
    job = chain.job("finetune@chat", settings, tmp_path)
    job.inputs["instructions"] = rewrite_replies(chain, tmp_path / "table", "word " * 200, 48)
    sentence = (
        r"none of the 48 training conversations .* \(48 too_long\)\. .* "
        r"The limit is 64 tokens \(max_tokens, or the model's context\)"
    )
    with pytest.raises(StageError, match=sentence):
        chain.run(job, settings)


def test_pretraining_mix_without_names_needs_no_statements(chain: Chain, tmp_path: Path) -> None:
    """With weight 0 the corpus need not supply pretraining text."""
    from tasks.common.text.shards import write_split

    settings = config("finetune@chat", steps=1, pretraining_mix={**PRETRAINING_MIX, "weight": 0.0})
    job = chain.job("finetune@chat", settings, tmp_path)
    write_split(tmp_path / "shards/train", [], 420)
    job.inputs["shards"] = tmp_path / "shards"
    assert chain.run(job, settings)["loss"] > 0


# Held out


def test_the_heldout_loss_is_reported_before_and_after(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before: the base model's loss on sampled held-out answers. Fine-tuning lowers it; without any it is None."""
    settings = config("finetune@chat", heldout=7, steps=30)
    job = chain.job("finetune@chat", settings, tmp_path)
    metrics = chain.run(job, settings)
    assert capsys.readouterr().err.count("finetune@chat held-out rows: 100%") == 2
    tokenizer, base = chain.tokenizer(), models.load_decoder(job.inputs["model"], NUMERICS)
    rows = tables.read(job.inputs["instructions"], "heldout").to_pylist()
    named = [(row["id"], chat.encode_chat(tokenizer, row["messages"])) for row in rows]
    chosen, pad_id = finetune.sample_conversations(named, 7, job.seed), tokenizer.pad_token_id
    assert metrics["heldout_conversations"] == len(chosen) == 7
    assert metrics["heldout_loss_before"] == mean_nll(base, chosen, pad_id, NUMERICS)
    assert metrics["heldout_loss_after"] < metrics["heldout_loss_before"]
    assert mean_nll(base, [], pad_id, NUMERICS) is None
    assert finetune.sample_conversations(named, 100, 1) == [encoded for _, encoded in named]


# Incompatible settings


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"task": {"name": "regression"}}, "uses no pretraining text: set pretraining_mix.weight to 0"),
        ({"task": {"name": "ranking"}}, "'chat', 'classification', 'regression'"),
        ({"task": {"name": "regression", "packing": 64}}, "Extra inputs"),
        ({"task": {"name": "regression"}, "method": QLORA}, "qlora supports only the task chat"),
    ],
)
def test_incompatible_settings_are_rejected(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        config("finetune@chat", **changes)


def test_the_settings_in_the_documentation_are_sound() -> None:
    """Every YAML block of docs/guides/fine-tuning.md is valid as a part of an entry, or has entries that are."""
    from ruamel.yaml import YAML

    default = {**read_settings(ROOT / "profiles/default.yaml")["finetune"]["chat"], "pretraining_mix": {}}
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/guides/fine-tuning.md").read_text(encoding="utf-8"), re.S)
    examples = [YAML(typ="safe", pure=True).load(block) for block in blocks]
    for changes in [entry for example in examples for entry in example.get("finetune", {"": example}).values()]:
        finetune.Config.model_validate({**default, **changes})
    assert {changes["method"]["name"] for changes in examples if "method" in changes} == {
        "top_layers",
        "lora",
        "qlora",
        "adapter",
    }
    assert {changes["task"]["name"] for changes in examples if "task" in changes} == {
        "chat",
        "classification",
        "regression",
    }
