"""Translates a training configuration of LLaMA-Factory (https://github.com/hiyouga/LLaMA-Factory).

Keys and defaults are those of its `src/llamafactory/hparams/` and of the Trainer's arguments.
"""

from pathlib import Path
from typing import Any

from flows.start.translation import llamafactory_data
from flows.start.translation.files import read_folder
from flows.start.translation.keys import Keys
from flows.start.translation.llamafactory_keys import UNSUPPORTED, without_effect
from flows.start.translation.result import CHECKPOINT, Draft, Source
from flows.start.translation.training import (
    Amount,
    chat_entry,
    dpo_entry,
    full_precision,
    hold_out,
    low_rank,
    pretrain_entry,
    read_optimizer,
    read_schedule,
    reward_entry,
)

ONLY_KEYS = ("model_name_or_path", "stage", "finetuning_type", "dataset", "dataset_dir", "template", "cutoff_len",
             "train_dataset")  # fmt: skip
TEMPLATE_KEY = "template"
STAGES = ("pt", "sft", "rm", "ppo", "dpo", "kto")
HELDOUT = {"pt": "prose", "sft": "entities", "ppo": "entities", "rm": "rankings", "dpo": "rankings"}
PAIR_LOSSES = ("sigmoid", "hinge", "ipo")
PPO_KL = {"coefficient": 0.2, "horizon": 10000.0}  # of TRL 0.9, which it uses
MIN_EPISODES = 2
REWARD_STEPS = 500


def refuse_unusable(keys: Keys) -> None:
    """Report a file that trains nothing, and a stage that has no counterpart."""
    stage = keys.content.get("stage", "sft")
    if "train_dataset" in keys.content:
        keys.problems.append(
            "train_dataset: the file is for version 1 of LLaMA-Factory (USE_V1), which names settings otherwise; "
            "write it with the keys of its examples/train_lora"
        )
    elif "stage" not in keys.content and "dataset" not in keys.content:
        keys.problems.append(
            "the file is one for inference, export or another program of LLaMA-Factory: it has neither stage nor "
            "dataset; give the file that `llamafactory-cli train` is called with"
        )
    elif stage not in STAGES:
        keys.problems.append(f"stage: found {stage!r}, expected one of {', '.join(STAGES)}")
    elif stage == "kto":
        keys.problems.append(
            "stage: found 'kto', which learns from single answers marked good or bad; Bessemer learns from pairs and "
            "rankings: collect answers to the same prompt in pairs and use stage dpo"
        )


def translate_keys(keys: Keys, config: Path, draft: Draft) -> tuple[Source, ...]:
    """Translate all keys into the draft's sections; return the sources."""
    stage = keys.text("stage", "sft") or "sft"
    keys.take("do_train")
    sections = draft.sections
    sections["base"] = {"seed": keys.integer("seed", 42)}
    pure = bool(keys.content.get("pure_bf16"))
    if pure:
        keys.refuse("pure_bf16", "weights are trained in float32", "bfloat16 is used for the computation")
    sections["numerics"] = full_precision(keys, keys.flag("bf16", False) or pure, keys.flag("fp16", False))
    hold_out(draft, HELDOUT[stage], keys.number("val_size", 0.0))
    amount = read_amount(keys)
    sections["tokenize"] = {"tokenizer": {"name": "from", "path": CHECKPOINT}, "context": amount.max_length}
    if keys.flag("gradient_checkpointing", False):
        sections["placement"] = {"activation_checkpointing": True}
    sections |= read_stage(stage, keys, amount, read_method(keys, stage, draft), draft)
    sources = llamafactory_data.read_sources(keys, config, stage, draft)
    if not keys.flag("enable_thinking", True):
        keys.refuse("enable_thinking", "the chat template of the checkpoint decides", "leave it out")
    keys.leave(without_effect(stage, keys.text("finetuning_type", "lora") or ""), UNSUPPORTED)
    return sources


def read_model(keys: Keys, config: Path, draft: Draft) -> tuple[Path | None, Path | None]:
    """Return the folders of the checkpoint and of its adapter."""
    adapter = keys.text("adapter_name_or_path")
    return (
        read_folder(keys, "model_name_or_path", keys.text("model_name_or_path"), config, draft),
        read_folder(keys, "adapter_name_or_path", adapter, config, draft) if adapter else None,
    )


def read_amount(keys: Keys) -> Amount:
    """Return batch, epochs, length and optimizer."""
    parts = keys.integer("gradient_accumulation_steps", 1, positive=True)
    schedule, warmup_steps = read_schedule(keys, "lr_scheduler_type", "linear", 0.0)
    optimizer = read_optimizer(keys, "optim", "adamw_torch")
    if keys.flag("use_muon", False):
        optimizer = {**optimizer, "name": "muon"}
    return Amount(
        batch=keys.integer("per_device_train_batch_size", 8, positive=True) * parts,
        parts=parts,
        epochs=keys.number("num_train_epochs", 3.0, positive=True),
        max_steps=max(0, keys.integer("max_steps", 0)),
        max_length=keys.integer("cutoff_len", 2048, positive=True),
        optimizer={**optimizer, "schedule": schedule},
        warmup_steps=warmup_steps,
    )


def read_method(keys: Keys, stage: str, draft: Draft) -> dict[str, Any]:
    """Return which weights are trained."""
    kind = keys.text("finetuning_type", "lora")
    layers = keys.integer("freeze_trainable_layers", 2) if kind == "freeze" else 0
    if kind == "full":
        return {"name": "full"}
    if kind == "freeze" and layers > 0:
        draft.notes.append("top_layers trains the final norm and the head too; freeze trains the blocks alone.")
        return {"name": "top_layers", "layers": layers}
    if kind != "lora":
        why = "the first blocks cannot be trained alone" if kind == "freeze" else "this method is not available"
        keys.refuse("finetuning_type", why, "lora is used; docs/guides/fine-tuning.md lists others")
    return _read_lora(keys, stage, draft)


def _read_lora(keys: Keys, stage: str, draft: Draft) -> dict[str, Any]:
    rank = keys.integer("lora_rank", 8, positive=True)
    target = keys.text("lora_target", "all") or "all"
    method = low_rank(
        keys, "lora_target", None if target in ("all", "all-linear") else [name.strip() for name in target.split(",")],
        rank=rank, alpha=keys.integer("lora_alpha", 2 * rank), dropout=keys.number("lora_dropout", 0.0),
        rank_stabilized=keys.flag("use_rslora", False),
    )  # fmt: skip
    bits, bitsandbytes = keys.integer("quantization_bit", 0), keys.content.get("quantization_method") in (None, "bnb")
    if bitsandbytes:
        keys.take("quantization_method")
    double, dora = keys.flag("double_quantization", True), keys.flag("use_dora", False)
    if bits == 4 and bitsandbytes and stage == "sft" and not dora:
        draft.sections["numerics"]["device"] = "cuda"
        return {"name": "qlora", **method, "double_quantization": double}
    if bits:
        keys.refuse(
            "quantization_bit", "only the method qlora of a finetune entry trains on four-bit weights",
            "lora on full-precision weights is used, which takes more memory",
        )  # fmt: skip
    return {"name": "lora", **method, "dora": dora}


def read_stage(stage: str, keys: Keys, amount: Amount, method: dict[str, Any], draft: Draft) -> dict[str, Any]:
    """Return the section of the stage."""
    if stage == "pt":
        if method["name"] != "full":
            keys.refuse(
                "finetuning_type", "continued pretraining trains every weight",
                "lower learning_rate to about a tenth of LoRA's",
            )  # fmt: skip
        return {"pretrain": {"causal": pretrain_entry(amount, draft)}}
    if stage == "rm":
        return {"reward": {"train": reward_entry(amount, method, draft)}}
    if stage == "dpo":
        return {"align": {"policy": dpo_entry(amount, _read_dpo(keys), method, draft)}}
    if stage == "ppo":
        return _read_ppo(keys, amount, method, draft)
    answers = "last" if keys.flag("mask_history", False) else "all"
    packed = keys.flag("neat_packing", False) or keys.flag("packing", False)
    task = {"answers": answers, **({"packing": amount.max_length} if packed else {})}
    if packed:
        draft.notes.append(
            f"With packing, LLaMA-Factory counts packed rows in a batch; here batch ({amount.batch}) counts "
            "conversations. Raise it if a packed row holds many."
        )
    return {"finetune": {"chat": chat_entry(amount, method, task, "truncate", draft)}}


def _read_dpo(keys: Keys) -> dict[str, Any]:
    loss = keys.text("pref_loss", "sigmoid")
    if loss not in PAIR_LOSSES:
        keys.problems.append(
            f"pref_loss: found {loss!r}, which is not available; use one of {', '.join(PAIR_LOSSES)}, or drop the key"
        )
    return {"beta": keys.number("pref_beta", 0.1), "loss": {"name": loss}}


def _read_ppo(keys: Keys, amount: Amount, method: dict[str, Any], draft: Draft) -> dict[str, Any]:
    """Return an entry of PPO and its reward model: LLaMA-Factory's is a head that no other program reads."""
    episodes = max(MIN_EPISODES, amount.batch * keys.integer("ppo_buffer_size", 1, positive=True))
    keys.refuse(
        "reward_model", "a value head of LLaMA-Factory is no Transformers model",
        "train one here: give rankings or pairs with --preferences (entry reward.train), or set align.policy.reward",
    )  # fmt: skip
    entry = {
        "model": CHECKPOINT,
        "algorithm": {
            "name": "ppo", "epochs": keys.integer("ppo_epochs", 4),
            "whiten_rewards": keys.flag("ppo_whiten_rewards", False),
            "kl": {**PPO_KL, "target": keys.number("ppo_target", 6.0)},
        },
        "method": method,
        "reward": {"name": "model", "path": "data/reward/train/model"},
        **amount.limit("align.policy", draft),
        "episodes": episodes,
        "minibatch": min(amount.batch, episodes),
        "max_new_tokens": keys.integer("max_new_tokens", min(1024, amount.max_length // 2)),
        "temperature": keys.number("temperature", 0.95),
        "optimizer": amount.optimizer,
    }  # fmt: skip
    reward = {
        "role": "train", "model": CHECKPOINT, "method": method, "judge_share": 0.0, "max_tokens": amount.max_length,
        "batch": amount.batch, "steps": REWARD_STEPS, "optimizer": amount.optimizer,
    }  # fmt: skip
    return {"reward": {"train": reward}, "align": {"policy": entry}}
