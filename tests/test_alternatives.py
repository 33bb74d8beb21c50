"""DPO, RLOO and GRPO: updates against plain formulas, training raises the reward, and runs resume."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tasks.align import pairs, rewards
from tasks.align import stage as align
from tasks.align.by_trl import TrlLearner
from tasks.align.pairs import Pair
from tasks.align.policy import Policy
from tasks.align.rewards import Rankings
from tasks.common import tables
from tasks.common.defaults import read_settings
from tasks.common.harness.job import StageError
from tasks.common.modelling import models
from tasks.common.params_file import check
from tasks.common.settings import Checkpoints, SettingsError
from tasks.common.training.parallel import World
from tasks.common.training.updates import make_engine
from tests.conftest import ROOT
from tests.training_fixtures import (
    ALTERNATIVES,
    BASE_OPTIMIZER,
    LORA,
    NUMERICS,
    OPTIMIZER,
    PRETRAINING_MIX,
    Chain,
    chain,
    config,
)

if TYPE_CHECKING:
    import torch

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

SINGLE_PROCESS = World(0, 1, "data", "cpu")
RANKINGS_REWARD = {"name": "rankings", "path": "data/validate/rankings", "judge_share": 0.3, "input": "response"}
# Plain SGD, so that the change of the weights gives the gradient.
PLAIN_SGD = {
    "name": "sgd",
    **BASE_OPTIMIZER,
    "learning_rate": 1.0,
    "max_grad_norm": 1e9,
    "momentum": 0.0,
    "nesterov": False,
}
PLAIN_SGD["weight_decay"] = 0.0
MUON = {**OPTIMIZER, "name": "muon", "momentum": 0.95}  # two optimizers, which a trainer sees as one


@pytest.fixture
def learner(chain: Chain, tmp_path: Path) -> Callable[..., TrlLearner]:
    """Return a factory of learners on the tuned model whose reward counts letters; it takes settings of the stage."""

    def make(
        name: str, rate: Callable[[str], float] = lambda text: len(text) / 10, ranked: Sequence[Pair] = (),
        options: dict[str, Any] | None = None, **changes: Any,
    ) -> TrlLearner:  # fmt: skip
        settings = config("align@policy", algorithm={**ALTERNATIVES[name], **(options or {})}, **changes)
        tokenizer, path = chain.tokenizer(), chain.path("data/finetune/chat/model")
        policy = Policy.load(path, settings.method, None, NUMERICS, settings.temperature)
        table = tables.read(chain.path("data/validate/instructions")).to_pylist()
        return TrlLearner(
            settings.algorithm, align.make_sampler(settings, 1), policy,
            make_engine(settings.optimizer, policy.model, SINGLE_PROCESS),
            tokenizer, lambda prompts, replies: [rate(text) for text in replies], "a test",
            align.training_questions(tokenizer, table, settings.max_new_tokens), None, SINGLE_PROCESS, ranked,
            str(tmp_path / "nothing"),
        )  # fmt: skip

    return make


def iterate(learner: TrlLearner, iteration: int, rate: float = 1e-3) -> dict[str, float]:
    """Sample and update once; return the metrics."""
    rollout, figures = learner.sample(iteration)
    return figures | learner.iterate(rollout, iteration, rate, figures["kl"])


def logp(model: Any, prompt: list[int], reply: list[int]) -> "torch.Tensor":
    """Return the log-probabilities of a reply's tokens, computed alone and without padding."""
    import torch

    out = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(out, -1).gather(1, torch.tensor(reply)[:, None])[:, 0]


def add_noise(model: Any, size: float) -> None:
    """Add a little noise to all weights."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


# One step


def reference_loss(ours: TrlLearner, rollout: Any) -> "torch.Tensor":
    """Return the papers' loss of an iteration's replies, at the weights that sampled them."""
    import torch

    losses, algorithm = [], ours.config
    n, beta = len(rollout.replies), algorithm.beta
    prompt_ids = [prompt.ids for prompt in rollout.prompts]
    both = [
        (logp(ours.policy.model, prompt, reply), logp(ours.policy.reference, prompt, reply).detach())
        for prompt, reply in zip(prompt_ids, rollout.replies, strict=True)
    ]
    if algorithm.name == "dpo":
        for four in (range(start, start + 4) for start in range(0, n, 4)):
            best, worst = max(four, key=rollout.scores.__getitem__), min(four, key=rollout.scores.__getitem__)
            margin = (both[best][0] - both[best][1]).sum() - (both[worst][0] - both[worst][1]).sum()
            losses.append(-torch.nn.functional.logsigmoid(beta * margin))
        return torch.stack(losses).mean()
    for place, (mine, tuned) in enumerate(both):
        others = [other for other in range(place // 4 * 4, place // 4 * 4 + 4) if other != place]
        if algorithm.name == "rloo":  # the price is a part of the reward; one ratio a reply
            penalized_rewards = [rollout.scores[i] - beta * (both[i][0] - both[i][1]).detach().sum() for i in range(n)]
            advantage = penalized_rewards[place] - sum(penalized_rewards[i] for i in others) / 3
            losses.append(-advantage * (mine.sum() - mine.sum().detach()).exp())
        else:  # it is a part of the loss, k3 times the ratio (DeepSeek-V3.2); one ratio a token
            advantage = rollout.scores[place] - np.mean([rollout.scores[i] for i in (place, *others)])
            price = (tuned - mine).exp() - (tuned - mine) - 1
            losses.append(((-advantage + beta * price) * (mine - mine.detach()).exp()).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_update_is_the_gradient_of_the_papers_loss(name: str, learner: Callable[..., TrlLearner]) -> None:
    """The first update on all replies of an iteration, with a policy that already differs from the tuned model."""
    import torch

    ours = learner(name, optimizer=PLAIN_SGD, episodes=12, minibatch=12, options={"beta": 0.3})
    add_noise(ours.policy.model, 0.02)
    rollout, figures = ours.sample(0)
    assert figures["kl"] > 0
    ours.policy.model.zero_grad()
    reference_loss(ours, rollout).backward()
    expected = {name: value.grad.clone() for name, value in ours.policy.model.named_parameters()}
    ours.policy.model.zero_grad()
    before = ours.policy.weights()
    metrics = ours.iterate(rollout, 0, 1.0, figures["kl"])
    assert metrics["updates"] == 1
    for weight, value in ours.policy.weights().items():
        torch.testing.assert_close(before[weight] - value, expected[weight], atol=2e-5, rtol=1e-3)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_the_pretraining_term_is_added_to_trls_gradient(chain: Chain, learner: Callable[..., TrlLearner]) -> None:
    """With equal rewards the pretraining term is the whole gradient."""
    import torch

    from tasks.align.ptx import PtxTerm
    from tasks.common.text.mixtures import Mixture
    from tasks.common.text.shards import Split

    ours = learner(
        "rloo", lambda _: 1.0, options={"beta": 0.0, "ptx": {**PRETRAINING_MIX, "weight": 0.5}}, optimizer=PLAIN_SGD,
        episodes=12,
        minibatch=12, missing_eos_penalty=0.0,
    )  # fmt: skip
    mixture = Mixture(Split.open(chain.path("data/tokenize/shards") / "train"), 16, 4, PRETRAINING_MIX["mixture"], 1)
    ours.ptx = PtxTerm(0.5, mixture, SINGLE_PROCESS)
    ids = torch.from_numpy(mixture.batch(0))
    loss = ours.policy.model(input_ids=ids, labels=ids).loss
    (0.5 * loss).backward()
    expected = {name: value.grad.clone() for name, value in ours.policy.model.named_parameters()}
    ours.policy.model.zero_grad()
    before = ours.policy.weights()
    assert iterate(ours, 0, 1.0)["ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in ours.policy.weights().items():
        torch.testing.assert_close(before[name] - value, expected[name], atol=2e-5, rtol=1e-3)


def test_dpo_without_a_reward_difference_makes_no_update(learner: Callable[..., TrlLearner]) -> None:
    """There is no pair, the weights stay, and the metrics report 0 pairs."""
    ours = learner("dpo", lambda _: 1.0, missing_eos_penalty=0.0)
    before = ours.policy.weights()
    figures = iterate(ours, 0)
    assert (figures["pairs"], figures["updates"]) == (0, 0)
    assert all((before[name] == value).all() for name, value in ours.policy.weights().items())


# Learning


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_each_algorithm_learns_the_rewarded_tone(name: str, learner: Callable[..., TrlLearner]) -> None:
    """One of three tones is rewarded, and the reward rises."""
    ours = learner(
        name, lambda text: 2.0 if "obviously" in text else -2.0, episodes=32, minibatch=16,
        options={"epochs": 2}, optimizer={**OPTIMIZER, "weight_decay": 0.0},
    )  # fmt: skip
    rewards = [iterate(ours, iteration)["reward"] for iteration in range(7)]
    assert rewards[0] < 0.5
    assert np.mean(rewards[-2:]) > rewards[0] + 1.0


def test_dpo_raises_the_margin_of_peoples_pairs(chain: Chain, learner: Callable[..., TrlLearner]) -> None:
    """The margin is relative to the tuned model, with log-probabilities computed alone."""
    import torch

    table = tables.read(chain.path("data/validate/rankings")).to_pylist()
    ranked = pairs.from_rankings(chain.tokenizer(), table, Rankings.model_validate(RANKINGS_REWARD)).pairs
    ours = learner("dpo", ranked=ranked, episodes=12, minibatch=12)
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


def test_dpo_on_rankings_reports_the_implicit_reward(learner: Callable[..., TrlLearner]) -> None:
    """It is beta × (log-probability under the policy - under the reference) of a reply; 0 before any update."""

    ours = learner("dpo", ranked=[Pair([5], [6], [7])])
    assert ours.sample(0)[1]["reward"] == 0
    add_noise(ours.policy.model, 0.02)
    rollout, figures = ours.sample(1)
    wanted = []
    for prompt, reply in zip(rollout.prompts, rollout.replies, strict=True):
        gap = logp(ours.policy.model, prompt.ids, reply) - logp(ours.policy.reference, prompt.ids, reply)
        wanted.append(ours.beta * float(gap.sum().detach()))
    assert rollout.scores == pytest.approx(wanted, abs=1e-4)
    assert figures["reward"] == pytest.approx(ours.beta * figures["kl"], abs=1e-5)


def test_with_low_rank_updates_one_model_is_policy_and_reference(learner: Callable[..., TrlLearner]) -> None:
    """TRL's copy of the adapter is deleted: the reference is the model without adapters."""
    for name in ALTERNATIVES:
        ours = learner(name, method=LORA)
        assert list(ours.policy.model.peft_config) == ["default"]
        assert iterate(ours, 0, 1e-2)["kl"] == 0
        assert ours.sample(1)[1]["kl"] != 0
        assert all("lora_" in weight for weight in ours.policy.weights())


def test_trl_sends_no_telemetry(learner: Callable[..., TrlLearner], monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL would report the trainer's class to Hugging Face."""
    import trl.trainer.base_trainer as base

    def fail_on_telemetry(*_: Any, **__: Any) -> None:
        raise AssertionError("something was sent")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base, "send_telemetry", fail_on_telemetry)
    for name in ALTERNATIVES:
        learner(name)


def test_several_gpus_in_one_process_are_rejected(
    learner: Callable[..., TrlLearner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Trainer would replicate the model on each."""
    import torch

    from tasks.align import trl_trainers

    ours = learner("grpo")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    seen = replace(ours.policy, numerics=NUMERICS.model_copy(update={"device": "cuda"}))
    with pytest.raises(StageError, match="2 GPUs are visible, and grpo trains on one: select it"):
        trl_trainers.make_trainer(
            ours.config, ours.sampler, seen, ours.tokenizer, lambda: None, [], list, list, "nowhere",
            activation_checkpointing=False,
        )  # fmt: skip


# Pairs


def test_a_questions_best_and_worst_replies_make_a_pair() -> None:
    """Ties make none."""
    replies = [[1], [2], [3], [4], [5], [6]]
    preference_pairs = pairs.from_replies([[0]] * 3 + [[9]] * 3, replies, [0.5, -1.0, 2.0, 1.0, 1.0, 1.0], 3)
    assert pairs.from_replies([[0]] * 2, [[7], [7]], [0.5, 1.0], 2) == []  # the same tokens
    assert preference_pairs == [Pair([0], [3], [2])]
    assert preference_pairs[0].trl_row == {"prompt_ids": [0], "chosen_ids": [3], "rejected_ids": [2]}


def test_pairs_exclude_rankings_reserved_for_judges(chain: Chain) -> None:
    """Each response beats another, and every reply ends with the end token."""
    tokenizer = chain.tokenizer()
    table = tables.read(chain.path("data/validate/rankings")).to_pylist()
    preference_pairs = pairs.from_rankings(tokenizer, table, Rankings.model_validate(RANKINGS_REWARD)).pairs
    everything = Rankings.model_validate({**RANKINGS_REWARD, "judge_share": 0.0})
    all_of = pairs.from_rankings(tokenizer, table, everything).pairs
    train = [row for row in table if row["split"] == "train"]
    four = [row for row in train if row["scores"]]
    assert len(all_of) == 6 * len(four) + 2 * (len(train) - len(four))
    assert 0 < len(preference_pairs) < len(all_of)
    assert all(pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_token_id for pair in preference_pairs)
    texts = [tokenizer.decode(pair.chosen, skip_special_tokens=True).strip() for pair in all_of]
    assert "It was good." in texts
    assert not any("terrible" in text for text in texts)


def test_rankings_without_pairs_are_rejected(chain: Chain) -> None:
    """All rankings are held out, or a response exceeds the model's context."""
    tokenizer, settings = chain.tokenizer(), Rankings.model_validate(RANKINGS_REWARD)
    table = tables.read(chain.path("data/validate/rankings")).to_pylist()
    with pytest.raises(StageError, match="no response that beats another, so"):
        pairs.from_rankings(tokenizer, [{**row, "split": "heldout"} for row in table], settings)
    long = [{**row, "responses": [f"{text} {'word ' * 80}" for text in row["responses"]]} for row in table]
    with pytest.raises(StageError, match=r"no preference pair .* longer than the model's context of 64 tokens"):
        pairs.from_rankings(tokenizer, long, settings)


def test_unusable_pairs_are_rejected_and_named(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    """Replies of the same tokens, replies beyond the context, and texts that spell a special token of the tokenizer."""
    tokenizer = chain.tokenizer()
    settings = Rankings.model_validate({**RANKINGS_REWARD, "judge_share": 0.0})
    good = next(row for row in tables.read(chain.path("data/validate/rankings")).to_pylist() if row["split"] == "train")
    two = {**good, "ranks": [1, 2], "scores": None, "scale": None}
    unusable = [
        {**two, "id": "same", "responses": ["It is so.", "It is so."]},
        {**two, "id": "long", "responses": ["It is so.", "word " * 80]},
        {**two, "id": "control", "responses": ["It is so.", "Not so. <|user|>"]},
    ]
    usable = {**two, "id": "empty", "responses": ["It is so.", ""]}
    found = pairs.from_rankings(tokenizer, [*unusable, usable], settings)
    assert [pair.rejected for pair in found.pairs] == [[tokenizer.eos_token_id]]
    assert found.figures == {
        "rejected_pairs": {"control_token": 1, "too_long": 1, "same_tokens": 1},
        "rejected_rankings": ["control", "same", "long"],
    }
    printed = capsys.readouterr().out
    assert "1 pairs are the same tokens (rankings same)" in printed
    assert "1 rankings spell a special token of the model's tokenizer (rankings control)" in printed
    with pytest.raises(StageError, match=r"no preference pair can be used; .* 1 pairs are the same tokens"):
        pairs.from_rankings(tokenizer, unusable[:1], settings)


# The stage


@pytest.mark.parametrize(("name", "changes"), [("dpo", {"method": LORA}), ("rloo", {"optimizer": MUON}), ("grpo", {})])
def test_failed_reward_stops_the_run_and_resume_gives_the_same_bytes(
    name: str, changes: dict[str, Any], chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the reward and the prompts' ids; the outputs have PPO's format."""
    algorithm = {**ALTERNATIVES[name], "ptx": PRETRAINING_MIX}
    settings = config("align@policy", algorithm=algorithm, iterations=2, episodes=8, minibatch=4, **changes)
    store = Checkpoints(url=str(tmp_path / "store"), every_seconds=1e9)
    original, calls = rewards.open_reward, 0

    def open_reward(*arguments: Any) -> Any:
        judge = original(*arguments)

        def fails_once(prompts: Any, replies: Any) -> Any:
            nonlocal calls
            calls += 1
            scores = list(judge(prompts, replies))
            return [float("nan"), *scores[1:]] if calls == 2 else scores

        return fails_once

    monkeypatch.setattr(rewards, "open_reward", open_reward)
    first = chain.job("align@policy", settings, tmp_path / "first", checkpoints=store)
    with pytest.raises(StageError, match=r"data/reward/train/model could not be used: 1 of its 8 .* prompts: \w+"):
        chain.run(first, settings)
    again = chain.job("align@policy", settings, tmp_path / "again", checkpoints=store)
    chain.run(again, settings)
    assert again.figures["resumed_at_step"] == 1
    whole = chain.job("align@policy", settings, tmp_path / "whole")
    metrics = chain.run(whole, settings)
    for output, file in (("model", "model.safetensors"), ("history", "")):
        assert (again.outputs[output] / file).read_bytes() == (whole.outputs[output] / file).read_bytes()
    assert metrics["algorithm"] == name
    assert metrics["kl_first"] == 0
    assert {f"{figure}_{end}" for figure in align.SUMMARY_METRICS for end in ("first", "last")} < metrics.keys()
    with whole.outputs["history"].open(newline="") as curves:
        rows = list(csv.DictReader(curves))
    assert [bool(row["exact_match"]) for row in rows] == [True, False, True]
    assert [bool(row["policy_loss"]) for row in rows] == [True, True, False]
    plain = models.load_decoder(whole.outputs["model"], NUMERICS)
    tuned = models.load_decoder(chain.path("data/finetune/chat/model"), NUMERICS)
    assert plain.config.to_dict().keys() == tuned.config.to_dict().keys()


# Settings


@pytest.fixture
def params() -> dict[str, Any]:
    """Return the smoke profile's settings."""
    return read_settings(ROOT / "profiles" / "smoke.yaml")


def rejection_lines(params: dict[str, Any], stages: Sequence[str] = ()) -> list[str]:
    """Return the lines of a SettingsError without its headline."""
    with pytest.raises(SettingsError) as error:
        check(params, stages=stages)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_each_algorithm_is_selected_by_name(name: str, params: dict[str, Any]) -> None:
    params["align"]["policy"]["algorithm"] = ALTERNATIVES[name]
    check(params, stages=["align@policy"])


def test_an_unknown_algorithm_error_lists_the_choices(params: dict[str, Any]) -> None:
    params["align"]["policy"]["algorithm"] = {"name": "reinforce"}
    assert rejection_lines(params) == [
        "align.policy.algorithm.name: found 'reinforce', but it should be one of ppo, dpo, rloo, grpo"
    ]  # fmt: skip


def test_settings_of_another_algorithm_are_unknown_keys(params: dict[str, Any]) -> None:
    params["align"]["policy"]["algorithm"] = {**ALTERNATIVES["rloo"], "vf_clip_range": 0.5}
    (line,) = rejection_lines(params)
    assert line.startswith("align.policy.algorithm.vf_clip_range: unknown key (found 0.5); there are ")
    assert "generations, beta, clip_range" in line
    params["align"]["policy"]["algorithm"] = {**ALTERNATIVES["dpo"], "loss": {"name": "ipo", "flipped": 0.1}}
    assert rejection_lines(params)[0].startswith("align.policy.algorithm.loss.flipped: unknown key")


@pytest.mark.parametrize(
    ("name", "options", "changes", "expected"),
    [
        (
            "grpo", {"generations": 3}, {},
            "align.policy.episodes: found 16, but it should be a multiple of align.policy.algorithm.generations",
        ),
        (
            "rloo", {}, {"minibatch": 6},
            "align.policy.episodes: found 16, but it should be a multiple of align.policy.minibatch (6)",
        ),
        ("dpo", {}, {"minibatch": 7}, "align.policy.minibatch: found 7, but it should be even: dpo learns from pairs"),
        (
            "dpo", {"generations": 5}, {},
            "align.policy.episodes: found 16, but it should be a multiple of align.policy.algorithm.generations (5)",
        ),
        (
            "dpo", {}, {"reward": {**RANKINGS_REWARD, "judge_share": 0.1}},
            "align.policy.reward.judge_share: found 0.1, but reward.train.judge_share is 0.3",
        ),
    ],
)  # fmt: skip
def test_indivisible_episodes_are_rejected(
    name: str, options: dict[str, Any], changes: dict[str, Any], expected: str, params: dict[str, Any]
) -> None:
    params["align"]["policy"] |= {"algorithm": {**ALTERNATIVES[name], **options}, **changes}
    (line,) = rejection_lines(params)
    assert line.startswith(expected)


def test_only_ppo_supports_several_processes(params: dict[str, Any]) -> None:
    """Earlier stages may still train in several processes."""
    params["align"]["policy"]["algorithm"] = ALTERNATIVES["grpo"]
    params["numerics"]["parallel"] = {"processes": 2, "engine": "data"}
    check(params, stages=["finetune@chat"])
    (line,) = rejection_lines(params, stages=["align@policy"])
    assert line.startswith(
        "align.policy.algorithm.name: found 'grpo', which trains in one process, but numerics.parallel.pro"
    )
