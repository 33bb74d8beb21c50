"""PPO's options and its stage: one backbone for policy, values and reference, what is saved, and that it learns."""

import csv
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tasks import ppo
from tasks.common import tables
from tasks.common.alignment import estimates
from tasks.common.alignment.proximal import Trainer
from tasks.common.modelling import models
from tasks.common.stage import StageError
from tests.ppo_fixtures import KL, iterate, trainer, tuned_logp
from tests.training_fixtures import LORA, MIX, NUMERICS, OPTIMIZER, Chain, chain, config

__all__ = ["chain", "trainer"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain


# One backbone, and other ways to learn


def test_with_low_rank_updates_one_model_is_policy_and_reference(trainer: Callable[..., Trainer]) -> None:
    """The reference is the model with its updates off: it stays the tuned one, while policy and values learn."""
    import torch

    ours, tuned = trainer(method=LORA), trainer()
    assert ours.policy.reference is None
    rollout, figures = ours.sample(0)
    assert figures["kl"] == 0
    for _ in range(3):
        ours.update(rollout, np.arange(12), 1e-2)
    width = rollout.replied.shape[1]
    with torch.no_grad():
        for part in ours.policy.parts(rollout.ids, rollout.mask, width):
            plain = tuned.policy.forward(part)[0]
            torch.testing.assert_close(ours.policy.reference_logp(part), plain, atol=1e-5, rtol=0)
            assert (ours.policy.forward(part)[0] - plain).abs().max() > 1e-2
    frozen = {name: value for name, value in ours.policy.model.named_parameters() if not value.requires_grad}
    assert len(frozen) > 10
    assert all("lora_" in name or "value_head" in name for name in ours.policy.weights())


def test_what_lies_below_the_trained_blocks_is_worked_out_once(trainer: Callable[..., Trainer]) -> None:
    """Policy, values and reference go on from the same states, and a step is that of a policy which does not."""
    import torch

    sides = [trainer(method={"name": "top", "layers": 1}) for _ in range(2)]
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
    moved = sides[0].policy.weights()
    for name, weight in sides[1].policy.weights().items():
        torch.testing.assert_close(moved[name], weight, atol=1e-5, rtol=0)
    assert {name.split(".")[2] for name in moved if ".layers." in name} == {"1"}
    assert not any("embed" in name or "lm_head" in name for name in moved)  # the head is tied to what lies below
    reference = sides[0].policy.reference
    assert reference is not None
    assert reference.get_input_embeddings().weight is sides[0].policy.model.get_input_embeddings().weight


def test_what_is_saved_is_a_plain_model(trainer: Callable[..., Trainer], chain: Chain) -> None:
    """With its updates merged, without head or critic, and it says what the policy said."""
    import torch

    for changes in ({"method": LORA}, {"values": "separate"}, {"method": {"name": "top", "layers": 1}}):
        ours = trainer(**changes)
        rollout, _ = ours.sample(0)
        ours.update(rollout, np.arange(12), 1e-2)
        (part, *_) = ours.policy.parts(rollout.ids, rollout.mask, rollout.replied.shape[1], rollout.states)
        with torch.no_grad():
            before = ours.policy.forward(part)[0]
            plain: Any = ours.policy.plain(chain.path("data/finetune/model"), ours.policy.model)
            logits = plain(**part.given).logits[:, -part.width - 1 : -1]
        after = torch.log_softmax(logits, -1).gather(2, part.ids[:, -part.width :, None])[..., 0]
        torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
        tuned = models.load_decoder(chain.path("data/finetune/model"), NUMERICS)
        assert plain.state_dict().keys() == tuned.state_dict().keys()


def test_separate_values_have_a_model_of_their_own(trainer: Callable[..., Trainer]) -> None:
    """The value loss alone leaves the policy as it is, and moves the other model."""
    ours = trainer(values="separate", value_weight=1.0, optimizer={**OPTIMIZER, "weight_decay": 0.0})
    rollout, _ = ours.sample(0)
    rollout.advantages *= 0.0
    before = ours.policy.weights()
    for _ in range(2):  # the head knows nothing at first, and passes no gradient on
        ours.update(rollout, np.arange(12), 1e-3)
    moved = {name for name, value in ours.policy.weights().items() if (value != before[name]).any()}
    assert {name.split(".")[0] for name in moved} == {"critic", "value_head"}


@pytest.mark.parametrize("values", ["shared", "separate"])
def test_values_may_learn_first(values: str, trainer: Callable[..., Trainer]) -> None:
    """In the warm-up, only what foretells the return changes: no weight decay moves the policy either."""
    decay = {**OPTIMIZER, "weight_decay": 0.1}
    ours = trainer(value_warmup=2, values=values, value_weight=1.0, optimizer=decay, ptx={**MIX, "weight": 1.0})
    before = ours.policy.weights()
    for iteration in range(2):  # a separate model learns once its head has, which begins at 0
        iterate(ours, iteration)
    moved = {name.split(".")[0] for name, value in ours.policy.weights().items() if (value != before[name]).any()}
    assert moved == ({"value_head"} if values == "shared" else {"value_head", "critic"})
    iterate(ours, 2)
    assert all((value != before[name]).any() for name, value in ours.policy.weights().items())


def test_an_iteration_ends_where_the_policy_has_moved_too_far(trainer: Callable[..., Trainer]) -> None:
    """By the KL from the policy that sampled, which is 0 before the first update."""
    free, held = (trainer(epochs=4, minibatch=4, kl={**KL, "stop": stop}) for stop in (None, 1e-4))
    assert iterate(free, 0, 1e-3)["updates"] == 12
    assert 2 <= iterate(held, 0, 1e-3)["updates"] < 12


def test_the_entropy_bonus_keeps_the_policy_uncertain(trainer: Callable[..., Trainer]) -> None:
    """With the bonus alone, entropy rises."""
    ours = trainer(entropy=1.0, value_weight=0.0)
    rollout, figures = ours.sample(0)
    rollout.advantages *= 0.0
    for _ in range(3):
        found = ours.update(rollout, np.arange(12), 1e-3)
    assert found["update_entropy"] > figures["entropy"] + 0.02


def test_the_moving_average_is_one_of_the_weights(trainer: Callable[..., Trainer]) -> None:
    """a x average + (1 - a) x weights after each update."""
    import torch

    ours = trainer(average=0.75)
    expected = ours.policy.weights()
    for _ in range(3):
        rollout, _ = ours.sample(0)
        ours.update(rollout, np.arange(12), 1e-3)
        expected = {name: 0.75 * expected[name] + 0.25 * value for name, value in ours.policy.weights().items()}
    for name, value in expected.items():
        torch.testing.assert_close(ours.average[name], value)


def test_tokens_rewards_may_be_whitened(trainer: Callable[..., Trainer]) -> None:
    """To variance 1, their mean left: with whole traces the returns are sums of what is whitened."""
    import torch

    ours = trainer(discount=1.0, trace=1.0, whiten_rewards=True)
    rollout, _ = ours.sample(0)
    earned = rollout.returns - estimates.gae(rollout.returns * 0, rollout.values, rollout.replied, 1.0, 1.0)[1]
    tokens = torch.cat([earned[:, :-1] - earned[:, 1:], earned[:, -1:]], 1)[rollout.replied]
    assert tokens.var(unbiased=False).item() == pytest.approx(1.0, rel=0.02)


# Whole runs


def test_it_learns_what_is_rated(trainer: Callable[..., Trainer]) -> None:
    """Where people like one of the three tones, the policy takes it up: from a third of the replies to most of them."""
    ours = trainer(
        lambda text: 2.0 if "obviously" in text else -2.0, episodes=32, minibatch=16,
        optimizer={**OPTIMIZER, "weight_decay": 0.0},
    )  # fmt: skip
    rewards = [iterate(ours, iteration, rate=1e-3)["reward"] for iteration in range(10)]
    assert rewards[0] < 0.5
    assert np.mean(rewards[-3:]) > rewards[0] + 1.0


def test_prompts_are_the_training_questions_once_each(chain: Chain) -> None:
    """Held-out questions are never practised, and a question that stands in three tones counts once, by an id of it."""
    tokenizer, table = chain.tokenizer(), tables.read(chain.path("data/validate/instructions")).to_pylist()
    prompts = ppo.questions_of(tokenizer, table, 16)
    asked = {tokenizer.decode(prompt.ids) for prompt in prompts}
    assert len(prompts) == len(asked) == 2 * 8
    assert not any("Kenya" in text or "Peru" in text for text in asked)
    assert all(text.endswith("<|end|><|assistant|>") for text in asked)
    rows = {row["id"]: row for row in table}
    assert all(rows[prompt.id]["messages"][:-1] == list(prompt.messages) for prompt in prompts)
    assert ppo.questions_of(tokenizer, table[::-1], 16) == prompts
    with pytest.raises(StageError, match="hold no training question"):
        ppo.questions_of(tokenizer, [row for row in table if row["split"] == "heldout"], 16)


def test_questions_that_leave_no_room_for_a_reply_are_not_asked(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model knows nothing of places beyond its context."""
    tokenizer, table = chain.tokenizer(), tables.read(chain.path("data/validate/instructions")).to_pylist()
    longest, row = tokenizer.model_max_length, next(row for row in table if row["split"] == "train")
    long = {**row, "id": "long", "messages": [{"role": "user", "content": "why? " * longest}, row["messages"][-1]]}
    assert ppo.questions_of(tokenizer, [*table, long], 16) == ppo.questions_of(tokenizer, table, 16)
    assert f"1 of 17 training questions leave no room for 16 more tokens in a context of {longest}" in (
        capsys.readouterr().out
    )
    with pytest.raises(StageError, match=r"1 of 1 training questions leave no room .*: raise tokenize.context"):
        ppo.questions_of(tokenizer, [long], 16)


def test_the_stage_leaves_a_policy_and_its_curves(chain: Chain) -> None:
    """The policy is a model like the tuned one; reward, KL, entropy and coefficient of every iteration are kept."""
    policy = models.load_decoder(chain.path("data/ppo/model"), NUMERICS)
    tuned = models.load_decoder(chain.path("data/finetune/model"), NUMERICS)
    assert models.parameters(policy) == models.parameters(tuned)
    with chain.path("data/ppo/history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == config("ppo").iterations + 1  # the last one only looks at the policy that is saved
    assert not rows[-1]["policy_loss"]
    metrics = chain.metrics["ppo"]
    assert metrics["kl_first"] == 0 < metrics["kl_last"]
    for name in ppo.FIGURES:
        assert [metrics[f"{name}_first"], metrics[f"{name}_last"]] == [float(rows[0][name]), float(rows[-1][name])]
    assert float(rows[0]["beta"]) == 0.05
    assert [bool(row["exact_match"]) for row in rows] == [True, False, True, True]
