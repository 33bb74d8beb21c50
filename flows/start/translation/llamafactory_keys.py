"""Keys of LLaMA-Factory that are not translated: those without an effect on the model, and those without a counterpart.

A name that ends with `_` stands for all keys that begin with it.
"""

from flows.start.translation.keys import (
    ALL_STEPS,
    HELD_OUT,
    OTHER_LOSS,
    OTHER_METHOD,
    OWN_LAYERS,
    OWN_WEIGHTS,
    PROCESSES,
    QUANTIZED,
    UNSUPPORTED_BY_BOTH,
    WITHOUT_EFFECT_IN_BOTH,
    Table,
)

WITHOUT_EFFECT = (
    *WITHOUT_EFFECT_IN_BOTH,
    "overwrite_output_dir", "logging_", "log_", "plot_loss", "report_to", "run_name", "include_", "disable_tqdm",
    "overwrite_cache", "preprocessing_", "tokenized_path", "evaluation_strategy", "eval_delay", "eval_on_", "do_eval",
    "do_predict", "per_device_eval_batch_size", "eval_accumulation_steps", "predict_with_generate", "compute_accuracy",
    "push_to_hub", "hf_hub_token", "ms_hub_token", "om_hub_token", "cache_dir", "model_revision", "use_fast_tokenizer",
    "flash_attn", "use_unsloth", "use_unsloth_gc", "enable_liger_kernel", "use_v1_kernels", "use_reentrant_gc",
    "disable_gradient_checkpointing", "upcast_", "infer_", "offload_folder", "use_kv_cache", "print_param_status",
    "use_cpu", "no_cuda", "ray_", "master_", "use_ray", "enable_torch_profiler", "profile_modules", "image_", "video_",
    "audio_", "media_dir", "use_audio_in_video", "crop_to_patches", "data_shared_file_system", "buffer_size",
    "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model", "quantization_device_map",
    "skip_special_tokens", "extra_", "num_beams", "length_penalty", "create_new_adapter", "ignore_pad_token_for_loss",
    "project", "accelerator_config", "full_determinism",
)  # fmt: skip
# Keys that only some stages or methods read: without effect in the others.
OF_STAGES = {
    "sft": ("packing", "neat_packing", "mask_history", "train_on_prompt", "use_dft_loss", "use_asft_loss",
            "use_eaft_loss", "asft_alpha", "eaft_alpha", "tool_format"),
    "ppo": ("ppo_", "reward_model", "reward_model_", "top_p", "top_k", "temperature", "max_new_tokens", "max_length",
            "repetition_penalty", "do_sample"),
    "dpo": ("pref_", "simpo_gamma", "dpo_label_smoothing", "ld_alpha"),
    "kto": ("kto_",),
}  # fmt: skip
OF_METHODS = {
    "lora": ("lora_", "loraplus_", "use_rslora", "use_dora", "pissa_", "quantization_", "double_quantization",
             "additional_target"),
    "freeze": ("freeze_",),
    "oft": ("oft_", "module_dropout"),
}  # fmt: skip
_OTHER_OPTIMIZER = ("this optimizer is not available", "adamw is used; docs/guides/training.md lists others")
_TOKENS = ("tokens are not added to a checkpoint", "add them with Transformers first and give that folder")
_SAMPLING = ("PPO samples from the model's whole distribution", "leave it out")
UNSUPPORTED: Table = {
    **UNSUPPORTED_BY_BOTH,
    "eval_dataset": HELD_OUT,
    "max_samples": ("every row of a file is used", "shorten the file"),
    "mix_strategy": ("all rows of all sources are shuffled together", "repeat or shorten a file"),
    "interleave_probs": ("all rows of all sources are shuffled together", "repeat or shorten a file"),
    "train_on_prompt": ("the loss covers answers alone", "use stage pt for plain text"),
    "default_system": ("the chat template of the checkpoint decides", "write a system turn into the conversations"),
    "tool_format": ("conversations are text: rows with tool calls are rejected", "leave them out"),
    "preserve_thinking": ("the chat template of the checkpoint decides", "leave it out"),
    "split_special_tokens": ("a text that spells a control token is rejected", "leave it out"),
    "resize_vocab": _TOKENS,
    "add_tokens": _TOKENS,
    "add_special_tokens": _TOKENS,
    "new_special_tokens_config": _TOKENS,
    "init_special_tokens": _TOKENS,
    "shift_attn": OTHER_METHOD,
    "mixture_of_depths": OTHER_METHOD,
    "train_from_scratch": OWN_WEIGHTS,
    "moe_aux_loss_coef": ("the checkpoint's config.json decides", "set router_aux_loss_coef there"),
    "additional_target": OWN_LAYERS,
    "freeze_extra_modules": ("layers cannot be chosen by name", "method top_layers trains blocks from the top"),
    "use_llama_pro": OTHER_METHOD,
    "oft_": OTHER_METHOD,
    "module_dropout": OTHER_METHOD,
    "quantization_type": ("four-bit weights are NormalFloat (nf4)", "leave it out"),
    "pure_bf16": ("weights are trained in float32", "leave it out"),
    "quantization_method": QUANTIZED,
    "pref_ftx": ("DPO's loss has no term for the chosen answers alone", "align.algorithm.ptx mixes in text"),
    "pref_bco_weight": OTHER_LOSS,
    "ld_alpha": OTHER_LOSS,
    "ref_model": ("the reference is the model that training starts from", "leave it out"),
    "ref_model_adapters": ("the reference is the model that training starts from", "leave it out"),
    "ppo_score_norm": ("rewards are not scaled in training", "set align.policy.reward.normalized"),
    "top_p": _SAMPLING,
    "top_k": _SAMPLING,
    "repetition_penalty": _SAMPLING,
    "reward_model_": ("it belongs to reward_model", "leave it out"),
    "do_sample": _SAMPLING,
    "max_length": ("a reply's length is limited by max_new_tokens", "set max_new_tokens"),
    "pissa_": OTHER_METHOD,
    "freeze_trainable_modules": ("layers cannot be chosen by name", "method top_layers trains whole blocks"),
    "data_seed": ("one seed draws everything", "base.seed is that of the key seed"),
    "ref_model_quantization_bit": ("the reference is the model that training starts from", "leave it out"),
    "use_galore": _OTHER_OPTIMIZER,
    "galore_": _OTHER_OPTIMIZER,
    "use_apollo": _OTHER_OPTIMIZER,
    "apollo_": _OTHER_OPTIMIZER,
    "use_badam": _OTHER_OPTIMIZER,
    "badam_": _OTHER_OPTIMIZER,
    "use_adam_mini": _OTHER_OPTIMIZER,
    "early_stopping_steps": ALL_STEPS,
    "use_dft_loss": OTHER_LOSS,
    "use_asft_loss": OTHER_LOSS,
    "asft_alpha": OTHER_LOSS,
    "use_eaft_loss": OTHER_LOSS,
    "eaft_alpha": OTHER_LOSS,
    "use_mca": PROCESSES,
    "use_megatron_bridge": PROCESSES,
    "use_hyper_parallel": PROCESSES,
    "hyper_parallel_": PROCESSES,
}


def without_effect(stage: str, method: str) -> tuple[str, ...]:
    """Return the names of keys without an effect on the model, in a stage and a method of LLaMA-Factory."""
    stages = (name for owner, names in OF_STAGES.items() if owner != stage for name in names)
    methods = (name for owner, names in OF_METHODS.items() if owner != method for name in names)
    return (*WITHOUT_EFFECT, *stages, *methods)
