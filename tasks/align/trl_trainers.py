"""TRL's DPO, RLOO and GRPO trainers, adapted to the stage `align`: presampled replies, our optimizers and precision.

Import this module only when one of the trainers is used: the import takes seconds. The stage samples the replies
itself and not through TRL. So an iteration's replies are a pure function of its number, as with PPO, and the alarms
see them before an update.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

from tasks.align.alternatives import Alternative, Dpo, Grpo, Robust
from tasks.align.learner import SamplingConfig
from tasks.align.policy import Policy
from tasks.common.harness.job import StageError
from tasks.common.modelling import models
from tasks.common.settings import Numerics
from tasks.common.text import chat

ReplySource = Callable[[], list[list[int]]]  # the iteration's replies as token ids; those to one prompt are adjacent
ScoreSource = Callable[[], list[float]]  # their rewards


class CallbackOptimizer(torch.optim.Optimizer):
    """The optimizer that a Trainer steps: calls `on_step`, where our optimizers (two with Muon) clip and step."""

    def __init__(self, parameters: "Sequence[torch.nn.Parameter]", on_step: Callable[[], None]) -> None:
        super().__init__(parameters, {"lr": 1.0})
        self.on_step = on_step

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Call `on_step`."""
        self.on_step()


class LogCollector(TrainerCallback):
    """Collects a trainer's log of each step."""

    def __init__(self, step_logs: list[dict[str, float]]) -> None:
        self.step_logs = step_logs

    def on_log(self, args: Any, state: Any, control: Any, **logged: Any) -> None:
        """Append a step's metrics; the log at the end of training holds only durations and is skipped."""
        if "loss" in logged["logs"]:
            self.step_logs.append(dict(logged["logs"]))


class _TrainerOverrides:
    """Overrides for all trainers: our autocast, no FLOP count, no telemetry."""

    numerics: Numerics
    model: Any

    def compute_loss_context_manager(self) -> Any:
        """Return the project's autocast context for a forward pass."""
        return models.autocast(self.model, self.numerics)

    def floating_point_ops(self, _: Any) -> int:
        """Return 0: nothing reads the count, and TRL's batches lack the inputs that it is estimated from."""
        return 0

    def _send_telemetry(self) -> None:
        """Send nothing."""


class _PresampledTrainer(_TrainerOverrides):
    """Overrides for RLOO and GRPO: replies come from `reply_source`."""

    reply_source: ReplySource

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        with models.autocast(self.model, self.numerics):
            return super()._prepare_inputs(generation_batch)  # type: ignore[misc]


class TokenizedDPOTrainer(_TrainerOverrides, DPOTrainer):
    """DPO on rows of token ids."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class PresampledRLOOTrainer(_PresampledTrainer, RLOOTrainer):
    """RLOO on presampled replies."""

    def _generate_single_turn(self, *_: Any, **__: Any) -> list[list[int]]:
        return self.reply_source()


class PresampledGRPOTrainer(_PresampledTrainer, GRPOTrainer):
    """GRPO on presampled replies."""

    def _generate_single_turn(self, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self.reply_source(), None  # TRL needs log-probabilities only from an external sampler


def make_trainer(
    config: Alternative, sampler: SamplingConfig, policy: Policy, tokenizer: PreTrainedTokenizerFast,
    on_step: Callable[[], None], step_logs: list[dict[str, float]], reply_source: ReplySource,
    score_source: ScoreSource, folder: str, *, activation_checkpointing: bool,
) -> Any:  # fmt: skip
    """Return TRL's trainer of a policy; its `train()` makes one pass over an iteration's `train_dataset`.

    The trainer calls `on_step` for each optimizer step and appends the step's log to `step_logs`. `reply_source` and
    `score_source` return the iteration's replies and rewards. TRL requires `folder` but writes nothing into it.
    Raises StageError if the process sees several GPUs, because a Trainer would replicate the model on each.
    """
    if policy.numerics.device == "cuda" and torch.cuda.device_count() > 1:
        raise StageError(
            f"{torch.cuda.device_count()} GPUs are visible, and {config.name} trains on one: select it, for example "
            "with CUDA_VISIBLE_DEVICES=0."
        )
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = CallbackOptimizer(parameters, on_step)
    arguments = {
        **_trainer_arguments(config, sampler, policy.numerics), "output_dir": folder, "seed": sampler.seed,
        "gradient_checkpointing": activation_checkpointing,
    }  # fmt: skip
    trainer_kwargs: dict[str, Any] = {
        "model": policy.model,
        "processing_class": tokenizer,
        "optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    }
    trainer: Any
    if isinstance(config, Dpo):
        trainer_kwargs["train_dataset"] = Dataset.from_list(
            [{"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]}]
        )
        trainer = TokenizedDPOTrainer(args=DPOConfig(**arguments), ref_model=policy.reference, **trainer_kwargs)
    else:

        def reward(prompts: Any, completions: Any, **_: Any) -> list[float | None]:
            return list(score_source())

        trainer_kwargs |= {"train_dataset": Dataset.from_list([{"prompt": ""}]), "reward_funcs": reward}
        if isinstance(config, Grpo):
            trainer = PresampledGRPOTrainer(args=GRPOConfig(**arguments), **trainer_kwargs)
        else:
            trainer = PresampledRLOOTrainer(args=RLOOConfig(**arguments), **trainer_kwargs)
        trainer.reply_source, trainer.beta, trainer.ref_model = reply_source, config.beta, policy.reference
        if policy.reference is not None:
            add_fused_lm_head(policy.reference, temperature=sampler.temperature)
    if policy.reference is None and "ref" in policy.model.peft_config:
        policy.model.delete_adapter("ref")  # in a resumed run it is a copy of the trained adapter, not the reference
    trainer.numerics = policy.numerics
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogCollector(step_logs))
    return trainer


def _trainer_arguments(config: Alternative, sampler: SamplingConfig, numerics: Numerics) -> dict[str, Any]:
    """Return the TrainingArguments of one iteration: batch size, gradient accumulation and the algorithm's options."""
    rows = sampler.minibatch // 2 if isinstance(config, Dpo) else sampler.minibatch
    max_rows = chat.MICROBATCH_ROWS // 2 if isinstance(config, Dpo) else chat.MICROBATCH_ROWS
    accumulation_steps = next(count for count in range(1, rows + 1) if rows % count == 0 and rows // count <= max_rows)
    shared = {
        "per_device_train_batch_size": rows // accumulation_steps, "gradient_accumulation_steps": accumulation_steps,
        "max_grad_norm": 0.0, "disable_dropout": True, "bf16": False,
        "use_cpu": numerics.device == "cpu", "dataloader_pin_memory": False, "remove_unused_columns": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "logging_nan_inf_filter": False, "pad_to_multiple_of": None,
    }  # fmt: skip
    if isinstance(config, Dpo):
        loss = {"loss_type": [config.loss.name], "beta": config.beta, "max_length": None}
        smoothing = {"label_smoothing": config.loss.flipped} if isinstance(config.loss, Robust) else {}
        return {**shared, **loss, **smoothing, "num_train_epochs": config.epochs}
    grouped = {
        **shared, "beta": 0.0, "num_generations": config.generations, "num_iterations": config.epochs,
        "epsilon": config.clip_range,
        "steps_per_generation": sampler.episodes // rows * accumulation_steps, "shuffle_dataset": False,
        "max_completion_length": sampler.max_new_tokens, "temperature": sampler.temperature, "num_train_epochs": 1,
    }  # fmt: skip
    if isinstance(config, Grpo):
        return {
            **grouped, "loss_type": config.loss, "scale_rewards": config.scale,
            "importance_sampling_level": config.ratio, "use_bias_correction_kl": config.ratio == "token",
        }  # fmt: skip
    return {**grouped, "normalize_advantages": config.normalize_advantages}
