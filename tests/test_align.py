"""PPO's options and the stage: a shared backbone, the saved model, and that training raises the reward."""

import csv
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tasks.align import estimates
from tasks.align import stage as align
from tasks.align.proximal import PpoTrainer
from tasks.common import tables
from tasks.common.harness.job import StageError
from tasks.common.modelling import models
from tests.ppo_fixtures import KL, iterate, trainer, tuned_logp
from tests.training_fixtures import LORA, NUMERICS, OPTIMIZER, PRETRAINING_MIX, STABLE_OPTIMIZER, Chain, chain, config

__all__ = ["chain", "trainer"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain


# Shared backbone and training options


def test_with_low_rank_updates_one_model_is_policy_and_reference(trainer: Callable[..., PpoTrainer]) -> None:
    """With adapters disabled the model is still the tuned one, while policy and values train."""
    import torch

    ours, tuned = trainer(method=LORA), trainer()
    assert ours.policy.reference is None
    rollout, figures = ours.sample(0)
    assert figures["kl"] == 0
    for _ in range(3):
        ours.update(rollout, np.arange(12), 1e-2)
    width = rollout.reply_mask.shape[1]
    with torch.no_grad():
        for part in ours.policy.parts(rollout.ids, rollout.mask, width):
            plain = tuned.policy.forward(part)[0]
            torch.testing.assert_close(ours.policy.reference_logp(part), plain, atol=1e-5, rtol=0)
            assert (ours.policy.forward(part)[0] - plain).abs().max() > 1e-2
    frozen = {name: value for name, value in ours.policy.model.named_parameters() if not value.requires_grad}
    assert len(frozen) > 10
    assert all("lora_" in name or "value_head" in name for name in ours.policy.weights())


def test_frozen_states_are_computed_once(trainer: Callable[..., PpoTrainer]) -> None:
    """Policy, values and reference start from the frozen states; an update equals that of a policy without them."""
    import torch

    sides = [trainer(method={"name": "top_layers", "layers": 1}, optimizer=STABLE_OPTIMIZER) for _ in range(2)]
    plain = sides[1].policy
    plain.halves, plain.reference = None, trainer().policy.reference
    rollouts, references = [], []
    for side in sides:
        rollout, figures = side.sample(0)
        references.append(tuned_logp(side, rollout))
        assert figures["kl"] == pytest.approx(0, abs=1e-5)
        for rows in (np.arange(7), np.arange(5, 12)):
            side.update(rollout, rows, 1e-2)
        rollouts.append(rollout)
    assert (rollouts[0].ids == rollouts[1].ids).all()
    torch.testing.assert_close(rollouts[0].values, rollouts[1].values, atol=1e-6, rtol=0)
    torch.testing.assert_close(references[0], references[1], atol=1e-5, rtol=0)
    weights = sides[0].policy.weights()
    for name, weight in sides[1].policy.weights().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=0)
    assert {name.split(".")[2] for name in weights if ".layers." in name} == {"1"}
    assert not any("embed" in name or "lm_head" in name for name in weights)  # the head is tied to the embeddings
    reference = sides[0].policy.reference
    assert reference is not None
    assert reference.get_input_embeddings().weight is sides[0].policy.model.get_input_embeddings().weight


def test_saved_policy_is_a_plain_model(trainer: Callable[..., PpoTrainer], chain: Chain) -> None:
    """Adapters are merged, value head and critic removed, and the logits are the policy's."""
    import torch

    for changes in ({"method": LORA}, {"values": "separate"}, {"method": {"name": "top_layers", "layers": 1}}):
        ours = trainer(**changes)
        rollout, _ = ours.sample(0)
        ours.update(rollout, np.arange(12), 1e-2)
        (part, *_) = ours.policy.parts(rollout.ids, rollout.mask, rollout.reply_mask.shape[1], rollout.states)
        with torch.no_grad():
            before = ours.policy.forward(part)[0]
            plain: Any = ours.policy.merged_model(chain.path("data/finetune/chat/model"), ours.policy.model)
            logits = plain(**part.model_inputs).logits[:, -part.width - 1 : -1]
        after = torch.log_softmax(logits, -1).gather(2, part.ids[:, -part.width :, None])[..., 0]
        torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
        tuned = models.load_decoder(chain.path("data/finetune/chat/model"), NUMERICS)
        assert plain.state_dict().keys() == tuned.state_dict().keys()


def test_separate_critic_has_its_own_model(trainer: Callable[..., PpoTrainer]) -> None:
    """The value loss alone changes the critic and not the policy."""
    ours = trainer(values="separate", vf_coef=1.0, optimizer={**OPTIMIZER, "weight_decay": 0.0})
    rollout, _ = ours.sample(0)
    rollout.advantages *= 0.0
    before = ours.policy.weights()
    for _ in range(2):  # the value head starts at 0 and passes no gradient on
        ours.update(rollout, np.arange(12), 1e-3)
    changed = {name for name, value in ours.policy.weights().items() if (value != before[name]).any()}
    assert {name.split(".")[0] for name in changed} == {"critic", "value_head"}


@pytest.mark.parametrize("values", ["shared", "separate"])
def test_critic_warmup_trains_only_the_values(values: str, trainer: Callable[..., PpoTrainer]) -> None:
    """Not even weight decay moves the policy during the warm-up."""
    decay = {**OPTIMIZER, "weight_decay": 0.1}
    ours = trainer(
        critic_warmup_iterations=2, values=values, vf_coef=1.0, optimizer=decay, ptx={**PRETRAINING_MIX, "weight": 1.0}
    )
    before = ours.policy.weights()
    for iteration in range(2):  # a separate critic changes only after its head, which starts at 0
        iterate(ours, iteration)
    changed = {name.split(".")[0] for name, value in ours.policy.weights().items() if (value != before[name]).any()}
    assert changed == ({"value_head"} if values == "shared" else {"value_head", "critic"})
    iterate(ours, 2)
    assert all((value != before[name]).any() for name, value in ours.policy.weights().items())


def test_an_iteration_stops_early_at_the_kl_limit(trainer: Callable[..., PpoTrainer]) -> None:
    """The KL is to the sampling policy, and 0 before the first update."""
    unlimited, limited = (trainer(epochs=4, minibatch=4, kl={**KL, "stop": stop}) for stop in (None, 1e-4))
    assert iterate(unlimited, 0, 1e-3)["updates"] == 12
    assert 2 <= iterate(limited, 0, 1e-3)["updates"] < 12


def test_the_entropy_bonus_keeps_the_policy_uncertain(trainer: Callable[..., PpoTrainer]) -> None:
    """With the bonus alone, the entropy rises."""
    ours = trainer(entropy_coef=1.0, vf_coef=0.0)
    rollout, figures = ours.sample(0)
    rollout.advantages *= 0.0
    for _ in range(3):
        metrics = ours.update(rollout, np.arange(12), 1e-3)
    assert metrics["update_entropy"] > figures["entropy"] + 0.02


def test_ema_weights_follow_the_formula(trainer: Callable[..., PpoTrainer]) -> None:
    """average = a x average + (1 - a) x weights after each update."""
    import torch

    ours = trainer(ema_decay=0.75)
    expected = ours.policy.weights()
    for _ in range(3):
        rollout, _ = ours.sample(0)
        ours.update(rollout, np.arange(12), 1e-3)
        expected = {name: 0.75 * expected[name] + 0.25 * value for name, value in ours.policy.weights().items()}
    for name, value in expected.items():
        torch.testing.assert_close(ours.ema_weights[name], value)


def test_token_rewards_are_whitened_on_request(trainer: Callable[..., PpoTrainer]) -> None:
    """They have variance 1 and keep their mean; with lambda = 1 the returns are sums of whitened rewards."""
    import torch

    ours = trainer(gamma=1.0, gae_lambda=1.0, whiten_rewards=True)
    rollout, _ = ours.sample(0)
    rewards = rollout.returns - estimates.gae(rollout.returns * 0, rollout.values, rollout.reply_mask, 1.0, 1.0)[1]
    tokens = torch.cat([rewards[:, :-1] - rewards[:, 1:], rewards[:, -1:]], 1)[rollout.reply_mask]
    assert tokens.var(unbiased=False).item() == pytest.approx(1.0, rel=0.02)


# Whole runs


def test_ppo_learns_the_rewarded_tone(trainer: Callable[..., PpoTrainer]) -> None:
    """One of three tones is rewarded; its share rises from a third of the replies to most of them."""
    ours = trainer(
        lambda text: 2.0 if "obviously" in text else -2.0, episodes=32, minibatch=16,
        optimizer={**OPTIMIZER, "weight_decay": 0.0},
    )  # fmt: skip
    rewards = [iterate(ours, iteration, rate=1e-3)["reward"] for iteration in range(10)]
    assert rewards[0] < 0.5
    assert np.mean(rewards[-3:]) > rewards[0] + 1.0


def test_prompts_are_the_training_questions_once_each(chain: Chain) -> None:
    """No held-out question is used, and a question that occurs in three tones counts once."""
    tokenizer, table = chain.tokenizer(), tables.read(chain.path("data/validate/instructions")).to_pylist()
    prompts = align.training_questions(tokenizer, table, 16)
    questions = {tokenizer.decode(prompt.ids) for prompt in prompts}
    assert len(prompts) == len(questions) == 2 * 8
    assert not any("Kenya" in text or "Peru" in text for text in questions)
    assert all(text.endswith("<|end|><|assistant|>") for text in questions)
    rows = {row["id"]: row for row in table}
    assert all(rows[prompt.id]["messages"][:-1] == list(prompt.messages) for prompt in prompts)
    assert align.training_questions(tokenizer, table[::-1], 16) == prompts
    with pytest.raises(StageError, match="contain no training question"):
        align.training_questions(tokenizer, [row for row in table if row["split"] == "heldout"], 16)


def test_questions_without_room_for_a_reply_are_dropped(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    """Positions beyond the context are not available."""
    tokenizer, table = chain.tokenizer(), tables.read(chain.path("data/validate/instructions")).to_pylist()
    longest, row = tokenizer.model_max_length, next(row for row in table if row["split"] == "train")
    long = {**row, "id": "long", "messages": [{"role": "user", "content": "why? " * longest}, row["messages"][-1]]}
    assert align.training_questions(tokenizer, [*table, long], 16) == align.training_questions(tokenizer, table, 16)
    assert f"1 of 17 training questions leave no room for 16 more tokens in a context of {longest}" in (
        capsys.readouterr().out
    )
    with pytest.raises(StageError, match=r"1 of 1 training questions leave no room .*: raise tokenize.context"):
        align.training_questions(tokenizer, [long], 16)


def test_questions_that_spell_a_special_token_are_skipped_and_counted(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the tokenizer in use; another template's tokens are ordinary text."""
    tokenizer, table = chain.tokenizer(), tables.read(chain.path("data/validate/instructions")).to_pylist()
    first = next(row for row in table if row["split"] == "train")

    def ask(text: str) -> dict[str, Any]:
        return {**first, "id": text, "messages": [{"role": "user", "content": text}, first["messages"][-1]]}

    found = align.training_questions(tokenizer, [*table, ask("What is <|user|>?"), ask("What is <s>?")], 16)
    assert len(found) == len(align.training_questions(tokenizer, table, 16)) + 1
    assert {"role": "user", "content": "What is <s>?"} in [question.messages[0] for question in found]
    assert "1 of " in capsys.readouterr().out


def test_the_stage_writes_the_policy_and_its_history(chain: Chain) -> None:
    """The policy has the tuned model's architecture; the history has reward, KL, entropy and beta per iteration."""
    policy = models.load_decoder(chain.path("data/align/policy/model"), NUMERICS)
    tuned = models.load_decoder(chain.path("data/finetune/chat/model"), NUMERICS)
    assert models.parameter_count(policy) == models.parameter_count(tuned)
    with chain.path("data/align/policy/history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == config("align@policy").iterations + 1  # the last one only checks the saved policy
    assert not rows[-1]["policy_loss"]
    metrics = chain.metrics["align@policy"]
    assert metrics["kl_first"] == 0 < metrics["kl_last"]
    for name in align.SUMMARY_METRICS:
        assert [metrics[f"{name}_first"], metrics[f"{name}_last"]] == [float(rows[0][name]), float(rows[-1][name])]
    assert float(rows[0]["beta"]) == 0.05
    assert [bool(row["exact_match"]) for row in rows] == [True, False, True, True]
