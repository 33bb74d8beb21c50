"""Fine-tuning: conversations as the template writes them, loss on the answers alone, methods that keep their word."""

import csv
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks import finetune
from tasks.common import chat, models, tables
from tasks.common.shards import Mixture, Split
from tasks.common.stage import StageError
from tests.training_fixtures import MIX, NUMERICS, Chain, chain, config

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


def method(**settings: Any) -> Any:
    """Return a method's settings, checked."""
    return config("finetune", method=settings).method


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
    loss, _ = finetune.answer_loss(model.eval(), tokenizer, ours, chain.job("finetune", config("finetune"), tmp_path))
    assert loss.item() == pytest.approx(trainer.compute_loss(model, batch).item(), rel=1e-5)


def test_the_answer_loss_is_the_mean_over_all_answer_tokens(
    model: Any, tokenizer: Any, chain: Chain, tmp_path: Path
) -> None:
    """Against each conversation by itself, without padding, position by position."""
    import torch

    batch = [chat.encode_chat(tokenizer, messages) for messages in TALKS]
    job = chain.job("finetune", config("finetune"), tmp_path)
    loss, read = finetune.answer_loss(model, tokenizer, batch, job)
    naive = []
    for ids, answers in batch:
        logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        naive += [-logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if answers[t]]
    assert loss.item() == pytest.approx(sum(naive) / len(naive), rel=1e-5)
    assert read == sum(len(ids) for ids, _ in batch)


def test_the_loss_is_the_task_plus_weighted_pretraining(chain: Chain, tmp_path: Path) -> None:
    """Row by row of the curves: loss = task loss + w x pretraining loss; with w = 0 there is no second term."""
    curves = {}
    for weight in (0.0, 0.25):
        settings = config("finetune", steps=4, mix={**MIX, "weight": weight})
        job = chain.job("finetune", settings, tmp_path / str(weight))
        chain.run(job, settings)
        with job.outputs["history"].open(newline="") as file:
            curves[weight] = list(csv.DictReader(file))
    assert all(row["loss"] == row["task_loss"] for row in curves[0.0])
    assert "pretraining_loss" not in curves[0.0][0]
    for row in curves[0.25]:
        expected = float(row["task_loss"]) + 0.25 * float(row["pretraining_loss"])
        assert float(row["loss"]) == pytest.approx(expected, abs=2e-6)


def test_the_pretraining_loss_is_that_of_pretraining(model: Any, chain: Chain, tmp_path: Path) -> None:
    """The mixed-in term is the mean surprise of each next token of the step's windows."""
    import torch

    mixture = Mixture(Split.open(chain.path("data/tokenize/shards") / "train"), 16, 4, 0.75, 1)
    loss, read = finetune.window_loss(model, mixture, 2, chain.job("finetune", config("finetune"), tmp_path))
    ids = torch.from_numpy(mixture.batch(2))
    expected = model(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert read == ids.numel()


# Methods


def weights(path: Path) -> dict[str, Any]:
    """Return a saved model's tensors by name."""
    from safetensors.torch import load_file

    return dict(load_file(path / "model.safetensors"))


def changed_weights(settings: dict[str, Any], chain: Chain, folder: Path) -> dict[str, Any]:
    """Return what a few steps of a method added to each of the base model's weights."""
    tiny = config("finetune", method=settings, steps=4)
    job = chain.job("finetune", tiny, folder)
    chain.run(job, tiny)
    before, after = weights(chain.path("data/pretrain/clm/model")), weights(job.outputs["model"])
    assert set(before) == set(after)
    return {name: after[name] - before[name] for name in before}


def test_full_trains_every_weight(chain: Chain, tmp_path: Path) -> None:
    """No weight of the model stays as it was."""
    assert all(change.any() for change in changed_weights({"name": "full"}, chain, tmp_path).values())


def test_top_leaves_the_blocks_beneath_untouched(chain: Chain, tmp_path: Path) -> None:
    """The last block, the final norm and the head (with the embeddings tied to it) move; nothing else, bit for bit."""
    changes = changed_weights({"name": "top", "layers": 1}, chain, tmp_path)
    moved = {name for name, change in changes.items() if change.any()}
    assert moved == {
        name for name in changes if name.startswith(("model.layers.1.", "model.norm.", "model.embed_tokens."))
    }


def test_lora_adds_a_low_rank_to_linear_layers(chain: Chain, tmp_path: Path) -> None:
    """Each linear layer of a block has changed by a matrix of at most the rank; embeddings and norms have not."""
    import torch

    changes = changed_weights({"name": "lora", "rank": 3, "alpha": 6}, chain, tmp_path)
    for name, change in changes.items():
        if "_proj" in name:
            values = torch.linalg.svdvals(change)
            assert values[0] > 0
            assert values[3] < 1e-4 * values[0]  # float32 rounding of the sum with the weight
        else:
            assert not change.any()


def test_merged_updates_compute_what_they_did_beside_the_weights(model: Any) -> None:
    """A model with its updates merged is a plain one with the same logits."""
    import torch

    settings = method(name="lora", rank=4, alpha=8)
    trained = finetune.apply_method(model, settings)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:  # these begin at 0, so that an update changes nothing at first
            parameter.data.normal_(std=0.05, generator=generator)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        beside: Any = trained.eval()
        expected = beside(input_ids=ids).logits
        merged = finetune.merge(trained, settings)
        found = merged(input_ids=ids).logits
        merged_names = {name for name, _ in merged.named_parameters()}
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # sums of 96 float32 products in another order
    assert not any("lora" in name for name in merged_names)
    assert type(merged).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "prefix"}, "'full', 'top', 'lora'"),
        ({"name": "lora", "rank": 4}, "alpha"),
        ({"name": "full", "rank": 4}, "Extra inputs"),
        ({"name": "top", "layers": 0}, "greater than or equal to 1"),
    ],
)
def test_an_unknown_method_is_told_with_the_choices(settings: dict[str, Any], sentence: str) -> None:
    """A method that does not exist, or another's setting, is an error that names what there is."""
    with pytest.raises(ValidationError, match=sentence):
        method(**settings)


def test_more_top_layers_than_there_are_is_told(model: Any) -> None:
    """The message holds both numbers."""
    with pytest.raises(StageError, match="layers is 5, but the model has 2 blocks"):
        finetune.apply_method(model, method(name="top", layers=5))


# Too much and too little


def rewritten(chain: Chain, folder: Path, content: str, count: int) -> Path:
    """Write an instruction table whose first replies are another text."""
    rows = tables.read(chain.path("data/validate/instructions")).to_pylist()
    for row in [row for row in rows if row["split"] == "train"][:count]:
        row["messages"][-1]["content"] = content
    tables.write(rows, folder, tables.schema("instructions"))
    return folder


def test_conversations_that_are_too_long_are_counted(chain: Chain, tmp_path: Path) -> None:
    """They are left out, never cut, and the metrics say how many they were."""
    settings = config("finetune", steps=1)
    job = chain.job("finetune", settings, tmp_path)
    job.inputs["instructions"] = rewritten(chain, tmp_path / "table", "word " * 200, 5)
    metrics = chain.run(job, settings)
    assert metrics["too_long"] == 5
    assert metrics["conversations"] == 48 - 5


def test_no_conversation_that_fits_is_told(chain: Chain, tmp_path: Path) -> None:
    """The message says how many there were, how long they may be, and which setting to change."""
    settings = config("finetune", steps=1)
    job = chain.job("finetune", settings, tmp_path)
    job.inputs["instructions"] = rewritten(chain, tmp_path / "table", "word " * 200, 48)
    with pytest.raises(StageError, match=r"none of the 48 conversations fits into 64 tokens; raise tokenize\.context"):
        chain.run(job, settings)


def test_text_without_names_needs_no_statements(chain: Chain, tmp_path: Path) -> None:
    """Where the pretraining term has no weight, a corpus that cannot give it is no obstacle."""
    from tasks.common.shards import write_split

    settings = config("finetune", steps=1, mix={**MIX, "weight": 0.0})
    job = chain.job("finetune", settings, tmp_path)
    write_split(tmp_path / "shards/train", [], 420)
    job.inputs["shards"] = tmp_path / "shards"
    assert chain.run(job, settings)["task_loss"] > 0
