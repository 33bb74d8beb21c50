"""DPO, RLOO and GRPO in PPO's place: their steps against plain formulas, that they learn, and that they go on."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tasks import ppo
from tasks.common import tables
from tasks.common.alignment import pairs, rewards
from tasks.common.alignment.alternatives import Ranked
from tasks.common.alignment.by_trl import Learner
from tasks.common.alignment.pairs import Pair
from tasks.common.alignment.policy import Policy
from tasks.common.modelling import models
from tasks.common.settings import Checkpoints, SettingsError, check, read_params
from tasks.common.stage import StageError
from tasks.common.training.parallel import World
from tasks.common.training.updates import begun
from tests.conftest import ROOT
from tests.training_fixtures import ALTERNATIVES, LORA, MIX, NUMERICS, OPTIMIZER, RULE, Chain, chain, config

if TYPE_CHECKING:
    import torch

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

ALONE = World(0, 1, "data", "cpu")
RANKED = {"name": "rankings", "judge_share": 0.3, "reads": "response"}
# Plain descent, so that what the weights have moved by is the gradient.
DESCENT = {"name": "sgd", **RULE, "learning_rate": 1.0, "clip": 1e9, "momentum": 0.0, "nesterov": False}
DESCENT["weight_decay"] = 0.0
MUON = {**OPTIMIZER, "name": "muon", "momentum": 0.95}  # two optimizers, which a trainer sees as one


@pytest.fixture
def learner(chain: Chain, tmp_path: Path) -> Callable[..., Learner]:
    """Return a maker of learners on the tuned model, whose judge counts letters; it is told settings of the stage."""

    def make(
        name: str, rate: Callable[[str], float] = lambda text: len(text) / 10, ranked: Sequence[Pair] = (),
        told: dict[str, Any] | None = None, **changes: Any,
    ) -> Learner:  # fmt: skip
        settings = config("ppo", algorithm={**ALTERNATIVES[name], **(told or {})}, **changes)
        tokenizer, path = chain.tokenizer(), chain.path("data/finetune/model")
        policy = Policy.load(path, settings.method, None, NUMERICS, settings.temperature)
        table = tables.read(chain.path("data/validate/instructions")).to_pylist()
        return Learner(
            settings.algorithm, ppo.sampler_of(settings, 1), policy, begun(settings.optimizer, policy.model, ALONE),
            tokenizer, lambda prompts, replies: [rate(text) for text in replies], "a test",
            ppo.questions_of(tokenizer, table, settings.max_new_tokens), None, ranked, str(tmp_path / "nothing"),
        )  # fmt: skip

    return make


def iterate(learner: Learner, iteration: int, rate: float = 1e-3) -> dict[str, float]:
    """Sample and learn once; return the figures."""
    rollout, figures = learner.sample(iteration)
    return figures | learner.iterate(rollout, iteration, rate, figures["kl"])


def logp(model: Any, prompt: list[int], reply: list[int]) -> "torch.Tensor":
    """Return the log-probabilities of a reply's tokens, read alone and without padding."""
    import torch

    out = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(out, -1).gather(1, torch.tensor(reply)[:, None])[:, 0]


def disturb(model: Any, size: float) -> None:
    """Move all weights a little."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


# One step


def by_hand(ours: Learner, rollout: Any) -> "torch.Tensor":
    """Return the loss of an iteration's replies as the papers have it, at the weights that sampled them."""
    import torch

    found, algorithm = [], ours.config
    n, beta = len(rollout.replies), algorithm.beta
    asked = [prompt.ids for prompt in rollout.prompts]
    both = [
        (logp(ours.policy.model, prompt, reply), logp(ours.policy.reference, prompt, reply).detach())
        for prompt, reply in zip(asked, rollout.replies, strict=True)
    ]
    if algorithm.name == "dpo":
        for four in (range(start, start + 4) for start in range(0, n, 4)):
            best, worst = max(four, key=rollout.scores.__getitem__), min(four, key=rollout.scores.__getitem__)
            margin = (both[best][0] - both[best][1]).sum() - (both[worst][0] - both[worst][1]).sum()
            found.append(-torch.nn.functional.logsigmoid(beta * margin))
        return torch.stack(found).mean()
    for place, (mine, tuned) in enumerate(both):
        others = [other for other in range(place // 4 * 4, place // 4 * 4 + 4) if other != place]
        if algorithm.name == "rloo":  # the price is a part of the reward; one ratio a reply
            paid = [rollout.scores[i] - beta * (both[i][0] - both[i][1]).detach().sum() for i in range(n)]
            advantage = paid[place] - sum(paid[i] for i in others) / 3
            found.append(-advantage * (mine.sum() - mine.sum().detach()).exp())
        else:  # it is a part of the loss, k3 times the ratio (DeepSeek-V3.2); one ratio a token
            advantage = rollout.scores[place] - np.mean([rollout.scores[i] for i in (place, *others)])
            price = (tuned - mine).exp() - (tuned - mine) - 1
            found.append(((-advantage + beta * price) * (mine - mine.detach()).exp()).mean())
    return torch.stack(found).mean()


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_a_step_is_the_gradient_of_the_papers_loss(name: str, learner: Callable[..., Learner]) -> None:
    """Of the first update, on all replies of an iteration, with a policy that has left the tuned model already."""
    import torch

    ours = learner(name, optimizer=DESCENT, episodes=12, minibatch=12, told={"beta": 0.3})
    disturb(ours.policy.model, 0.02)
    rollout, figures = ours.sample(0)
    assert figures["kl"] > 0
    ours.policy.model.zero_grad()
    by_hand(ours, rollout).backward()
    expected = {name: value.grad.clone() for name, value in ours.policy.model.named_parameters()}
    ours.policy.model.zero_grad()
    before = ours.policy.weights()
    found = ours.iterate(rollout, 0, 1.0, figures["kl"])
    assert found["updates"] == 1
    for weight, value in ours.policy.weights().items():
        torch.testing.assert_close(before[weight] - value, expected[weight], atol=2e-5, rtol=1e-3)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert found["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_the_pretraining_term_is_added_to_trls_gradient(chain: Chain, learner: Callable[..., Learner]) -> None:
    """Where every reply has one reward, it is all that moves the weights."""
    import torch

    from tasks.common.alignment.ptx import Term
    from tasks.common.text.shards import Mixture, Split

    ours = learner(
        "rloo", lambda _: 1.0, told={"beta": 0.0, "ptx": {**MIX, "weight": 0.5}}, optimizer=DESCENT, episodes=12,
        minibatch=12, missing_end_penalty=0.0,
    )  # fmt: skip
    mixture = Mixture(Split.open(chain.path("data/tokenize/shards") / "train"), 16, 4, MIX["mixture"], 1)
    ours.ptx = Term(0.5, mixture, ALONE)
    ids = torch.from_numpy(mixture.batch(0))
    loss = ours.policy.model(input_ids=ids, labels=ids).loss
    (0.5 * loss).backward()
    expected = {name: value.grad.clone() for name, value in ours.policy.model.named_parameters()}
    ours.policy.model.zero_grad()
    before = ours.policy.weights()
    assert iterate(ours, 0, 1.0)["ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in ours.policy.weights().items():
        torch.testing.assert_close(before[name] - value, expected[name], atol=2e-5, rtol=1e-3)


def test_rewards_that_are_all_alike_teach_dpo_nothing(learner: Callable[..., Learner]) -> None:
    """No pair is made up: the weights stay, and the figures say that there was none."""
    ours = learner("dpo", lambda _: 1.0, missing_end_penalty=0.0)
    before = ours.policy.weights()
    figures = iterate(ours, 0)
    assert (figures["pairs"], figures["updates"]) == (0, 0)
    assert all((before[name] == value).all() for name, value in ours.policy.weights().items())


# Learning


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_it_learns_what_is_rated(name: str, learner: Callable[..., Learner]) -> None:
    """Where people like one of the three tones, the policy takes it up."""
    ours = learner(
        name, lambda text: 2.0 if "obviously" in text else -2.0, episodes=32, minibatch=16,
        told={"epochs": 2}, optimizer={**OPTIMIZER, "weight_decay": 0.0},
    )  # fmt: skip
    found = [iterate(ours, iteration)["reward"] for iteration in range(7)]
    assert found[0] < 0.5
    assert np.mean(found[-2:]) > found[0] + 1.0


def test_dpo_raises_the_margin_of_peoples_pairs(chain: Chain, learner: Callable[..., Learner]) -> None:
    """Of what beats what in the rankings, against the tuned model, by log-probabilities read alone."""
    import torch

    table = tables.read(chain.path("data/validate/rankings")).to_pylist()
    ranked = pairs.of_rankings(chain.tokenizer(), table, Ranked.model_validate(RANKED))
    ours = learner("dpo", ranked=ranked, told={"pairs": RANKED}, episodes=12, minibatch=12)
    for iteration in range(4):
        figures = iterate(ours, iteration)
    assert figures["pairs"] == 6
    with torch.no_grad():
        sides = [
            [
                (logp(ours.policy.model, pair.prompt, reply) - logp(ours.policy.reference, pair.prompt, reply)).sum()
                for reply in (pair.chosen, pair.rejected)
            ]
            for pair in ranked
        ]
    assert np.mean([float(chosen - rejected) for chosen, rejected in sides]) > 1.0  # 0 at the start


def test_with_low_rank_updates_one_model_is_policy_and_reference(learner: Callable[..., Learner]) -> None:
    """TRL's copy of the updates is dropped: the tuned model is the one without any."""
    for name in ALTERNATIVES:
        ours = learner(name, method=LORA)
        assert list(ours.policy.model.peft_config) == ["default"]
        assert iterate(ours, 0, 1e-2)["kl"] == 0
        assert ours.sample(1)[1]["kl"] != 0
        assert all("lora_" in weight for weight in ours.policy.weights())


def test_trl_reports_to_nobody(learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch) -> None:
    """It would tell Hugging Face which trainer runs where."""
    import trl.trainer.base_trainer as base

    def sent(*_: Any, **__: Any) -> None:
        raise AssertionError("something was sent")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base, "send_telemetry", sent)
    for name in ALTERNATIVES:
        learner(name)


def test_several_gpus_in_one_process_are_refused(
    learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Trainer would put a copy of the model on each."""
    import torch

    from tasks.common.alignment import trl_trainers

    ours = learner("grpo")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    seen = replace(ours.policy, numerics=NUMERICS.model_copy(update={"device": "cuda"}))
    with pytest.raises(StageError, match="2 GPUs are visible, and grpo trains on one: name it"):
        trl_trainers.trainer_of(
            ours.config, ours.sampler, seen, ours.tokenizer, lambda: None, [], list, list, "nowhere"
        )


# Pairs


def test_a_questions_best_and_worst_replies_make_a_pair() -> None:
    """Ties make none."""
    replies = [[1], [2], [3], [4], [5], [6]]
    found = pairs.of_replies([[0]] * 3 + [[9]] * 3, replies, [0.5, -1.0, 2.0, 1.0, 1.0, 1.0], 3)
    assert found == [Pair([0], [3], [2])]
    assert found[0].row == {"prompt_ids": [0], "chosen_ids": [3], "rejected_ids": [2]}


def test_people_s_pairs_are_the_policy_s_share_of_the_training_rankings(chain: Chain) -> None:
    """Each response that beats another; a reply ends with the end token; none of what the judge learns from."""
    tokenizer = chain.tokenizer()
    table = tables.read(chain.path("data/validate/rankings")).to_pylist()
    found = pairs.of_rankings(tokenizer, table, Ranked.model_validate(RANKED))
    all_of = pairs.of_rankings(tokenizer, table, Ranked.model_validate({**RANKED, "judge_share": 0.0}))
    train = [row for row in table if row["split"] == "train"]
    four = [row for row in train if row["scores"]]
    assert len(all_of) == 6 * len(four) + 2 * (len(train) - len(four))
    assert 0 < len(found) < len(all_of)
    assert all(pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_token_id for pair in found)
    texts = [tokenizer.decode(pair.chosen, skip_special_tokens=True).strip() for pair in all_of]
    assert "It was good." in texts
    assert not any("terrible" in text for text in texts)


def test_rankings_that_give_no_pair_are_refused(chain: Chain) -> None:
    """Where all of them are held out, and where the model cannot read one to its end."""
    tokenizer, settings = chain.tokenizer(), Ranked.model_validate(RANKED)
    table = tables.read(chain.path("data/validate/rankings")).to_pylist()
    with pytest.raises(StageError, match="no response that beats another, so"):
        pairs.of_rankings(tokenizer, [{**row, "split": "heldout"} for row in table], settings)
    long = [{**row, "responses": [f"{text} {'word ' * 80}" for text in row["responses"]]} for row in table]
    with pytest.raises(StageError, match=r"ranking rated-\d+ takes \d+ tokens .* the model reads 64: lower validate"):
        pairs.of_rankings(tokenizer, long, settings)


# The stage


@pytest.mark.parametrize(("name", "changes"), [("dpo", {"method": LORA}), ("rloo", {"optimizer": MUON}), ("grpo", {})])
def test_a_reward_that_fails_stops_it_and_it_goes_on_to_the_same_bytes(
    name: str, changes: dict[str, Any], chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the judge's name and the prompts' ids; and what the stage leaves is what PPO leaves."""
    algorithm = {**ALTERNATIVES[name], "ptx": MIX}
    settings = config("ppo", algorithm=algorithm, iterations=2, episodes=8, minibatch=4, **changes)
    store = Checkpoints(url=str(tmp_path / "store"), every_seconds=1e9)
    opened, asked = rewards.open_judge, 0

    def open_judge(*told: Any) -> Any:
        judge = opened(*told)

        def fails_once(prompts: Any, replies: Any) -> Any:
            nonlocal asked
            asked += 1
            scores = list(judge(prompts, replies))
            return [float("nan"), *scores[1:]] if asked == 2 else scores

        return fails_once

    monkeypatch.setattr(rewards, "open_judge", open_judge)
    first = chain.job("ppo", settings, tmp_path / "first", checkpoints=store)
    with pytest.raises(StageError, match=r"data/reward/policy/model could not be used: 1 of its 8 .* prompts: \w+"):
        chain.run(first, settings)
    again = chain.job("ppo", settings, tmp_path / "again", checkpoints=store)
    chain.run(again, settings)
    assert again.figures["resumed_at_step"] == 1
    whole = chain.job("ppo", settings, tmp_path / "whole")
    metrics = chain.run(whole, settings)
    for output, file in (("model", "model.safetensors"), ("history", "")):
        assert (again.outputs[output] / file).read_bytes() == (whole.outputs[output] / file).read_bytes()
    assert metrics["algorithm"] == name
    assert metrics["kl_first"] == 0
    assert {f"{figure}_{end}" for figure in ppo.FIGURES for end in ("first", "last")} < metrics.keys()
    with whole.outputs["history"].open(newline="") as curves:
        rows = list(csv.DictReader(curves))
    assert [bool(row["exact_match"]) for row in rows] == [True, False, True]
    assert [bool(row["policy_loss"]) for row in rows] == [True, True, False]
    plain = models.load_decoder(whole.outputs["model"], NUMERICS)
    tuned = models.load_decoder(chain.path("data/finetune/model"), NUMERICS)
    assert plain.config.to_dict().keys() == tuned.config.to_dict().keys()


# Settings


@pytest.fixture
def params() -> dict[str, Any]:
    """Return the smoke profile, whose ppo section takes other algorithms."""
    return read_params(ROOT / "profiles" / "smoke.yaml")


def refused(params: dict[str, Any], stages: Sequence[str] = ()) -> list[str]:
    """Return what is told of settings."""
    with pytest.raises(SettingsError) as told:
        check(params, stages=stages)
    return [line.strip() for line in str(told.value).splitlines()[1:]]


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_each_is_taken_by_its_name_alone(name: str, params: dict[str, Any]) -> None:
    params["ppo"]["algorithm"] = ALTERNATIVES[name]
    check(params, stages=["ppo"])


def test_an_unknown_algorithm_is_told_which_there_are(params: dict[str, Any]) -> None:
    params["ppo"]["algorithm"] = {"name": "reinforce"}
    assert refused(params) == [
        "ppo.algorithm.name: found 'reinforce', but it should be one of ppo, dpo, rloo, grpo"
    ]  # fmt: skip


def test_what_an_algorithm_cannot_use_is_no_key_of_it(params: dict[str, Any]) -> None:
    params["ppo"]["algorithm"] = {**ALTERNATIVES["rloo"], "value_clip": 0.5}
    (line,) = refused(params)
    assert line.startswith("ppo.algorithm.value_clip: unknown key (found 0.5); there are ")
    assert "generations, beta, clip" in line
    params["ppo"]["algorithm"] = {**ALTERNATIVES["dpo"], "loss": {"name": "ipo", "flipped": 0.1}}
    assert refused(params)[0].startswith("ppo.algorithm.loss.flipped: unknown key")


@pytest.mark.parametrize(
    ("name", "told", "changes", "expected"),
    [
        ("grpo", {"generations": 3}, {}, "ppo.episodes: found 16, but it should be a multiple of ppo.algorithm.gen"),
        ("rloo", {}, {"minibatch": 6}, "ppo.episodes: found 16, but it should be a multiple of ppo.minibatch (6)"),
        ("dpo", {}, {"minibatch": 7}, "ppo.minibatch: found 7, but it should be even: dpo learns from pairs"),
        (
            "dpo", {"pairs": {"name": "sampled", "generations": 5}}, {},
            "ppo.episodes: found 16, but it should be a multiple of ppo.algorithm.pairs.generations (5)",
        ),
        (
            "dpo", {"pairs": {**RANKED, "judge_share": 0.1}}, {},
            "ppo.algorithm.pairs.judge_share: found 0.1, but reward.judge_share is ",
        ),
    ],
)  # fmt: skip
def test_replies_that_cannot_be_parted_are_refused(
    name: str, told: dict[str, Any], changes: dict[str, Any], expected: str, params: dict[str, Any]
) -> None:
    params["ppo"] |= {"algorithm": {**ALTERNATIVES[name], **told}, **changes}
    (line,) = refused(params)
    assert line.startswith(expected)


def test_several_processes_are_ppos(params: dict[str, Any]) -> None:
    """The stages before it may still train in several."""
    params["ppo"]["algorithm"] = ALTERNATIVES["grpo"]
    params["numerics"]["parallel"] = {"processes": 2, "engine": "data"}
    check(params, stages=["finetune"])
    (line,) = refused(params, stages=["ppo"])
    assert line.startswith("ppo.algorithm.name: found 'grpo', which trains in one process, but numerics.parallel.pro")
