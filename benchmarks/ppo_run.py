"""One side of `benchmarks/ppo.py`, in a process of its own: `python -m benchmarks.ppo_run FILE`."""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks import harness
from benchmarks.harness import BenchmarkError
from tasks.common.alignment import proximal
from tasks.common.alignment.learner import Sampler
from tasks.common.alignment.policy import Method, Policy
from tasks.common.alignment.proximal import Proximal, Trainer
from tasks.common.alignment.ptx import Ptx
from tasks.common.modelling import bfloat16, models
from tasks.common.modelling.methods import Full, Lora, Top
from tasks.common.settings import Dtypes, Numerics, Parallel
from tasks.common.stage import peak_memory, write_json
from tasks.common.text.chat import Question
from tasks.common.training.optimizers import AdamW, Constant
from tasks.common.training.parallel import World
from tasks.common.training.updates import begun

REPLY, EPOCHS, RATE, LENGTH, KL = 48, 4, 3e-4, 12, 0.05
LORA = Lora(
    name="lora", rank=16, alpha=32, dropout=0.0, rank_stabilized=False, dora=False, targets="all-linear"
)  # fmt: skip
TOP = Top(name="top", layers=2)
METHODS: dict[str, tuple[Method, float]] = {  # on one backbone, each with its learning rate
    "last-blocks": (TOP, 1e-3), "low-rank": (LORA, 3e-3),
}  # fmt: skip
WHOLE: tuple[Method, float] = Full(name="full"), RATE  # of all other sides
END, PAD = 1, 0


def tokenizer_of(vocabulary: int) -> Any:
    """Return a tokenizer of so many words, which its own text brings back."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<end>": END, **{f"w{i}": i for i in range(2, vocabulary)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<pad>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def fresh(shape: dict[str, int], kind: str, seed: int) -> Any:
    """Return a fresh Llama model, causal or with a head that gives one number."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["hidden"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], intermediate_size=shape["feed_forward"], max_position_embeddings=256,
        pad_token_id=PAD, eos_token_id=END, bos_token_id=END, tie_word_embeddings=True, num_labels=1,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(settings) if kind == "causal" else LlamaForSequenceClassification(settings)


def prompts_of(vocabulary: int) -> list[list[int]]:
    """Return 512 prompts of one length."""
    import numpy as np

    return np.random.default_rng(0).integers(2, vocabulary, (512, LENGTH)).tolist()  # type: ignore[no-any-return]


def asked_as(ids: Sequence[int]) -> list[dict[str, str]]:
    """Return a prompt as the message that its words are."""
    return [{"role": "user", "content": " ".join(f"w{i}" for i in ids)}]


class Scores:
    """The reward model, which reads prompt and reply; its scores are the reward."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    def __call__(self, prompts: Any, replies: Sequence[str]) -> list[float]:
        """Return the score of each reply, its tokens the words of its text; several of one length together."""
        import torch

        rows = [
            self.tokenizer.encode(f"{asked[0]['content']} {text}", add_special_tokens=False)
            for asked, text in zip(prompts, replies, strict=True)
        ]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = (ids != PAD).long()
        with torch.no_grad():
            scores = self.model(input_ids=ids, attention_mask=mask).logits[:, 0]
        return [float(value) for value in scores]


def ours(request: dict[str, Any], folder: Path) -> tuple[Trainer, Any]:
    """Return our trainer on the models of a folder."""
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
        name="ppo", epochs=EPOCHS, discount=1.0, trace=0.95, clip=0.2, whiten_rewards=False, entropy=0.0,
        values="separate" if like else "shared", value_clip=0.2, value_weight=0.1, value_warmup=0, average=None,
        kl=proximal.Kl(estimator="k1", coefficient=KL, target=6.0, horizon=0, stop=None),
        ptx=Ptx(weight=0.0, batch=1, window=16, mixture={"all": 1.0}),
    )  # fmt: skip
    tokenizer, shape = tokenizer_of(request["shape"]["vocabulary"]), request["shape"]
    policy = Policy.load(folder, method, config.values, numerics, temperature=1.0)
    rule = AdamW(
        name="adamw", learning_rate=RATE, weight_decay=0.0, clip=1e9, schedule=Constant(name="constant", warmup=0.0),
        betas=[0.9, 0.999], epsilon=epsilon_of(request),
    )  # fmt: skip
    world, episodes = World(0, 1, "data", request["device"]), request["episodes"]
    prompts = [Question(str(number), asked_as(ids), ids) for number, ids in enumerate(prompts_of(shape["vocabulary"]))]
    judge = Scores(fresh(shape, "scorer", 5).to(request["device"]), tokenizer)
    trainer = Trainer(
        config, Sampler(episodes, episodes, REPLY, 1.0, 0.0, 1), policy, begun(rule, policy.model, world), tokenizer,
        judge, "a fresh model", prompts, None, world,
    )  # fmt: skip
    return trainer, numerics


def run_ours(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Sample and learn for some iterations, the first of which is not timed where there are several."""
    trainer, _ = ours(request, folder)
    _, rate = METHODS.get(request["side"], WHOLE)
    rewards, began, timed = [], time.perf_counter(), 0
    for iteration in range(request["iterations"]):
        rollout, figures = trainer.sample(iteration)
        trainer.iterate(rollout, iteration, rate, figures["kl"])
        rewards.append(figures["reward"])
        if iteration == 0 and request["iterations"] > 1:
            began = time.perf_counter()
        else:
            timed += request["episodes"]
    return {"episodes_per_second": timed / (time.perf_counter() - began), **ends(rewards)}


def run_trl(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Let TRL do the same."""
    trainer, clock, rewards, *_ = trl(request, folder)
    trainer.train()
    timed = clock[1:] if request["iterations"] > 1 else clock
    start = clock[0] if request["iterations"] > 1 else trainer.began
    return {"episodes_per_second": len(timed) * request["episodes"] / (clock[-1] - start), **ends(rewards)}


def trl(request: dict[str, Any], folder: Path, epochs: int = EPOCHS) -> Any:
    """Return TRL's trainer, and lists which its iterations fill: moments, mean scores, all figures."""
    sys.path.insert(0, request["peer"])
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

    torch.set_num_threads(request["threads"])
    shape, episodes = request["shape"], request["episodes"]
    tokenizer = tokenizer_of(shape["vocabulary"])
    args = PPOConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=episodes, gradient_accumulation_steps=1,
        total_episodes=episodes * request["iterations"], num_ppo_epochs=epochs, num_mini_batches=1,
        response_length=REPLY, local_rollout_forward_batch_size=episodes, num_sample_generations=0, report_to=[],
        use_cpu=request["device"] == "cpu", bf16=False, save_strategy="no", learning_rate=RATE,
        lr_scheduler_type="constant",
        kl_coef=KL, temperature=1.0, logging_strategy="no",
        adam_epsilon=epsilon_of(request),
    )  # fmt: skip
    value = fresh(shape, "scorer", 6)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    value.model.load_state_dict(policy.model.state_dict())
    torch.nn.init.zeros_(value.score.weight)
    dataset = Dataset.from_list([{"input_ids": ids} for ids in prompts_of(shape["vocabulary"])])
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, model=policy, ref_model=reference,
        reward_model=fresh(shape, "scorer", 5), value_model=value, train_dataset=dataset,
        eval_dataset=dataset.select(range(2)),
    )  # fmt: skip
    clock: list[float] = []
    rewards: list[float] = []
    seen: list[dict[str, float]] = []

    def log(metrics: dict[str, float], *_: Any, **__: Any) -> None:
        clock.append(time.perf_counter())
        rewards.append(metrics["objective/scores"])
        seen.append(metrics)

    trainer.log, trainer.began = log, time.perf_counter()
    return trainer, clock, rewards, seen, policy


def epsilon_of(request: dict[str, Any]) -> float:
    """Return Adam's epsilon: 1 for the single step, which is then nearly the gradient, and not its signs alone."""
    return 1.0 if request["side"] == "one-step" else 1e-8


def one_step(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Take one step on both sides on the replies that TRL sampled, and compare losses and new weights."""
    from tasks.common.evaluation import sampling

    trainer, _, _, seen, policy = trl(request, folder, epochs=1)
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
    mine, _ = ours(request, folder)
    mine.prompts = [Question(str(i), asked_as(row), row) for i, row in enumerate(ids[:, :LENGTH].tolist())]
    replies = ids[:, LENGTH:].tolist()
    # The sampler hands out TRL's replies, in the order that ours draws the prompts in.
    sampling.replies = lambda model, tokenizer, prompts, **_: [
        replies[next(i for i, row in enumerate(ids[:, :LENGTH].tolist()) if row == prompt)] for prompt in prompts
    ]
    import numpy as np

    class Straight:
        """A generator that draws every prompt once, in order."""

        def choice(self, size: int, count: int) -> Any:
            """Return the places in order."""
            return np.arange(count)

    np.random.default_rng = lambda *_: Straight()  # type: ignore[assignment]
    rollout, _ = mine.sample(0)
    figures = mine.update(rollout, np.arange(len(ids)), RATE)
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


def ends(rewards: Sequence[float]) -> dict[str, float]:
    """Return the first reward and the mean of the last five."""
    last = rewards[-5:]
    return {"reward_first": rewards[0], "reward_last": sum(last) / len(last)}


def main() -> None:
    """Do what the request says and leave the figures."""
    request = harness.read_request()
    with tempfile.TemporaryDirectory(prefix="bessemer-ppo-") as scratch:
        folder = Path(scratch)
        fresh(request["shape"], "causal", 4).save_pretrained(folder)
        sides = {"trl": run_trl, "one-step": one_step}
        figures = sides.get(request["side"], run_ours)(request, folder)
    figures |= {"peak_memory": memory(request["device"]), "bfloat16": bfloat16.built_in()}
    write_json(Path(request["result"]), figures)


if __name__ == "__main__":
    main()
