"""Translates a training configuration of axolotl (https://github.com/axolotl-ai-cloud/axolotl).

Keys and defaults are those of its `src/axolotl/utils/schemas/`.
"""

from pathlib import Path
from typing import Any

from flows.start.translation import axolotl_data
from flows.start.translation.axolotl_keys import OF_ADAPTERS, UNSUPPORTED, WITHOUT_EFFECT
from flows.start.translation.files import read_folder
from flows.start.translation.keys import Keys
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

ONLY_KEYS = (
    "base_model", "datasets", "pretraining_dataset", "sequence_len", "num_epochs", "adapter", "rl",
    "val_set_size", "lora_r", "sample_packing",
)  # fmt: skip
TEMPLATE_KEY = "chat_template"
HELDOUT = {"pretrain": "prose", "finetune": "entities", "reward": "rankings", "align": "rankings"}
LOSSES = {"dpo": "sigmoid", "ipo": "ipo"}
OTHER_TRAINING = {  # value of `rl`: what it learns from, what to do
    "kto": "single answers marked good or bad; Bessemer learns from pairs: collect them in pairs and use rl: dpo",
    "orpo": "pairs without a reference model; use rl: dpo after fine-tuning",
    "simpo": "pairs without a reference model; use rl: dpo after fine-tuning",
    "grpo": "reward functions in a Python module; put them in align.ENTRY.reward: {name: function} with algorithm grpo",
    "gdpo": "reward functions in a Python module; put them in align.ENTRY.reward: {name: function} with algorithm grpo",
    "ebft": "features of a frozen model, which is not available",
}
DEFAULT_WARMUP = 0.03
TRUE_TYPES = ("auto", True, "true")


def refuse_unusable(keys: Keys) -> None:
    """Report kinds of training that have no counterpart."""
    rule = keys.content.get("rl")
    if isinstance(rule, str) and rule in OTHER_TRAINING:
        keys.problems.append(f"rl: found {rule!r}, which learns from {OTHER_TRAINING[rule]}")
    elif rule and rule not in list(LOSSES):
        keys.problems.append(f"rl: found {rule!r}, expected one of {', '.join(LOSSES)}, or no such key")
    if keys.content.get("process_reward_model"):
        keys.problems.append("process_reward_model: scores of single steps are not available; reward_model is")
    for key, kind in (("processor_type", "images or sound"), ("diffusion", "diffusion models")):
        if keys.content.get(key):
            keys.problems.append(f"{key}: {kind} cannot be trained; use a configuration of a text model")
    if not keys.content.get("datasets") and not keys.content.get("pretraining_dataset"):
        keys.problems.append("datasets: this key is missing; it should list what the model is trained on")


def read_model(keys: Keys, config: Path, draft: Draft) -> tuple[Path | None, Path | None]:
    """Return the folders of the checkpoint and of its adapter."""
    adapter = keys.text("lora_model_dir")
    return (
        read_folder(keys, "base_model", keys.text("base_model"), config, draft),
        read_folder(keys, "lora_model_dir", adapter, config, draft) if adapter else None,
    )


def translate_keys(keys: Keys, config: Path, draft: Draft) -> tuple[Source, ...]:
    """Translate all keys into the draft's sections; return the sources."""
    sections = draft.sections
    sections["base"] = {"seed": keys.integer("seed", 42)}
    bfloat16 = any(keys.take(key) in TRUE_TYPES for key in ("bf16", "bfloat16"))
    float16 = any(keys.take(key) in (True, "true") for key in ("fp16", "float16"))
    sections["numerics"] = full_precision(keys, bfloat16, float16)
    amount = read_amount(keys)
    sections["tokenize"] = {"tokenizer": {"name": "from", "path": CHECKPOINT}, "context": amount.max_length}
    if keys.take("gradient_checkpointing"):
        sections["placement"] = {"activation_checkpointing": True}
    rule = keys.text("rl")
    rewarded = keys.flag("reward_model", False)
    data = axolotl_data.read_sources(keys, config, "rankings" if rule or rewarded else "instructions", draft)
    stage = "align" if rule else "reward" if rewarded else "pretrain" if data.only_documents else "finetune"
    hold_out(draft, HELDOUT[stage], keys.number("val_set_size", 0.0))
    method = read_method(keys, stage)
    sections[stage] = read_stage(stage, keys, amount, method, draft)
    tokens = keys.content.get("special_tokens")
    only_padding = isinstance(tokens, dict) and tokens.keys() <= {"pad_token"}  # which is not trained on
    unused = (("special_tokens",) if only_padding else ()) + (() if keys.take("adapter") else OF_ADAPTERS)
    keys.leave((*WITHOUT_EFFECT, *unused), UNSUPPORTED)
    return data.sources


def read_amount(keys: Keys) -> Amount:
    """Return batch, epochs, length and optimizer."""
    micro_batch, total = keys.integer("micro_batch_size", 1, positive=True), keys.integer("batch_size", 0)
    parts = total // micro_batch if total else keys.integer("gradient_accumulation_steps", 1, positive=True)
    keys.take("gradient_accumulation_steps")
    schedule, warmup_steps = read_schedule(keys, "lr_scheduler", "cosine", DEFAULT_WARMUP)
    return Amount(
        batch=micro_batch * max(1, parts),
        parts=max(1, parts),
        epochs=keys.number("num_epochs", 1.0, positive=True),
        max_steps=max(0, keys.integer("max_steps", 0)),
        max_length=keys.integer("sequence_len", 512, positive=True),
        optimizer={**read_optimizer(keys, "optimizer", "adamw_torch_fused"), "schedule": schedule},
        warmup_steps=warmup_steps,
    )


def read_method(keys: Keys, stage: str) -> dict[str, Any]:
    """Return which weights are trained."""
    adapter = keys.text("adapter")
    four_bit, eight_bit = keys.flag("load_in_4bit", False), keys.flag("load_in_8bit", False)
    if not adapter:
        if four_bit or eight_bit:
            keys.refuse("load_in_4bit" if four_bit else "load_in_8bit", "all weights are trained", "leave it out")
        return {"name": "full"}
    if adapter not in ("lora", "qlora"):
        keys.refuse("adapter", "this method is not available", "lora is used; docs/guides/fine-tuning.md lists others")
    method, dora = _read_lora(keys), keys.flag("peft_use_dora", False)
    if (four_bit or adapter == "qlora") and stage == "finetune" and not dora:
        return {"name": "qlora", **method}
    quantized = "load_in_4bit" if four_bit else "load_in_8bit" if eight_bit else "adapter"
    if four_bit or eight_bit or adapter == "qlora":
        keys.refuse(
            quantized, "only the method qlora of a finetune entry trains on a quantized base, of four bits",
            "lora on full-precision weights is used, which takes more memory",
        )  # fmt: skip
    return {"name": "lora", **method, "dora": dora}


def _read_lora(keys: Keys) -> dict[str, Any]:
    """Return the settings of LoRA."""
    rank, linear = keys.integer("lora_r", 8, positive=True), keys.flag("lora_target_linear", False)
    given = keys.take("lora_target_modules")
    names = [given] if isinstance(given, str) else given
    everything = linear or names in (None, ["all-linear"])
    return low_rank(
        keys, "lora_target_modules", None if everything else names, rank=rank, alpha=keys.integer("lora_alpha", rank),
        dropout=keys.number("lora_dropout", 0.0), rank_stabilized=keys.flag("peft_use_rslora", False),
    )  # fmt: skip


def read_stage(stage: str, keys: Keys, amount: Amount, method: dict[str, Any], draft: Draft) -> dict[str, Any]:
    """Return the section of the stage."""
    if method["name"] == "qlora":
        draft.sections["numerics"]["device"] = "cuda"
    packed, strategy = keys.flag("sample_packing", False), keys.text("excess_length_strategy", "drop")
    if stage == "pretrain":
        if method["name"] != "full":
            keys.refuse(
                "adapter", "continued pretraining trains every weight",
                "lower learning_rate to about a tenth of LoRA's",
            )  # fmt: skip
        return {"causal": pretrain_entry(amount, draft)}
    if stage == "reward":
        return {"train": reward_entry(amount, method, draft)}
    if stage == "align":
        return {"policy": dpo_entry(amount, _read_dpo(keys), method, draft)}
    if packed:
        draft.notes.append(
            f"With sample_packing, axolotl counts packed rows in a batch; here batch ({amount.batch}) counts "
            "conversations. Raise it if a packed row holds many."
        )
    task = {"answers": "all", **({"packing": amount.max_length} if packed else {})}
    return {"chat": chat_entry(amount, method, task, "truncate" if strategy == "truncate" else "reject", draft)}


def _read_dpo(keys: Keys) -> dict[str, Any]:
    losses = keys.take("dpo_loss_type") or [LOSSES[str(keys.content["rl"])]]
    loss = losses[0] if isinstance(losses, list) else losses
    if loss not in ("sigmoid", "hinge", "ipo") or (isinstance(losses, list) and len(losses) > 1):
        keys.refuse("dpo_loss_type", "this loss is not available", "sigmoid is used; hinge, ipo and robust are others")
        loss = "sigmoid"
    beta = keys.number("rl_beta", keys.number("dpo_beta", 0.1))
    return {"beta": beta, "loss": {"name": loss}}
