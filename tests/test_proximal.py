"""PPO against plain references: log-probabilities, rewards, both clipped losses and the adaptive KL coefficient."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tasks.align import estimates
from tasks.align.proximal import PpoTrainer, Rollout
from tasks.common.harness.job import StageError
from tests.ppo_fixtures import KL, LEARNING_RATE, iterate, trainer, tuned_logp
from tests.training_fixtures import PRETRAINING_MIX, chain

__all__ = ["chain", "trainer"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain


def add_noise(module: Any, size: float) -> None:
    """Add a little noise to all weights of a module."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


# Log-probabilities and rewards


def test_log_probabilities_are_a_plain_softmaxes(trainer: Callable[..., PpoTrainer]) -> None:
    """Log-probability, entropy and value of every reply token, against each conversation alone and without padding."""
    import torch

    ours = trainer(temperature=0.7)
    add_noise(ours.policy.model.value_head, 0.5)
    tokenizer = ours.tokenizer
    prompts = [prompt.ids for prompt in ours.prompts[:4]]
    replies = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in ("Rome.", "A much longer one.", "", "Me")]
    ids, mask, reply_mask = ours.policy.assemble(prompts, replies, ours.tokenizer.pad_token_id)
    with torch.no_grad():
        seen = ours.policy.score_rollout(ids, mask, reply_mask)
        logp, values, entropy = seen.logp, seen.values, seen.entropy
        for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            model: Any = ours.policy.model
            out = model(input_ids=torch.tensor([prompt + reply]), output_hidden_states=True)
            shares = torch.softmax(out.logits[0].double() / 0.7, -1)
            for t, token in enumerate(reply):
                place = len(prompt) + t - 1
                p = shares[place]
                assert logp[row, t].item() == pytest.approx(math.log(p[token]), abs=1e-4)
                assert entropy[row, t].item() == pytest.approx(-sum(q * math.log(q) for q in p.tolist()), abs=1e-4)
                value = model.value_head(out.hidden_states[-1][0, place]).item()
                assert values[row, t].item() == pytest.approx(value, abs=1e-4)
    assert reply_mask.sum(1).tolist() == list(map(len, replies))
    assert len(set(map(len, prompts))) > 1


def test_kl_is_zero_before_the_first_update(trainer: Callable[..., PpoTrainer]) -> None:
    """The KL to the tuned model is exactly 0."""
    ours = trainer()
    rollout, figures = ours.sample(0)
    assert figures["kl"] == 0
    assert (rollout.logp == tuned_logp(ours, rollout)).all()


def test_token_rewards_are_the_final_score_minus_the_kl_penalty(trainer: Callable[..., PpoTrainer]) -> None:
    """Per token: -beta (log p - log p of the tuned model), plus the penalized reward at the last token."""
    import torch

    ours = trainer(
        gamma=1.0, gae_lambda=1.0, kl={**KL, "coefficient": 0.3, "target": 1.0, "horizon": 0}, max_new_tokens=9
    )
    add_noise(ours.policy.model.model, 0.05)
    rollout, figures = ours.sample(3)
    tuned, total = tuned_logp(ours, rollout), 0.0
    for row in range(len(rollout.ids)):
        length = int(rollout.reply_mask[row].sum())
        tokens = rollout.ids[row, -rollout.reply_mask.shape[1] :][:length].tolist()
        complete = tokens[-1] == ours.tokenizer.eos_token_id
        text = ours.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        score = len(text) / 10 - (0.0 if complete else 1.0)
        log_ratios = [float(rollout.logp[row, t] - tuned[row, t]) for t in range(length)]
        for t in range(length):  # with values of 0 the return is the sum of the rewards from a token on
            expected = score - 0.3 * sum(log_ratios[t:])
            assert rollout.returns[row, t].item() == pytest.approx(expected, abs=1e-4)
        total += score
    assert figures["reward"] == pytest.approx(total / len(rollout.ids), abs=1e-5)
    assert 0 < figures["ended"] < 1  # so that both cases were seen
    moved_all = ((rollout.logp - tuned) * rollout.reply_mask).sum(1)
    assert figures["kl"] == pytest.approx(moved_all.mean().item(), rel=1e-5)
    torch.testing.assert_close(
        rollout.advantages, estimates.whiten(rollout.returns, rollout.reply_mask), atol=1e-4, rtol=0
    )


# Updates


def update_with_ratios(
    trainer: PpoTrainer, ratios: list[float], values: list[float], rollout: Rollout
) -> dict[str, float]:
    """Take one update with given probability ratios and values, and return its metrics."""
    import torch

    # 0 x weight, so that the given numbers depend on a tensor with a gradient
    zero = 0 * sum(parameter.sum() for parameter in trainer.policy.model.parameters())
    logp = rollout.logp + torch.tensor([ratios]).log() + zero
    inputs = (logp, torch.tensor([values]) + zero, torch.zeros(1, len(ratios)))
    stub: Any = trainer.policy
    stub.forward = lambda *_, **__: inputs
    return trainer.update(rollout, np.array([0]), LEARNING_RATE)


def make_rollout(advantages: list[float], returns: list[float], old: list[float], reply_mask: list[bool]) -> Rollout:
    """Return a rollout of one reply with given numbers."""
    import torch

    zeros = torch.zeros(1, len(old))
    mask = torch.tensor([reply_mask])
    return Rollout(
        ids=torch.zeros(1, 2 * len(old), dtype=torch.long),
        mask=torch.ones(1, 2 * len(old), dtype=torch.bool),
        reply_mask=mask,
        logp=zeros - 1,
        values=torch.tensor([old]),
        advantages=torch.tensor([advantages]),
        returns=torch.tensor([returns]),
    )


def test_both_losses_by_hand(trainer: Callable[..., PpoTrainer]) -> None:
    """Five tokens, one of them padding, with ratios and values inside and outside the clipping ranges."""
    ours = trainer(clip_range=0.2, vf_clip_range=0.5)
    rollout = make_rollout(
        advantages=[1.0, -1.0, 2.0, -2.0, 50.0],
        returns=[1.0, 0.0, 2.0, -1.0, 50.0],
        old=[0.0, 0.0, 1.0, 1.0, 0.0],
        reply_mask=[True, True, True, True, False],
    )
    figures = update_with_ratios(ours, [1.5, 1.5, 0.5, 0.9, 9.0], [0.25, 2.0, 1.75, 0.25, 9.0], rollout)
    # The larger of -A x ratio and -A x the ratio within 0.8 ... 1.2 (equation 7):
    policy = [max(-1.5, -1.2), max(1.5, 1.2), max(-1.0, -1.6), max(1.8, 1.8)]
    # The larger square, of the value and of the value within 0.5 of the old one:
    value = [0.75**2, max(2.0, 0.5) ** 2, max(0.25, 0.5) ** 2, max(1.25, 1.5) ** 2]
    assert figures["policy_loss"] == pytest.approx(sum(policy) / 4, rel=1e-5)
    assert figures["value_loss"] == pytest.approx(0.5 * sum(value) / 4, rel=1e-5)
    assert figures["clip_fraction"] == pytest.approx(3 / 4)
    assert figures["ptx_loss"] == 0


def test_update_moves_probability_towards_positive_advantage(trainer: Callable[..., PpoTrainer]) -> None:
    """A step on one reply with advantages of one sign makes its tokens more or less likely."""
    import torch

    for sign in (1.0, -1.0):
        ours = trainer()
        rollout, _ = ours.sample(0)
        rollout.advantages = sign * rollout.reply_mask.float()
        before = (rollout.logp * rollout.reply_mask)[0].sum()
        ours.update(rollout, np.array([0]), LEARNING_RATE)
        with torch.no_grad():
            logp = ours.policy.score_rollout(rollout.ids, rollout.mask, rollout.reply_mask).logp
        assert sign * ((logp * rollout.reply_mask)[0].sum() - before) > 0


def test_an_update_moves_values_to_the_returns(trainer: Callable[..., PpoTrainer]) -> None:
    """A few steps on the same replies reduce the value loss."""
    ours = trainer(vf_coef=1.0, vf_clip_range=100.0)
    rollout, _ = ours.sample(0)
    rows = np.arange(len(rollout.ids))
    losses = [ours.update(rollout, rows, 0.01)["value_loss"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_pretraining_term_is_added_with_its_weight(trainer: Callable[..., PpoTrainer]) -> None:
    """The term is the causal loss on the update's windows and reaches the policy's gradient."""
    import torch

    norms = {}
    for weight in (1e-3, 10.0):
        ours = trainer(ptx={**PRETRAINING_MIX, "weight": weight}, vf_coef=0.0)
        assert ours.ptx is not None
        ids = torch.from_numpy(ours.ptx.mixture.batch(0))
        model: Any = ours.policy.model
        expected = model(input_ids=ids, labels=ids).loss.item()
        rollout, _ = ours.sample(0)
        figures = ours.update(rollout, np.arange(4), LEARNING_RATE)
        assert figures["ptx_loss"] == pytest.approx(expected, rel=1e-5)
        norms[weight] = figures["gradient_norm"]
    assert norms[10.0] > 2 * norms[1e-3]


def test_iterations_leave_the_reference_unchanged(trainer: Callable[..., PpoTrainer]) -> None:
    """Iterations change the policy and the value head; the tuned model stays bitwise the same."""
    ours, fresh = trainer(), trainer()
    iterate(ours, 0)
    iterate(ours, 1)
    references = [side.policy.reference for side in (ours, fresh)]
    assert references[0] is not None
    assert references[1] is not None
    pairs = zip(references[0].parameters(), references[1].parameters(), strict=True)
    assert all((ours_now == before).all() for ours_now, before in pairs)
    parameter_pairs = zip(ours.policy.model.parameters(), fresh.policy.model.parameters(), strict=True)
    assert all((ours_now != before).any() for ours_now, before in parameter_pairs)
    assert ours.policy.model.value_head.weight.any()


def test_every_epoch_covers_every_reply(trainer: Callable[..., PpoTrainer]) -> None:
    """Minibatches partition the replies; metrics are means over all updates."""
    ours = trainer(episodes=10, minibatch=4, epochs=3)
    seen: list[int] = []

    def update(rollout: Rollout, rows: Any, rate: float, *, policy_learns: bool) -> dict[str, float]:
        seen.extend(rows.tolist())
        return {"policy_loss": float(len(rows))}

    stub: Any = ours
    stub.update = update
    figures = iterate(ours, 0)
    assert figures["updates"] == 9
    assert all(sorted(seen[at : at + 10]) == list(range(10)) for at in (0, 10, 20))
    assert figures["policy_loss"] == pytest.approx((4 + 4 + 2) / 3)


def test_a_nonfinite_loss_raises_a_stage_error(trainer: Callable[..., PpoTrainer]) -> None:
    """The policy is unchanged, and the message says what to lower."""
    ours = trainer()
    rollout, _ = ours.sample(0)
    rollout.advantages *= math.inf
    before = [parameter.clone() for parameter in ours.policy.model.parameters()]
    with pytest.raises(
        StageError,
        match=r"update 1 has a loss or gradient that is not finite .*align\.optimizer\.learning_rate .* was 0\.0003\)",
    ):
        ours.update(rollout, np.arange(4), LEARNING_RATE)
    pairs = zip(before, ours.policy.model.parameters(), strict=True)
    assert all((old == new).all() for old, new in pairs)


# The coefficient


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (12.0, 0.05 * (1 + 0.2 * 12 / 2000)),
        (6.6, 0.05 * (1 + 0.1 * 12 / 2000)),
        (6.0, 0.05),
        (5.4, 0.05 * (1 - 0.1 * 12 / 2000)),
        (0.0, 0.05 * (1 - 0.2 * 12 / 2000)),
    ],
)
def test_the_coefficient_adapts_to_the_target(kl: float, expected: float, trainer: Callable[..., PpoTrainer]) -> None:
    """It rises above the target and falls below it, by the clipped relative error times episodes over horizon."""
    ours = trainer()
    ours.update_beta(kl)
    assert ours.beta == pytest.approx(expected, rel=1e-9)


def test_a_horizon_of_zero_keeps_the_coefficient(trainer: Callable[..., PpoTrainer]) -> None:
    """The coefficient is fixed."""
    ours = trainer(kl={**KL, "horizon": 0})
    ours.update_beta(100.0)
    assert ours.beta == 0.05
