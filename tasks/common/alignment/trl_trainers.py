"""TRL's trainers as an iteration of the stage `ppo` runs them: on given replies, with our optimizers, in our precision.

Imported only where one of them is wanted: it takes seconds. TRL's own sampling is left out for `sampling.replies`, so
that an iteration's replies are the same pure function of its number as PPO's, and are looked at before anything is
learnt from them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

from tasks.common.alignment.alternatives import Alternative, Dpo, Grpo, Robust
from tasks.common.alignment.learner import Sampler
from tasks.common.alignment.policy import Policy
from tasks.common.modelling import models
from tasks.common.settings import Numerics
from tasks.common.stage import StageError
from tasks.common.text import chat

Replies = Callable[[], list[list[int]]]  # gives the iteration's, the replies to one question side by side
Scores = Callable[[], list[float]]


class Stepper(torch.optim.Optimizer):
    """What a Trainer steps; our optimizers, which are several under Muon, do the work, and clip, in `do`."""

    def __init__(self, parameters: "Sequence[torch.nn.Parameter]", do: Callable[[], None]) -> None:
        super().__init__(parameters, {"lr": 1.0})
        self.do = do

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Let the step be taken."""
        self.do()


class Told(TrainerCallback):
    """Keeps what a trainer logs of each step."""

    def __init__(self, steps: list[dict[str, float]]) -> None:
        self.steps = steps

    def on_log(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        """Keep a step's figures; what is told at the end is of durations."""
        if "loss" in told["logs"]:
            self.steps.append(dict(told["logs"]))


class _Ours:
    """What is ours of each: the precision, and that nothing is reported home."""

    numerics: Numerics
    model: Any

    def compute_loss_context_manager(self) -> Any:
        """Return the context of a forward pass, as it is everywhere else in the project."""
        return models.autocast(self.model, self.numerics)

    def floating_point_ops(self, _: Any) -> int:
        """Count none: nothing asks for them, and TRL's batches lack what they are guessed from."""
        return 0

    def _send_telemetry(self) -> None:
        """Tell nobody."""


class _Given(_Ours):
    """What is ours of the two that learn from groups: where the replies come from."""

    given: Replies

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        with models.autocast(self.model, self.numerics):
            return super()._prepare_inputs(generation_batch)  # type: ignore[misc]


class OnPairs(_Ours, DPOTrainer):
    """DPO, on rows that hold token ids."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class LeaveOneOut(_Given, RLOOTrainer):
    """RLOO, on given replies."""

    def _generate_single_turn(self, *_: Any, **__: Any) -> list[list[int]]:
        return self.given()


class Grouped(_Given, GRPOTrainer):
    """GRPO, on given replies."""

    def _generate_single_turn(self, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self.given(), None  # log-probabilities are wanted of another program that samples


def trainer_of(
    config: Alternative, sampler: Sampler, policy: Policy, tokenizer: PreTrainedTokenizerFast, do: Callable[[], None],
    steps: list[dict[str, float]], replies: Replies, scores: Scores, folder: str,
) -> Any:  # fmt: skip
    """Return TRL's trainer of a policy, whose `train()` goes through one iteration's `train_dataset`.

    It calls `do` to take a step, and adds what it tells of one to `steps`. `replies` and `scores` give the
    iteration's. It writes nothing into `folder`, but wants one. Raises StageError where one process sees several GPUs,
    on which a Trainer would put a copy of the model each.
    """
    if policy.numerics.device == "cuda" and torch.cuda.device_count() > 1:
        raise StageError(
            f"{torch.cuda.device_count()} GPUs are visible, and {config.name} trains on one: name it, as in "
            "CUDA_VISIBLE_DEVICES=0."
        )
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    stepper = Stepper(parameters, do)
    told = {
        **_arguments(config, sampler, policy.numerics), "output_dir": folder, "seed": sampler.seed,
    }  # fmt: skip
    given: dict[str, Any] = {
        "model": policy.model,
        "processing_class": tokenizer,
        "optimizers": (stepper, torch.optim.lr_scheduler.LambdaLR(stepper, lambda _: 1.0)),
    }
    trainer: Any
    if isinstance(config, Dpo):
        given["train_dataset"] = Dataset.from_list([{"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]}])
        trainer = OnPairs(args=DPOConfig(**told), ref_model=policy.reference, **given)
    else:

        def reward(prompts: Any, completions: Any, **_: Any) -> list[float | None]:
            return list(scores())

        given |= {"train_dataset": Dataset.from_list([{"prompt": ""}]), "reward_funcs": reward}
        if isinstance(config, Grpo):
            trainer = Grouped(args=GRPOConfig(**told), **given)
        else:
            trainer = LeaveOneOut(args=RLOOConfig(**told), **given)
        trainer.given, trainer.beta, trainer.ref_model = replies, config.beta, policy.reference
        if policy.reference is not None:
            add_fused_lm_head(policy.reference, temperature=sampler.temperature)
    if policy.reference is None and "ref" in policy.model.peft_config:
        policy.model.delete_adapter("ref")  # of a resumed run it would be what was learnt until then
    trainer.numerics = policy.numerics
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Told(steps))
    return trainer


def _arguments(config: Alternative, sampler: Sampler, numerics: Numerics) -> dict[str, Any]:
    """Return what a trainer is told of an iteration: how often it steps, and on what."""
    rows = sampler.minibatch // 2 if isinstance(config, Dpo) else sampler.minibatch
    most = chat.TOGETHER // 2 if isinstance(config, Dpo) else chat.TOGETHER
    parts = next(count for count in range(1, rows + 1) if rows % count == 0 and rows // count <= most)
    told = {
        "per_device_train_batch_size": rows // parts, "gradient_accumulation_steps": parts, "max_grad_norm": 0.0,
        "gradient_checkpointing": numerics.recompute, "disable_dropout": True, "bf16": False,
        "use_cpu": numerics.device == "cpu", "dataloader_pin_memory": False, "remove_unused_columns": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "logging_nan_inf_filter": False, "pad_to_multiple_of": None,
    }  # fmt: skip
    if isinstance(config, Dpo):
        loss = {"loss_type": [config.loss.name], "beta": config.beta, "max_length": None}
        flipped = {"label_smoothing": config.loss.flipped} if isinstance(config.loss, Robust) else {}
        return {**told, **loss, **flipped, "num_train_epochs": config.epochs}
    grouped = {
        **told, "beta": 0.0, "num_generations": config.generations, "num_iterations": config.epochs,
        "epsilon": config.clip, "steps_per_generation": sampler.episodes // rows * parts, "shuffle_dataset": False,
        "max_completion_length": sampler.max_new_tokens, "temperature": sampler.temperature, "num_train_epochs": 1,
    }  # fmt: skip
    if isinstance(config, Grpo):
        return {
            **grouped, "loss_type": config.loss, "scale_rewards": config.scale,
            "importance_sampling_level": config.ratio, "use_bias_correction_kl": config.ratio == "token",
        }  # fmt: skip
    return {**grouped, "normalize_advantages": config.normalise}
