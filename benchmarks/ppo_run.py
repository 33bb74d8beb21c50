"""One side of `benchmarks/ppo.py`, in a process of its own: `python -m benchmarks.ppo_run FILE`."""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import harness
from benchmarks.harness import BenchmarkError
from benchmarks.ppo_work import END, LENGTH, PAD, Work, asked_as, fresh_work, tuned_work
from tasks.common.alignment.learner import Sampler
from tasks.common.alignment.policy import Method, Policy
from tasks.common.alignment.proximal import Kl, Proximal, Trainer
from tasks.common.alignment.ptx import Ptx
from tasks.common.evaluation import sampling
from tasks.common.modelling import bfloat16, models
from tasks.common.modelling.methods import Full, Lora, Top
from tasks.common.settings import Dtypes, Numerics, Parallel
from tasks.common.stage import peak_memory, write_json
from tasks.common.text.chat import Question
from tasks.common.training.optimizers import AdamW, Constant, Cosine, rate_at
from tasks.common.training.parallel import World
from tasks.common.training.updates import begun

LORA = Lora(
    name="lora", rank=16, alpha=32, dropout=0.0, rank_stabilized=False, dora=False, targets="all-linear"
)  # fmt: skip
METHODS: dict[str, tuple[Method, float]] = {  # on one backbone, each with its highest learning rate
    "last-block": (Top(name="top", layers=1), 3.5e-3), "low-rank": (LORA, 6e-3),
}  # fmt: skip
WHOLE: tuple[Method, float] = Full(name="full"), 3e-4  # of all other sides, at one rate throughout


def ours(request: dict[str, Any], work: Work) -> Trainer:
    """Return our trainer."""
    import torch

    method, _ = METHODS.get(request["side"], WHOLE)
    like = isinstance(method, Full)
    narrow = not like and (request["device"] == "cuda" or bfloat16.built_in())
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if narrow else "float32"
    numerics = Numerics(
        device=request["device"], threads=request["threads"], dtype=Dtypes(decoder=dtype, encoder="float32"),
        attention="sdpa", compile="never", recompute=False, parallel=Parallel(processes=1, engine="data"),
    )  # fmt: skip
    models.prepare_torch(numerics, 1)
    torch.use_deterministic_algorithms(False)
    config = Proximal(
        name="ppo", epochs=work.epochs, discount=1.0, trace=0.95, clip=0.2, whiten_rewards=False, entropy=0.0,
        values="separate" if like else "shared", value_clip=work.value_clip, value_weight=0.1, value_warmup=0,
        average=None, kl=Kl(estimator="k1", coefficient=work.kl, target=6.0, horizon=0, stop=None),
        ptx=Ptx(weight=0.0, batch=1, window=16, mixture={"all": 1.0}),
    )  # fmt: skip
    policy = Policy.load(work.folder, method, config.values, numerics, temperature=1.0)
    world = World(0, 1, "data", request["device"])
    sampler = Sampler(request["episodes"], work.minibatch, work.reply, 1.0, work.missing_end_penalty, request["seed"])
    return Trainer(
        config, sampler, policy, begun(rule_of(request), policy.model, world), work.tokenizer, work.judge,
        "the benchmark's", work.questions, None, world,
    )  # fmt: skip


def rule_of(request: dict[str, Any]) -> AdamW:
    """Return a side's update rule; that of a single step has so large an epsilon that it is nearly the gradient."""
    _, rate = METHODS.get(request["side"], WHOLE)
    falls = Cosine(name="cosine", warmup=0.05, floor=0.1)  # as in the default profile
    return AdamW(
        name="adamw", learning_rate=rate, weight_decay=0.0, clip=1e9, betas=[0.9, 0.999], epsilon=epsilon_of(request),
        schedule=falls if request["side"] in METHODS else Constant(name="constant", warmup=0.0),
    )  # fmt: skip


def run_ours(request: dict[str, Any], work: Work) -> dict[str, Any]:
    """Sample and learn for some iterations, the first of which is not timed where there are several."""
    trainer, rule = ours(request, work), rule_of(request)
    seen, clock = [], [time.perf_counter()]
    for iteration in range(request["iterations"]):
        rollout, figures = trainer.sample(iteration)
        trainer.iterate(rollout, iteration, rate_at(rule, iteration, request["iterations"]), figures["kl"])
        clock.append(time.perf_counter())
        seen.append((figures["reward"], figures["kl"]))
    return figures_of(clock, seen, request["episodes"])


def run_trl(request: dict[str, Any], work: Work) -> dict[str, Any]:
    """Let TRL do the same."""
    trainer, clock, seen, _ = trl(request, work, work.epochs)
    trainer.train()
    told = [(metrics["objective/scores"], metrics["objective/kl"]) for metrics in seen]
    return figures_of(clock, told, request["episodes"])


def figures_of(clock: Sequence[float], seen: Sequence[tuple[float, float]], episodes: int) -> dict[str, float]:
    """Return the speed, the first reward, and reward and KL as the means of the last five iterations.

    `clock` holds the start and the end of every iteration.
    """
    timed = clock[1:] if len(clock) > 2 else clock
    reward, kl = (sum(values) / len(values) for values in zip(*seen[-5:], strict=True))
    speed = (len(timed) - 1) * episodes / (timed[-1] - timed[0])
    return {"episodes_per_second": speed, "reward_first": seen[0][0], "reward_last": reward, "kl_last": kl}


def trl(request: dict[str, Any], work: Work, epochs: int) -> Any:
    """Return TRL's trainer, what its iterations fill (moments, beginning with now, and figures), and its policy."""
    sys.path.insert(0, request["peer"])
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

    torch.set_num_threads(request["threads"])
    episodes = request["episodes"]
    args = PPOConfig(
        output_dir=str(Path(request["scratch"]) / "out"), per_device_train_batch_size=episodes,
        gradient_accumulation_steps=1, num_mini_batches=episodes // work.minibatch,
        total_episodes=episodes * request["iterations"], num_ppo_epochs=epochs, response_length=work.reply,
        local_rollout_forward_batch_size=episodes, num_sample_generations=0, report_to=[], stop_token="eos",
        use_cpu=request["device"] == "cpu", bf16=False, save_strategy="no", learning_rate=WHOLE[1],
        lr_scheduler_type="constant", kl_coef=work.kl, cliprange_value=work.value_clip, temperature=1.0,
        missing_eos_penalty=work.missing_end_penalty or None, seed=request["seed"], logging_strategy="no",
        adam_epsilon=epsilon_of(request),
    )  # fmt: skip
    value = AutoModelForSequenceClassification.from_pretrained(work.folder, num_labels=1)
    policy, reference = (AutoModelForCausalLM.from_pretrained(work.folder) for _ in range(2))
    torch.nn.init.zeros_(value.score.weight)
    dataset = Dataset.from_list([{"input_ids": question.ids} for question in work.questions])
    trainer = PPOTrainer(
        args=args, processing_class=work.tokenizer, model=policy, ref_model=reference, reward_model=work.scorer,
        value_model=value, train_dataset=dataset, eval_dataset=dataset.select(range(2)),
    )  # fmt: skip
    clock = [time.perf_counter()]
    seen: list[dict[str, float]] = []

    def log(metrics: dict[str, float], *_: Any, **__: Any) -> None:
        clock.append(time.perf_counter())
        seen.append(metrics)

    trainer.log = log
    return trainer, clock, seen, policy


def epsilon_of(request: dict[str, Any]) -> float:
    """Return Adam's epsilon: 1 for the single step, which is then nearly the gradient, and not its signs alone."""
    return 1.0 if request["side"] == "one-step" else 1e-8


def one_step(request: dict[str, Any], work: Work) -> dict[str, Any]:
    """Take one step on both sides on the replies that TRL sampled, and compare losses and new weights."""
    trainer, _, seen, policy = trl(request, work, epochs=1)
    from trl.experimental.ppo import ppo_trainer

    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    sampled: list[Any] = []
    generate = ppo_trainer.batch_generation

    def keep(*arguments: Any, **named: Any) -> Any:
        found = generate(*arguments, **named)
        sampled.append(found[0].clone())
        return found

    ppo_trainer.batch_generation = keep
    trainer.train()
    ids = sampled[0]
    if bool(((ids[:, LENGTH:] == PAD) | (ids[:, LENGTH:] == END)).any()):
        raise BenchmarkError("TRL has sampled an end or padding, which the two sides read differently: another seed.")
    mine = ours(request, work)
    mine.prompts = [Question(str(i), asked_as(row), row) for i, row in enumerate(ids[:, :LENGTH].tolist())]
    replies = ids[:, LENGTH:].tolist()
    # The sampler hands out TRL's replies, in the order that ours draws the prompts in.
    sampling.replies = lambda model, tokenizer, prompts, **_: [
        replies[next(i for i, row in enumerate(ids[:, :LENGTH].tolist()) if row == prompt)] for prompt in prompts
    ]

    class Straight:
        """A generator that draws every prompt once, in order."""

        def choice(self, size: int, count: int) -> Any:
            """Return the places in order."""
            return np.arange(count)

    np.random.default_rng = lambda *_: Straight()  # type: ignore[assignment]
    rollout, _ = mine.sample(0)
    figures = mine.update(rollout, np.arange(len(ids)), WHOLE[1])
    moved = mine.policy.weights()
    theirs = policy.state_dict()
    largest, difference = 0.0, 0.0
    for name, start in before.items():
        if name in moved:
            largest = max(largest, float((theirs[name] - start).abs().max()))
            difference = max(difference, float((moved[name] - theirs[name]).abs().max()))
    return {
        "policy_loss": figures["policy_loss"], "value_loss": figures["value_loss"],
        "trl_policy_loss": seen[0]["loss/policy_avg"], "trl_value_loss": seen[0]["loss/value_avg"],
        "difference": difference / largest,
    }  # fmt: skip


def memory(device: str) -> int:
    """Return the most bytes that this process has held: of the GPU's memory, or of the machine's."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()


def main() -> None:
    """Do what the request says and leave the figures."""
    request = harness.read_request()
    with tempfile.TemporaryDirectory(prefix="bessemer-ppo-") as scratch:
        request["scratch"] = scratch
        work = tuned_work(request) if request["shape"] is None else fresh_work(request, Path(scratch) / "model")
        sides = {"trl": run_trl, "one-step": one_step}
        figures = sides.get(request["side"], run_ours)(request, work)
    figures |= {"peak_memory": memory(request["device"]), "bfloat16": bfloat16.built_in()}
    write_json(Path(request["result"]), figures)


if __name__ == "__main__":
    main()
