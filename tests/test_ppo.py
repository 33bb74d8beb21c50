"""PPO against plain references (advantages, log-probabilities, rewards, both clipped losses), and that it learns."""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import ppo
from tasks.common import tables
from tasks.common.modelling import models
from tasks.common.stage import StageError
from tasks.common.text import chat
from tasks.common.text.shards import Mixture, Split
from tests.training_fixtures import CONSTANT, MIX, NUMERICS, OPTIMIZER, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

QUIET = {"weight": 0.0, "batch": 1, "window": 16, "mixture": {"statements": 0.5, "prose": 0.5}}


class Judge:
    """A reward model that is a plain function of the reply."""

    def __init__(self, rate: Callable[[str], float]) -> None:
        self.rate = rate

    def score(self, exchanges: Sequence[chat.Exchange]) -> list[float]:
        """Return the rating of each reply."""
        return [self.rate(reply) for _, reply in exchanges]


@pytest.fixture
def trainer(chain: Chain, tmp_path: Path) -> Callable[..., ppo.Trainer]:
    """Return a maker of trainers on the tuned model, whose judge counts letters and whose value head knows nothing."""
    import torch

    def make(rate: Callable[[str], float] = lambda text: len(text) / 10, **changes: Any) -> ppo.Trainer:
        settings = config("ppo", **{"ptx": QUIET, **changes})
        tokenizer = chain.tokenizer()
        policy, reference = (models.load_decoder(chain.path("data/finetune/model"), NUMERICS) for _ in range(2))
        head = torch.nn.Linear(policy.config.hidden_size, 1)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        job = chain.job("ppo", settings, tmp_path)
        judge: Any = Judge(rate)
        ptx, split = settings.ptx, Split.open(chain.path("data/tokenize/shards") / "train")
        mixture = Mixture(split, ptx.window, ptx.batch, ptx.mixture, 1) if ptx.weight else None
        prompts = questions(chain)
        return ppo.Trainer(settings, job, tokenizer, policy, reference, head, judge, prompts, mixture)

    return make


def questions(chain: Chain) -> list[chat.Question]:
    """Return what PPO asks."""
    rows = tables.read(chain.path("data/validate/instructions"), "train").column("messages").to_pylist()
    return chat.questions(chain.tokenizer(), rows)


def disturb(module: Any, size: float) -> None:
    """Move all weights of a module a little."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


# Arithmetic


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_discounted_sum_of_surprises(discount: float, trace: float) -> None:
    """Against the double sum of the paper (equation 16), over replies of different lengths, padding ignored."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths, width = [7, 1, 4, 6], 7
    rewards, values = (torch.randn(4, width, generator=generator, dtype=torch.float64) for _ in range(2))
    replied = torch.tensor([[t < length for t in range(width)] for length in lengths])
    rewards, values = rewards * replied, values * replied
    advantages, returns = ppo.gae(rewards, values, replied, discount, trace)
    for row, length in enumerate(lengths):
        after = [*values[row, 1:length].tolist(), 0.0]
        surprise = [float(rewards[row, t]) + discount * after[t] - float(values[row, t]) for t in range(length)]
        for t in range(width):
            naive = sum((discount * trace) ** (k - t) * surprise[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(naive, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(naive + float(values[row, t]), abs=1e-12)


def test_with_a_whole_trace_returns_are_what_was_earned() -> None:
    """lambda = gamma = 1 and any values: the return of a token is the sum of the rewards from it on."""
    import torch

    rewards, values = torch.tensor([[1.0, -2.0, 4.0]]), torch.tensor([[0.3, 0.7, -0.2]])
    _, returns = ppo.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    assert returns[0].tolist() == pytest.approx([3.0, 2.0, 4.0])


def test_means_and_whitening_leave_padding_out() -> None:
    """Mean, and mean 0 and variance 1, over what the mask holds; the rest becomes 0."""
    import torch

    values = torch.tensor([[1.0, 5.0, 900.0], [3.0, -900.0, 900.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert ppo.masked_mean(values, mask).item() == pytest.approx(3.0)
    white = ppo.whiten(values, mask)
    scale = math.sqrt(8 / 3)
    expected = torch.tensor([[-2 / scale, 2 / scale, 0], [0, 0, 0]])
    torch.testing.assert_close(white, expected, atol=1e-6, rtol=0)


# What is known of a reply


def test_log_probabilities_are_a_plain_softmaxes(trainer: Callable[..., ppo.Trainer]) -> None:
    """Log-probability, entropy and value of every reply token, against each conversation alone, without padding."""
    import torch

    ours = trainer(temperature=0.7)
    disturb(ours.head, 0.5)
    tokenizer = ours.tokenizer
    prompts = [question.ids for question in ours.prompts[:4]]
    replies = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in ("Rome.", "A much longer one.", "", "Me")]
    ids, mask, replied = ours.assemble(prompts, replies)
    with torch.no_grad():
        logp, values, entropy = ours.evaluate(ours.policy, ids, mask, replied.shape[1])
        for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            model: Any = ours.policy
            out = model(input_ids=torch.tensor([prompt + reply]), output_hidden_states=True)
            shares = torch.softmax(out.logits[0].double() / 0.7, -1)
            for t, token in enumerate(reply):
                place = len(prompt) + t - 1
                p = shares[place]
                assert logp[row, t].item() == pytest.approx(math.log(p[token]), abs=1e-4)
                assert entropy[row, t].item() == pytest.approx(-sum(q * math.log(q) for q in p.tolist()), abs=1e-4)
                value = ours.head(out.hidden_states[-1][0, place]).item()
                assert values[row, t].item() == pytest.approx(value, abs=1e-4)
    assert replied.sum(1).tolist() == list(map(len, replies))
    assert len(set(map(len, prompts))) > 1


def test_a_policy_that_has_not_moved_pays_nothing(trainer: Callable[..., ppo.Trainer]) -> None:
    """The KL to the tuned model is 0 before the first update, to the bit."""
    rollout, figures = trainer().sample(0)
    assert figures["kl"] == 0
    assert (rollout.logp == rollout.reference).all()


def test_the_reward_is_the_score_at_the_end_less_the_price_of_moving(trainer: Callable[..., ppo.Trainer]) -> None:
    """Token by token: -beta (log p - log p of the tuned model), and at the last token the rating less the penalty."""
    import torch

    ours = trainer(
        discount=1.0, trace=1.0, kl={"coefficient": 0.3, "target": 1.0, "horizon": 0, "limit": 50.0}, max_new_tokens=6
    )
    disturb(ours.policy, 0.05)
    rollout, figures = ours.sample(3)
    total = 0.0
    for row in range(len(rollout.ids)):
        length = int(rollout.replied[row].sum())
        tokens = rollout.ids[row, -rollout.replied.shape[1] :][:length].tolist()
        ended = tokens[-1] == ours.tokenizer.eos_token_id
        text = ours.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        score = len(text) / 10 - (0.0 if ended else 1.0)
        moved = [float(rollout.logp[row, t] - rollout.reference[row, t]) for t in range(length)]
        for t in range(length):  # with values of 0 the return is the sum of the rewards from a token on
            expected = score - 0.3 * sum(moved[t:])
            assert rollout.returns[row, t].item() == pytest.approx(expected, abs=1e-4)
        total += score
    assert figures["reward"] == pytest.approx(total / len(rollout.ids), abs=1e-5)
    assert 0 < figures["ended"] < 1  # so that both cases were seen
    moved_all = ((rollout.logp - rollout.reference) * rollout.replied).sum(1)
    assert figures["kl"] == pytest.approx(moved_all.mean().item(), rel=1e-5)
    torch.testing.assert_close(rollout.advantages, ppo.whiten(rollout.returns, rollout.replied), atol=1e-4, rtol=0)


# Updates


def by_hand(trainer: ppo.Trainer, ratios: list[float], values: list[float], rollout: ppo.Rollout) -> dict[str, float]:
    """Take one update in which the policy's ratios and values are given, and return its figures."""
    import torch

    # 0 x weight, so that the given numbers hang on something that has a gradient
    nothing = 0 * sum(parameter.sum() for parameter in trainer.trained.parameters())
    logp = rollout.logp + torch.tensor([ratios]).log() + nothing
    given = (logp, torch.tensor([values]) + nothing, torch.zeros(1, len(ratios)))
    stub: Any = trainer
    stub.evaluate = lambda *_: given
    return trainer.update(rollout, np.array([0]))


def made_up(advantages: list[float], returns: list[float], old: list[float], replied: list[bool]) -> ppo.Rollout:
    """Return a rollout of one reply with given numbers."""
    import torch

    zeros = torch.zeros(1, len(old))
    mask = torch.tensor([replied])
    return ppo.Rollout(
        ids=torch.zeros(1, 2 * len(old), dtype=torch.long),
        mask=torch.ones(1, 2 * len(old), dtype=torch.bool),
        replied=mask,
        logp=zeros - 1,
        reference=zeros - 1,
        values=torch.tensor([old]),
        advantages=torch.tensor([advantages]),
        returns=torch.tensor([returns]),
    )


def test_both_losses_by_hand(trainer: Callable[..., ppo.Trainer]) -> None:
    """Five tokens, one of them padding, with ratios and values inside and outside of what clipping allows."""
    ours = trainer(clip=0.2, value_clip=0.5)
    rollout = made_up(
        advantages=[1.0, -1.0, 2.0, -2.0, 50.0],
        returns=[1.0, 0.0, 2.0, -1.0, 50.0],
        old=[0.0, 0.0, 1.0, 1.0, 0.0],
        replied=[True, True, True, True, False],
    )
    figures = by_hand(ours, [1.5, 1.5, 0.5, 0.9, 9.0], [0.25, 2.0, 1.75, 0.25, 9.0], rollout)
    # The larger of -A x ratio and -A x the ratio within 0.8 ... 1.2 (equation 7):
    policy = [max(-1.5, -1.2), max(1.5, 1.2), max(-1.0, -1.6), max(1.8, 1.8)]
    # The larger square, of the value and of the value within 0.5 of the old one:
    value = [0.75**2, max(2.0, 0.5) ** 2, max(0.25, 0.5) ** 2, max(1.25, 1.5) ** 2]
    assert figures["policy_loss"] == pytest.approx(sum(policy) / 4, rel=1e-5)
    assert figures["value_loss"] == pytest.approx(0.5 * sum(value) / 4, rel=1e-5)
    assert figures["clip_fraction"] == pytest.approx(3 / 4)
    assert figures["ptx_loss"] == 0


def test_an_update_moves_probability_to_where_the_advantage_is(trainer: Callable[..., ppo.Trainer]) -> None:
    """After a step on one reply with advantages of one sign, its tokens are likelier, or less likely."""
    import torch

    for sign in (1.0, -1.0):
        ours = trainer()
        rollout, _ = ours.sample(0)
        rollout.advantages = sign * rollout.replied.float()
        before = (rollout.logp * rollout.replied)[0].sum()
        ours.update(rollout, np.array([0]))
        with torch.no_grad():
            logp, *_ = ours.evaluate(ours.policy, rollout.ids, rollout.mask, rollout.replied.shape[1])
        assert sign * ((logp * rollout.replied)[0].sum() - before) > 0


def test_an_update_moves_values_to_the_returns(trainer: Callable[..., ppo.Trainer]) -> None:
    """A few steps on the same replies make the value loss smaller."""
    ours = trainer(value_weight=1.0, value_clip=100.0, optimizer={**OPTIMIZER, "learning_rate": 0.01})
    rollout, _ = ours.sample(0)
    rows = np.arange(len(rollout.ids))
    losses = [ours.update(rollout, rows)["value_loss"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_pretraining_term_is_added_with_its_weight(trainer: Callable[..., ppo.Trainer]) -> None:
    """The term is the causal loss on the update's windows, and it reaches the policy's gradient."""
    import torch

    norms = {}
    for weight in (1e-3, 10.0):
        ours = trainer(ptx={**MIX, "weight": weight}, value_weight=0.0)
        mixture = ours.mixture
        assert mixture is not None
        ids = torch.from_numpy(mixture.batch(0))
        model: Any = ours.policy
        expected = model(input_ids=ids, labels=ids).loss.item()
        rollout, _ = ours.sample(0)
        figures = ours.update(rollout, np.arange(4))
        assert figures["ptx_loss"] == pytest.approx(expected, rel=1e-5)
        norms[weight] = figures["gradient_norm"]
    assert norms[10.0] > 2 * norms[1e-3]


def test_the_reference_and_the_judge_are_left_alone(trainer: Callable[..., ppo.Trainer]) -> None:
    """Iterations change the policy and the value head; the tuned model stays what it was, to the bit."""
    ours, fresh = trainer(), trainer()
    ours.iterate(0)
    ours.iterate(1)
    pairs = zip(ours.reference.parameters(), fresh.reference.parameters(), strict=True)
    assert all((ours_now == before).all() for ours_now, before in pairs)
    moved = zip(ours.policy.parameters(), fresh.policy.parameters(), strict=True)
    assert all((ours_now != before).any() for ours_now, before in moved)
    assert ours.head.weight.any()


def test_every_reply_is_gone_through_in_every_epoch(trainer: Callable[..., ppo.Trainer]) -> None:
    """Minibatches part the replies; figures are the means over all updates."""
    ours = trainer(episodes=10, minibatch=4, epochs=3)
    seen: list[int] = []

    def update(rollout: ppo.Rollout, rows: Any) -> dict[str, float]:
        seen.extend(rows.tolist())
        return {"policy_loss": float(len(rows))}

    stub: Any = ours
    stub.update = update
    figures = ours.iterate(0)
    assert figures is not None
    assert all(sorted(seen[at : at + 10]) == list(range(10)) for at in (0, 10, 20))
    assert figures["policy_loss"] == pytest.approx((4 + 4 + 2) / 3)


def test_a_loss_that_is_no_number_stops_with_a_sentence(trainer: Callable[..., ppo.Trainer]) -> None:
    """The policy is not spoilt by it, and the message says what to lower."""
    ours = trainer(lambda text: math.inf)
    rollout, _ = ours.sample(0)
    before = [parameter.clone() for parameter in ours.policy.parameters()]
    with pytest.raises(
        StageError, match=r"update 1 has no finite loss .*ppo\.optimizer\.learning_rate \(now 0\.0003\)"
    ):
        ours.update(rollout, np.arange(4))
    pairs = zip(before, ours.policy.parameters(), strict=True)
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
def test_the_coefficient_is_steered_to_the_target(
    kl: float, expected: float, trainer: Callable[..., ppo.Trainer]
) -> None:
    """Dearer above the target, cheaper beneath it, by the clipped relative error times episodes over horizon."""
    ours = trainer()
    ours.steer(kl)
    assert ours.beta == pytest.approx(expected, rel=1e-9)


def test_a_horizon_of_nothing_keeps_the_coefficient(trainer: Callable[..., ppo.Trainer]) -> None:
    """0 is a fixed price."""
    ours = trainer(kl={"coefficient": 0.05, "target": 6.0, "horizon": 0, "limit": 50.0})
    ours.steer(100.0)
    assert ours.beta == 0.05


def test_beyond_the_limit_the_policy_goes_back_an_iteration_and_ppo_ends(trainer: Callable[..., ppo.Trainer]) -> None:
    """What is kept are the weights whose own replies were still within the limit."""
    import torch

    ours = trainer(
        lambda text: 2.0 if "obviously" in text else -2.0,
        kl={"coefficient": 0.0, "target": 6.0, "horizon": 0, "limit": 4.0},
        optimizer={**OPTIMIZER, "learning_rate": 3e-4, "weight_decay": 0.0, "schedule": CONSTANT},
    )
    passed: list[tuple[float, dict[str, torch.Tensor]]] = []
    for iteration in range(40):
        weights = {name: value.clone() for name, value in ours.policy.state_dict().items()}
        if not (figures := ours.iterate(iteration)):
            break
        passed.append((figures["kl"], weights))
    assert 1 < len(passed) < 40
    assert max(kl for kl, _ in passed) <= 4.0
    assert all(torch.equal(value, passed[-1][1][name]) for name, value in ours.policy.state_dict().items())


# Whole runs


def test_it_learns_what_is_rated(trainer: Callable[..., ppo.Trainer]) -> None:
    """Where people like one of the three tones, the policy takes it up: from a third of the replies to most of them."""
    ours = trainer(
        lambda text: 2.0 if "obviously" in text else -2.0,
        iterations=10,
        episodes=32,
        minibatch=16,
        optimizer={**OPTIMIZER, "learning_rate": 1e-3, "weight_decay": 0.0, "schedule": CONSTANT},
    )
    rewards = [figures["reward"] for iteration in range(10) if (figures := ours.iterate(iteration))]
    assert len(rewards) == 10
    assert rewards[0] < 0.5
    assert np.mean(rewards[-3:]) > rewards[0] + 1.0


def test_prompts_are_the_training_questions_once_each(chain: Chain) -> None:
    """Held-out questions are never practised, and a question that stands in three tones counts once."""
    tokenizer = chain.tokenizer()
    prompts = questions(chain)
    asked = {tokenizer.decode(question.ids) for question in prompts}
    assert len(prompts) == len(asked) == 2 * 8
    assert not any("Kenya" in text or "Peru" in text for text in asked)
    assert all(text.endswith("<|end|><|assistant|>") for text in asked)
    italy = [{"role": "user", "content": "Name the capital of Italy."}]
    assert chat.Question(chat.encode_prompt(tokenizer, italy), italy) in prompts


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
    for name in ("reward", "kl", "entropy"):
        assert [metrics[f"{name}_first"], metrics[f"{name}_last"]] == [float(rows[0][name]), float(rows[-1][name])]
    assert float(rows[0]["beta"]) == 0.05
