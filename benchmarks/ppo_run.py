"""One side of `benchmarks/ppo.py`: `python -m benchmarks.ppo_run FILE`."""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import harness
from benchmarks.harness import BenchmarkError
from benchmarks.ppo_work import END_ID, PAD_ID, PROMPT_TOKENS, Setup, fresh_setup, prompt_messages, tuned_setup
from tasks.align import learner
from tasks.align.learner import SamplingConfig
from tasks.align.policy import Method, Policy
from tasks.align.proximal import Kl, Ppo, PpoTrainer
from tasks.align.ptx import Ptx
from tasks.common.generation import sampling
from tasks.common.harness.records import peak_memory, write_json
from tasks.common.modelling import torch_setup
from tasks.common.modelling.methods import Full, Lora, TopLayers
from tasks.common.overrides import bfloat16
from tasks.common.settings import Dtypes, Numerics, Parallel
from tasks.common.text.chat import Question
from tasks.common.training.optimizers import AdamW, Constant, Cosine, learning_rate_at
from tasks.common.training.parallel import World
from tasks.common.training.updates import make_engine

LORA = Lora(
    name="lora", rank=16, alpha=32, dropout=0.0, rank_stabilized=False, dora=False, targets="all-linear"
)  # fmt: skip
METHODS: dict[str, tuple[Method, float]] = {  # methods on a shared backbone, with their peak learning rates
    "last-block": (TopLayers(name="top_layers", layers=1), 3.5e-3), "low-rank": (LORA, 6e-3),
}  # fmt: skip
FULL_METHOD: tuple[Method, float] = Full(name="full"), 3e-4  # method of the other sides, with a constant learning rate


def ours(request: dict[str, Any], work: Setup) -> PpoTrainer:
    """Return our trainer."""
    import torch

    method, _ = METHODS.get(request["side"], FULL_METHOD)
    like_for_like = isinstance(method, Full)
    use_bfloat16 = not like_for_like and (request["device"] == "cuda" or bfloat16.has_native_bfloat16())
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if use_bfloat16 else "float32"
    numerics = Numerics(
        device=request["device"], threads=request["threads"], dtype=Dtypes(decoder=dtype, encoder="float32"),
        attention="sdpa", compile="never",
        parallel=Parallel(processes=1, engine="data"),
    )  # fmt: skip
    torch_setup.prepare_torch(numerics, 1)
    torch.use_deterministic_algorithms(False)
    config = Ppo(
        name="ppo", epochs=work.epochs, gamma=1.0, gae_lambda=0.95, clip_range=0.2,
        whiten_rewards=False, entropy_coef=0.0,
        values="separate" if like_for_like else "shared", vf_clip_range=work.vf_clip_range, vf_coef=0.1,
        critic_warmup_iterations=0,
        ema_decay=None, kl=Kl(estimator="k1", coefficient=work.kl, target=6.0, horizon=0, stop=None),
        ptx=Ptx(weight=0.0, batch=1, window=16, mixture={"all": 1.0}),
    )  # fmt: skip
    policy = Policy.load(work.folder, method, config.values, numerics, temperature=1.0)
    world = World(0, 1, "data", request["device"])
    sampler = SamplingConfig(
        request["episodes"], work.minibatch, work.max_reply_tokens, 1.0, work.missing_eos_penalty, request["seed"]
    )
    return PpoTrainer(
        config, sampler, policy, make_engine(make_optimizer(request), policy.model, world), work.tokenizer,
        work.reward_fn, "the benchmark's", work.questions, None, world,
    )  # fmt: skip


def make_optimizer(request: dict[str, Any]) -> AdamW:
    """Return a side's optimizer settings."""
    _, rate = METHODS.get(request["side"], FULL_METHOD)
    falls = Cosine(name="cosine", warmup=0.05, floor=0.1)  # as in the default profile
    return AdamW(
        name="adamw", learning_rate=rate, weight_decay=0.0, max_grad_norm=1e9,
        betas=[0.9, 0.999], epsilon=epsilon_for(request),
        schedule=falls if request["side"] in METHODS else Constant(name="constant", warmup=0.0),
    )  # fmt: skip


def run_ours(request: dict[str, Any], work: Setup) -> dict[str, Any]:
    """Run our PPO for the requested iterations."""
    trainer, rule = ours(request, work), make_optimizer(request)
    rewards_and_kls, clock = [], [time.perf_counter()]
    for iteration in range(request["iterations"]):
        rollout, figures = trainer.sample(iteration)
        trainer.iterate(rollout, iteration, learning_rate_at(rule, iteration, request["iterations"]), figures["kl"])
        clock.append(time.perf_counter())
        rewards_and_kls.append((figures["reward"], figures["kl"]))
    return summarize(clock, rewards_and_kls, request["episodes"])


def run_trl(request: dict[str, Any], work: Setup) -> dict[str, Any]:
    """Run TRL's PPO for the requested iterations."""
    trainer, clock, logged, _ = make_trl_trainer(request, work, work.epochs)
    trainer.train()
    rewards_and_kls = [(metrics["objective/scores"], metrics["objective/kl"]) for metrics in logged]
    return summarize(clock, rewards_and_kls, request["episodes"])


def summarize(
    clock: Sequence[float], rewards_and_kls: Sequence[tuple[float, float]], episodes: int
) -> dict[str, float]:
    """Return episodes/s, the first reward, and the mean reward and KL of the last five iterations.

    `clock` contains the start time and the end time of every iteration. With several iterations, the first one is not
    timed.
    """
    timed = clock[1:] if len(clock) > 2 else clock
    reward, kl = (sum(values) / len(values) for values in zip(*rewards_and_kls[-5:], strict=True))
    speed = (len(timed) - 1) * episodes / (timed[-1] - timed[0])
    return {"episodes_per_second": speed, "reward_first": rewards_and_kls[0][0], "reward_last": reward, "kl_last": kl}


def make_trl_trainer(request: dict[str, Any], work: Setup, epochs: int) -> Any:
    """Return TRL's trainer, the lists of times and metrics that its iterations append to, and its policy."""
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
        total_episodes=episodes * request["iterations"], num_ppo_epochs=epochs, response_length=work.max_reply_tokens,
        local_rollout_forward_batch_size=episodes, num_sample_generations=0, report_to=[], stop_token="eos",
        use_cpu=request["device"] == "cpu", bf16=False, save_strategy="no", learning_rate=FULL_METHOD[1],
        lr_scheduler_type="constant", kl_coef=work.kl, cliprange_value=work.vf_clip_range, temperature=1.0,
        missing_eos_penalty=work.missing_eos_penalty or None, seed=request["seed"], logging_strategy="no",
        adam_epsilon=epsilon_for(request),
    )  # fmt: skip
    value = AutoModelForSequenceClassification.from_pretrained(work.folder, num_labels=1)
    policy, reference = (AutoModelForCausalLM.from_pretrained(work.folder) for _ in range(2))
    torch.nn.init.zeros_(value.score.weight)
    dataset = Dataset.from_list([{"input_ids": question.ids} for question in work.questions])
    trainer = PPOTrainer(
        args=args, processing_class=work.tokenizer, model=policy, ref_model=reference,
        reward_model=work.trl_reward_model, value_model=value, train_dataset=dataset,
        eval_dataset=dataset.select(range(2)),
    )  # fmt: skip
    clock = [time.perf_counter()]
    logged: list[dict[str, float]] = []

    def log(metrics: dict[str, float], *_: Any, **__: Any) -> None:
        clock.append(time.perf_counter())
        logged.append(metrics)

    trainer.log = log
    return trainer, clock, logged, policy


def epsilon_for(request: dict[str, Any]) -> float:
    """Return Adam's epsilon: 1 for the single step, so that the update is nearly the gradient instead of its sign."""
    return 1.0 if request["side"] == "one-step" else 1e-8


def one_step(request: dict[str, Any], work: Setup) -> dict[str, Any]:
    """Take one step on both sides with the replies that TRL sampled; compare the losses and the new weights."""
    trainer, _, logged, policy = make_trl_trainer(request, work, epochs=1)
    from trl.experimental.ppo import ppo_trainer

    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    sampled: list[Any] = []
    generate = ppo_trainer.batch_generation

    def record_replies(*arguments: Any, **named: Any) -> Any:
        found = generate(*arguments, **named)
        sampled.append(found[0].clone())
        return found

    ppo_trainer.batch_generation = record_replies
    trainer.train()
    ids = sampled[0]
    if bool(((ids[:, PROMPT_TOKENS:] == PAD_ID) | (ids[:, PROMPT_TOKENS:] == END_ID)).any()):
        raise BenchmarkError(
            "TRL sampled an end or padding token, which the two sides treat differently: use another seed."
        )
    our_trainer = ours(request, work)
    our_trainer.prompts = [
        Question(str(i), prompt_messages(row), row) for i, row in enumerate(ids[:, :PROMPT_TOKENS].tolist())
    ]
    replies = ids[:, PROMPT_TOKENS:].tolist()
    # Our sampler returns TRL's replies, in the order of our prompts.
    sampling.generate_replies = lambda model, tokenizer, prompts, **_: [
        replies[next(i for i, row in enumerate(ids[:, :PROMPT_TOKENS].tolist()) if row == prompt)] for prompt in prompts
    ]

    class InOrder:
        """A random generator that returns every prompt once, in order."""

        def choice(self, size: int, count: int, *, replace: bool) -> Any:
            """Return the indices in order."""
            return np.arange(count)

    vars(learner)["generator"] = lambda *_: InOrder()
    rollout, _ = our_trainer.sample(0)
    figures = our_trainer.update(rollout, np.arange(len(ids)), FULL_METHOD[1])
    new_weights = our_trainer.policy.weights()
    theirs = policy.state_dict()
    largest, difference = 0.0, 0.0
    for name, start in before.items():
        if name in new_weights:
            largest = max(largest, float((theirs[name] - start).abs().max()))
            difference = max(difference, float((new_weights[name] - theirs[name]).abs().max()))
    return {
        "policy_loss": figures["policy_loss"], "value_loss": figures["value_loss"],
        "trl_policy_loss": logged[0]["loss/policy_avg"], "trl_value_loss": logged[0]["loss/value_avg"],
        "difference": difference / largest,
    }  # fmt: skip


def memory(device: str) -> int:
    """Return the peak memory of this process in bytes, on the GPU or the CPU."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()


def main() -> None:
    """Run the requested side and write its figures."""
    request = harness.read_request()
    with tempfile.TemporaryDirectory(prefix="bessemer-ppo-") as scratch:
        request["scratch"] = scratch
        work = tuned_setup(request) if request["shape"] is None else fresh_setup(request, Path(scratch) / "model")
        sides = {"trl": run_trl, "one-step": one_step}
        figures = sides.get(request["side"], run_ours)(request, work)
    figures |= {"peak_memory": memory(request["device"]), "bfloat16": bfloat16.has_native_bfloat16()}
    write_json(Path(request["result"]), figures)


if __name__ == "__main__":
    main()
