"""What LLaMA-Factory and axolotl share, because both use the Trainer of Transformers and PEFT.

Names and defaults are those of `transformers.TrainingArguments` and `peft.LoraConfig`.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from flows.start.translation.keys import Keys
from flows.start.translation.result import CHECKPOINT, MAX_HELDOUT, MAX_WARMUP, Draft

ADAMW_NAMES = {"adamw", "adamw_hf", "adamw_torch", "adamw_torch_fused", "flash_adamw", "optimi_adamw"}
# The same update with states of fewer bits, or kept in the memory of the CPU.
COMPACT_ADAMW = re.compile(
    r"^(paged_adamw(_32bit|_8bit)?|adamw_(bnb_)?8bit|ao_adamw_(4bit|8bit|fp8)|adamw_torch_4bit)$"
)
LION = re.compile(r"^(paged_|flash_)?lion(_32bit|_8bit|_pytorch)?$")
SGD_NAMES = {"sgd", "flash_sgd"}
ATTENTION_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj"}
FUSED_ATTENTION_LAYERS = {"qkv_proj", "query_key_value", "c_attn", "Wqkv"}
FEED_FORWARD_LAYERS = {"gate_proj", "up_proj", "down_proj"}
NO_CLIPPING = 1.0e9  # a norm that no gradient reaches
UPDATES_PER_ITERATION = 4  # of DPO; the rate is constant within an iteration
MAX_DPO_REPLY_TOKENS = 256  # of the replies that DPO samples to measure the distance to the model it started from


@dataclass(frozen=True)
class Amount:
    """How long, how much at once and how fast a stage trains."""

    batch: int  # rows per update
    parts: int  # that a batch is split into
    epochs: float
    max_steps: int  # updates; 0 for none, where the epochs count
    max_length: int  # tokens
    optimizer: dict[str, Any]
    warmup_steps: int  # 0 where the optimizer's schedule has the share

    def limit(self, where: str, draft: Draft, updates_per_iteration: int = 1) -> dict[str, int]:
        """Return the steps (or iterations) of an entry as its settings; note the epochs where there are none yet."""
        if self.warmup_steps:
            draft.warmup_steps[where] = self.warmup_steps
        if self.max_steps:
            name = "iterations" if where.startswith("align") else "steps"
            return {name: max(1, -(-self.max_steps // updates_per_iteration))}
        draft.epochs[where] = self.epochs
        return {}

    def for_training(self, where: str, draft: Draft) -> dict[str, Any]:
        """Return the settings that every stage has that trains in steps."""
        parts = {"gradient_accumulation_steps": self.parts} if self.parts > 1 else {}
        return {"batch": self.batch, **parts, **self.limit(where, draft), "optimizer": self.optimizer}


def read_optimizer(keys: Keys, name_key: str, default: str) -> dict[str, Any]:
    """Return the settings of the optimizer, without its schedule."""
    name = str(keys.text(name_key, default)).lower()
    shared = {
        "learning_rate": keys.number("learning_rate", 5e-5),
        "weight_decay": keys.number("weight_decay", 0.0),
        "max_grad_norm": keys.number("max_grad_norm", 1.0) or NO_CLIPPING,
    }
    betas = [keys.number("adam_beta1", 0.9), keys.number("adam_beta2", 0.999)]
    epsilon = keys.number("adam_epsilon", 1e-8)
    if LION.match(name):
        return {"name": "lion", **shared, "betas": betas}
    if name in SGD_NAMES:
        return {"name": "sgd", **shared, "momentum": 0.0}
    if name == "adafactor":
        return {"name": "adafactor", **shared}
    adam_like = {**shared, "betas": betas, "epsilon": epsilon}
    if name == "muon":
        return {"name": "muon", **adam_like}
    if COMPACT_ADAMW.match(name):
        keys.refuse(name_key, "its states have fewer bits to save memory", "adamw is used, with states in float32")
    elif name not in ADAMW_NAMES:
        keys.refuse(name_key, "this optimizer is not available", "adamw is used; docs/guides/training.md lists others")
    return {"name": "adamw", **adam_like}


def read_schedule(keys: Keys, name_key: str, default: str, default_warmup: float) -> tuple[dict[str, Any], int]:
    """Return the schedule, and the warm-up as a number of steps (0 where it is a share, which the schedule has)."""
    name = str(keys.text(name_key, default)).lower()
    ratio, steps = keys.number("warmup_ratio", default_warmup), keys.number("warmup_steps", 0.0)
    share, steps = (steps, 0.0) if 0 < steps < 1 else (ratio, steps)  # Transformers 5 takes a share as well
    if share > MAX_WARMUP:
        keys.refuse("warmup_ratio", f"at most {MAX_WARMUP} of the steps can be warm-up", f"{MAX_WARMUP} is used")
        share = MAX_WARMUP
    number = 0 if name == "constant" else int(steps)
    warmup = {"warmup": 0.0 if number or name == "constant" else share}
    floor = _floor(keys)
    if name in ("constant", "constant_with_warmup"):
        return {"name": "constant", **warmup}, number
    if name == "linear":
        return {"name": "linear", **warmup}, number
    if name not in ("cosine", "cosine_with_min_lr"):
        keys.refuse(name_key, "this schedule is not available", "cosine is used; docs/guides/training.md lists others")
    return {"name": "cosine", **warmup, "floor": floor}, number


def _floor(keys: Keys) -> float:
    """Return the rate at the end as a share of the peak: 0 in Transformers unless a key says otherwise."""
    options = Keys(keys.mapping("lr_scheduler_kwargs"), f"{keys.where}lr_scheduler_kwargs.")
    share = options.number("min_lr_rate", keys.number("cosine_min_lr_ratio", 0.0))
    lowest, peak = options.number("min_lr", 0.0), keys.number("learning_rate", 5e-5)
    options.leave((), {})
    keys.adopt(options)
    return min(1.0, lowest / peak if lowest and peak else share)


def low_rank(keys: Keys, target_key: str, modules: Collection[str] | None, **values: Any) -> dict[str, Any]:
    """Return the settings of LoRA; `modules` are the names of the layers, None for all linear ones."""
    names = {name.rpartition(".")[2] for name in modules or ()}
    targets = "attention" if names and names <= ATTENTION_LAYERS | FUSED_ATTENTION_LAYERS else "all-linear"
    if names and names not in (ATTENTION_LAYERS, ATTENTION_LAYERS | FEED_FORWARD_LAYERS):
        keys.refuse(target_key, "layers cannot be chosen one by one", f"method.targets: {targets} is used")
    return {**values, "targets": targets}


def full_precision(keys: Keys, bfloat16: bool, float16: bool) -> dict[str, Any]:
    """Return the section `numerics` for the type that the tool computes in."""
    if float16 and not bfloat16:
        keys.refuse("fp16", "there is no mixed precision in float16", "bfloat16 is used (numerics.dtype.decoder)")
    return {"dtype": {"decoder": "bfloat16" if bfloat16 or float16 else "float32"}}


def dpo_entry(
    amount: Amount, algorithm: dict[str, Any], method: dict[str, Any], draft: Draft, model: str = CHECKPOINT
) -> dict[str, Any]:
    """Return an entry of `align` for DPO on people's pairs; an update is on `amount.batch` pairs."""
    minibatch = 2 * amount.batch
    if amount.parts > 1:
        draft.notes.append("DPO computes a batch at once: gradient accumulation is not used, the update is the same.")
    return {
        "model": model,
        "algorithm": {"name": "dpo", **algorithm},
        "method": method,
        "reward": {
            "name": "rankings", "path": "data/validate/rankings", "input": "conversation", "judge_share": 0.0
        },
        **amount.limit("align.policy", draft, UPDATES_PER_ITERATION),
        "episodes": UPDATES_PER_ITERATION * minibatch,
        "minibatch": minibatch,
        "max_new_tokens": max(1, min(MAX_DPO_REPLY_TOKENS, amount.max_length // 2)),
        "optimizer": amount.optimizer,
    }  # fmt: skip


def reward_entry(amount: Amount, method: dict[str, Any], draft: Draft) -> dict[str, Any]:
    """Return an entry of `reward` that learns from pairs (Bradley–Terry)."""
    return {
        "role": "train",
        "model": CHECKPOINT,
        "method": method,
        "judge_share": 0.0,
        "max_tokens": max(8, amount.max_length),
        **amount.for_training("reward.train", draft),
    }


def chat_entry(amount: Amount, method: dict[str, Any], task: dict[str, Any], too_long: str, draft: Draft) -> Any:
    """Return an entry of `finetune` for conversations."""
    return {
        "model": CHECKPOINT,
        "method": method,
        "task": {"name": "chat", **task},
        "max_tokens": max(8, amount.max_length),
        "too_long": too_long,
        **amount.for_training("finetune.chat", draft),
    }


def pretrain_entry(amount: Amount, draft: Draft) -> dict[str, Any]:
    """Return an entry of `pretrain` that trains the checkpoint on."""
    return {
        "objective": "causal",
        "model": {"name": "from", "path": CHECKPOINT},
        "window": max(16, amount.max_length),
        **amount.for_training("pretrain.causal", draft),
        "mixture": {"prose": 1.0},
    }


def hold_out(draft: Draft, key: str, size: float) -> None:
    """Set the held-out share of a table: a share below 1, or a number of rows."""
    if size >= 1:
        draft.heldout_rows[key] = int(size)
    elif size > 0:
        draft.sections["ingest"] = {"heldout": {key: min(size, MAX_HELDOUT[key])}}
    else:
        draft.notes.append("The file holds no rows out; the default share is held out for the scorecard.")
