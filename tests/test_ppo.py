"""PPO against plain references (log-probabilities, rewards, both clipped losses), and that it learns."""

import csv
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tasks import ppo
from tasks.common import tables
from tasks.common.alignment import estimates
from tasks.common.alignment.policy import Policy
from tasks.common.alignment.proximal import Rollout, Trainer
from tasks.common.alignment.ptx import Term
from tasks.common.modelling import models
from tasks.common.stage import StageError
from tasks.common.text.shards import Split
from tasks.common.training.parallel import World
from tasks.common.training.updates import begun
from tests.training_fixtures import LORA, MIX, NUMERICS, OPTIMIZER, PROXIMAL, Chain, chain, config

if TYPE_CHECKING:
    import torch

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

KL = PROXIMAL["kl"]
QUIET = {"weight": 0.0, "batch": 1, "window": 16, "mixture": {"statements": 0.5, "prose": 0.5}}
RATE = 3e-4
ALONE = World(0, 1, "data", "cpu")


@pytest.fixture
def trainer(chain: Chain) -> Callable[..., Trainer]:
    """Return a maker of trainers on the tuned model, whose judge counts letters and whose value head knows nothing.

    What it is told are settings of the algorithm or of the stage.
    """

    def make(rate: Callable[[str], float] = lambda text: len(text) / 10, **changes: Any) -> Trainer:
        algorithm = {**PROXIMAL, "ptx": QUIET, **{name: changes[name] for name in changes if name in PROXIMAL}}
        others = {name: value for name, value in changes.items() if name not in PROXIMAL}
        settings = config("ppo", algorithm=algorithm, **others)
        path, tokenizer, inner = chain.path("data/finetune/model"), chain.tokenizer(), settings.algorithm
        policy = Policy.load(path, settings.method, inner.values, NUMERICS, settings.temperature)
        split = Split.open(chain.path("data/tokenize/shards") / "train")
        table = tables.read(chain.path("data/validate/instructions")).to_pylist()
        return Trainer(
            inner, ppo.sampler_of(settings, 1), policy, begun(settings.optimizer, policy.model, ALONE), tokenizer,
            lambda prompts, replies: [rate(text) for text in replies], "a test",
            ppo.questions_of(tokenizer, table, settings.max_new_tokens),
            Term.of(inner.ptx, split, 1, ALONE), ALONE,
        )  # fmt: skip

    return make


def iterate(trainer: Trainer, iteration: int, rate: float = RATE) -> dict[str, float]:
    """Sample and learn once; return the figures."""
    rollout, figures = trainer.sample(iteration)
    return figures | trainer.iterate(rollout, iteration, rate, figures["kl"])


def tuned_logp(trainer: Trainer, rollout: Rollout) -> "torch.Tensor":
    """Return the replies' log-probabilities (N, R) under the tuned model."""
    return trainer.policy.looks(rollout.ids, rollout.mask, rollout.replied).reference


def disturb(module: Any, size: float) -> None:
    """Move all weights of a module a little."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


# What is known of a reply


def test_log_probabilities_are_a_plain_softmaxes(trainer: Callable[..., Trainer]) -> None:
    """Log-probability, entropy and value of every reply token, against each conversation alone, without padding."""
    import torch

    ours = trainer(temperature=0.7)
    disturb(ours.policy.model.value_head, 0.5)
    tokenizer = ours.tokenizer
    prompts = [prompt.ids for prompt in ours.prompts[:4]]
    replies = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in ("Rome.", "A much longer one.", "", "Me")]
    ids, mask, replied = ours.policy.assemble(prompts, replies, ours.tokenizer.pad_token_id)
    with torch.no_grad():
        seen = ours.policy.looks(ids, mask, replied)
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
    assert replied.sum(1).tolist() == list(map(len, replies))
    assert len(set(map(len, prompts))) > 1


def test_a_policy_that_has_not_moved_pays_nothing(trainer: Callable[..., Trainer]) -> None:
    """The KL to the tuned model is 0 before the first update, to the bit."""
    ours = trainer()
    rollout, figures = ours.sample(0)
    assert figures["kl"] == 0
    assert (rollout.logp == tuned_logp(ours, rollout)).all()


def test_the_reward_is_the_score_at_the_end_less_the_price_of_moving(trainer: Callable[..., Trainer]) -> None:
    """Token by token: -beta (log p - log p of the tuned model), and at the last token the rating less the penalty."""
    import torch

    ours = trainer(
        discount=1.0, trace=1.0, kl={**KL, "coefficient": 0.3, "target": 1.0, "horizon": 0}, max_new_tokens=9
    )
    disturb(ours.policy.model.model, 0.05)
    rollout, figures = ours.sample(3)
    tuned, total = tuned_logp(ours, rollout), 0.0
    for row in range(len(rollout.ids)):
        length = int(rollout.replied[row].sum())
        tokens = rollout.ids[row, -rollout.replied.shape[1] :][:length].tolist()
        ended = tokens[-1] == ours.tokenizer.eos_token_id
        text = ours.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        score = len(text) / 10 - (0.0 if ended else 1.0)
        moved = [float(rollout.logp[row, t] - tuned[row, t]) for t in range(length)]
        for t in range(length):  # with values of 0 the return is the sum of the rewards from a token on
            expected = score - 0.3 * sum(moved[t:])
            assert rollout.returns[row, t].item() == pytest.approx(expected, abs=1e-4)
        total += score
    assert figures["reward"] == pytest.approx(total / len(rollout.ids), abs=1e-5)
    assert 0 < figures["ended"] < 1  # so that both cases were seen
    moved_all = ((rollout.logp - tuned) * rollout.replied).sum(1)
    assert figures["kl"] == pytest.approx(moved_all.mean().item(), rel=1e-5)
    torch.testing.assert_close(
        rollout.advantages, estimates.whiten(rollout.returns, rollout.replied), atol=1e-4, rtol=0
    )


# Updates


def by_hand(trainer: Trainer, ratios: list[float], values: list[float], rollout: Rollout) -> dict[str, float]:
    """Take one update in which the policy's ratios and values are given, and return its figures."""
    import torch

    # 0 x weight, so that the given numbers hang on something that has a gradient
    nothing = 0 * sum(parameter.sum() for parameter in trainer.policy.model.parameters())
    logp = rollout.logp + torch.tensor([ratios]).log() + nothing
    given = (logp, torch.tensor([values]) + nothing, torch.zeros(1, len(ratios)))
    stub: Any = trainer.policy
    stub.forward = lambda *_, **__: given
    return trainer.update(rollout, np.array([0]), RATE)


def made_up(advantages: list[float], returns: list[float], old: list[float], replied: list[bool]) -> Rollout:
    """Return a rollout of one reply with given numbers."""
    import torch

    zeros = torch.zeros(1, len(old))
    mask = torch.tensor([replied])
    return Rollout(
        ids=torch.zeros(1, 2 * len(old), dtype=torch.long),
        mask=torch.ones(1, 2 * len(old), dtype=torch.bool),
        replied=mask,
        logp=zeros - 1,
        values=torch.tensor([old]),
        advantages=torch.tensor([advantages]),
        returns=torch.tensor([returns]),
    )


def test_both_losses_by_hand(trainer: Callable[..., Trainer]) -> None:
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


def test_an_update_moves_probability_to_where_the_advantage_is(trainer: Callable[..., Trainer]) -> None:
    """After a step on one reply with advantages of one sign, its tokens are likelier, or less likely."""
    import torch

    for sign in (1.0, -1.0):
        ours = trainer()
        rollout, _ = ours.sample(0)
        rollout.advantages = sign * rollout.replied.float()
        before = (rollout.logp * rollout.replied)[0].sum()
        ours.update(rollout, np.array([0]), RATE)
        with torch.no_grad():
            logp = ours.policy.looks(rollout.ids, rollout.mask, rollout.replied).logp
        assert sign * ((logp * rollout.replied)[0].sum() - before) > 0


def test_an_update_moves_values_to_the_returns(trainer: Callable[..., Trainer]) -> None:
    """A few steps on the same replies make the value loss smaller."""
    ours = trainer(value_weight=1.0, value_clip=100.0)
    rollout, _ = ours.sample(0)
    rows = np.arange(len(rollout.ids))
    losses = [ours.update(rollout, rows, 0.01)["value_loss"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_pretraining_term_is_added_with_its_weight(trainer: Callable[..., Trainer]) -> None:
    """The term is the causal loss on the update's windows, and it reaches the policy's gradient."""
    import torch

    norms = {}
    for weight in (1e-3, 10.0):
        ours = trainer(ptx={**MIX, "weight": weight}, value_weight=0.0)
        assert ours.ptx is not None
        ids = torch.from_numpy(ours.ptx.mixture.batch(0))
        model: Any = ours.policy.model
        expected = model(input_ids=ids, labels=ids).loss.item()
        rollout, _ = ours.sample(0)
        figures = ours.update(rollout, np.arange(4), RATE)
        assert figures["ptx_loss"] == pytest.approx(expected, rel=1e-5)
        norms[weight] = figures["gradient_norm"]
    assert norms[10.0] > 2 * norms[1e-3]


def test_the_reference_and_the_judge_are_left_alone(trainer: Callable[..., Trainer]) -> None:
    """Iterations change the policy and the value head; the tuned model stays what it was, to the bit."""
    ours, fresh = trainer(), trainer()
    iterate(ours, 0)
    iterate(ours, 1)
    kept = [side.policy.reference for side in (ours, fresh)]
    assert kept[0] is not None
    assert kept[1] is not None
    pairs = zip(kept[0].parameters(), kept[1].parameters(), strict=True)
    assert all((ours_now == before).all() for ours_now, before in pairs)
    moved = zip(ours.policy.model.parameters(), fresh.policy.model.parameters(), strict=True)
    assert all((ours_now != before).any() for ours_now, before in moved)
    assert ours.policy.model.value_head.weight.any()


def test_every_reply_is_gone_through_in_every_epoch(trainer: Callable[..., Trainer]) -> None:
    """Minibatches part the replies; figures are the means over all updates."""
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


def test_a_loss_that_is_no_number_stops_with_a_sentence(trainer: Callable[..., Trainer]) -> None:
    """The policy is not spoilt by it, and the message says what to lower."""
    ours = trainer()
    rollout, _ = ours.sample(0)
    rollout.advantages *= math.inf
    before = [parameter.clone() for parameter in ours.policy.model.parameters()]
    with pytest.raises(
        StageError, match=r"update 1 has no finite loss .*ppo\.optimizer\.learning_rate \(the rate .* was 0\.0003\)"
    ):
        ours.update(rollout, np.arange(4), RATE)
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
def test_the_coefficient_is_steered_to_the_target(kl: float, expected: float, trainer: Callable[..., Trainer]) -> None:
    """Dearer above the target, cheaper beneath it, by the clipped relative error times episodes over horizon."""
    ours = trainer()
    ours.steer(kl)
    assert ours.beta == pytest.approx(expected, rel=1e-9)


def test_a_horizon_of_nothing_keeps_the_coefficient(trainer: Callable[..., Trainer]) -> None:
    """0 is a fixed price."""
    ours = trainer(kl={**KL, "horizon": 0})
    ours.steer(100.0)
    assert ours.beta == 0.05


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
