"""Keys of LLaMA-Factory that are not translated: those without an effect on the model, and those without a counterpart.

A name that ends with `_` stands for all keys that begin with it.
"""

from flows.start.translation.keys import Table

WITHOUT_EFFECT = (
    "output_dir", "overwrite_output_dir", "logging_", "log_", "save_", "plot_loss", "report_to", "run_name",
    "include_", "disable_tqdm", "overwrite_cache", "preprocessing_", "dataloader_", "ddp_", "tokenized_path",
    "resume_from_checkpoint", "eval_strategy", "evaluation_strategy", "eval_steps", "eval_delay", "eval_on_", "do_eval",
    "do_predict", "per_device_eval_batch_size", "eval_accumulation_steps", "predict_with_generate",
    "compute_accuracy", "metric_for_best_model", "greater_is_better", "swanlab_",
    "use_swanlab", "push_to_hub", "hub_", "hf_hub_token", "ms_hub_token", "om_hub_token", "cache_dir", "model_revision",
    "use_fast_tokenizer", "low_cpu_mem_usage", "flash_attn", "use_unsloth", "use_unsloth_gc", "enable_liger_kernel",
    "use_v1_kernels", "use_reentrant_gc", "disable_gradient_checkpointing", "upcast_", "infer_", "offload_folder",
    "use_kv_cache", "print_param_status", "use_cpu", "no_cuda", "torch_compile", "tf32", "remove_unused_columns",
    "ray_", "master_", "use_ray", "enable_torch_profiler", "profiler_", "profile_modules", "image_", "video_", "audio_",
    "media_dir", "use_audio_in_video", "crop_to_patches", "data_shared_file_system", "buffer_size", "streaming",
    "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model",
    "quantization_device_map", "skip_special_tokens", "extra_",
    "num_beams", "length_penalty", "create_new_adapter",
    "ignore_pad_token_for_loss",
    "project", "trackio_", "accelerator_config", "full_determinism",
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
_OTHER_METHOD = ("this variant of the method is not available", "train without it")
_OTHER_OPTIMIZER = ("this optimizer is not available", "adamw is used; docs/guides/training.md lists others")
_OTHER_LOSS = ("this loss is not available", "leave it out")
_PARALLEL = (
    "how many processes share a model depends on your machine",
    "set numerics.parallel (docs/guides/distributed.md)",
)
_TOKENS = ("tokens are not added to a checkpoint", "add them with Transformers first and give that folder")
_SAMPLING = ("PPO samples from the model's whole distribution", "leave it out")
UNSUPPORTED: Table = {
    "eval_dataset": ("rows are held out by a hash of their own", "list the file as a source, with a column split"),
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
    "trust_remote_code": ("code of a checkpoint is never run", "use a checkpoint that Transformers knows"),
    "rope_scaling": ("the positions of a checkpoint stay as they are", "change its config.json first"),
    "shift_attn": _OTHER_METHOD,
    "mixture_of_depths": _OTHER_METHOD,
    "train_from_scratch": ("a checkpoint's weights are kept", "use pretrain with model: {name: new}"),
    "moe_aux_loss_coef": ("the checkpoint's config.json decides", "set router_aux_loss_coef there"),
    "loraplus_": _OTHER_METHOD,
    "additional_target": ("layers beside the low-rank updates are not trained", "use method full or top_layers"),
    "freeze_extra_modules": ("layers cannot be chosen by name", "method top_layers trains blocks from the top"),
    "use_llama_pro": _OTHER_METHOD,
    "oft_": _OTHER_METHOD,
    "module_dropout": _OTHER_METHOD,
    "quantization_type": ("four-bit weights are NormalFloat (nf4)", "leave it out"),
    "pure_bf16": ("weights are trained in float32", "leave it out"),
    "quantization_method": ("a quantized checkpoint is not trained", "start from the full-precision checkpoint"),
    "pref_ftx": ("DPO's loss has no term for the chosen answers alone", "align.algorithm.ptx mixes in text"),
    "pref_bco_weight": _OTHER_LOSS,
    "dpo_label_smoothing": ("this is cDPO's loss", "loss: {name: robust, flipped: ...} is the nearest"),
    "simpo_gamma": _OTHER_LOSS,
    "kto_": _OTHER_LOSS,
    "ld_alpha": _OTHER_LOSS,
    "ref_model": ("the reference is the model that training starts from", "leave it out"),
    "ref_model_adapters": ("the reference is the model that training starts from", "leave it out"),
    "ppo_score_norm": ("rewards are not scaled in training", "set align.policy.reward.normalized"),
    "top_p": _SAMPLING,
    "top_k": _SAMPLING,
    "repetition_penalty": _SAMPLING,
    "reward_model_": ("it belongs to reward_model", "leave it out"),
    "do_sample": _SAMPLING,
    "max_length": ("a reply's length is limited by max_new_tokens", "set max_new_tokens"),
    "pissa_": _OTHER_METHOD,
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
    "neftune_": ("noise on embeddings is not available", "leave it out"),
    "label_smoothing_factor": ("fine-tuning has no label smoothing", "leave it out"),
    "early_stopping_steps": ("training runs for its steps", "set steps"),
    "use_dft_loss": _OTHER_LOSS,
    "use_asft_loss": _OTHER_LOSS,
    "asft_alpha": _OTHER_LOSS,
    "use_eaft_loss": _OTHER_LOSS,
    "eaft_alpha": _OTHER_LOSS,
    "fp8": ("there is no training in float8", "numerics.dtype.decoder: bfloat16 is used"),
    "fp8_": ("there is no training in float8", "numerics.dtype.decoder: bfloat16 is used"),
    "load_best_model_at_end": ("the weights of the last step are saved", "set steps"),
    "deepspeed": _PARALLEL,
    "fsdp": _PARALLEL,
    "fsdp_": _PARALLEL,
    "use_mca": _PARALLEL,
    "use_megatron_bridge": _PARALLEL,
    "use_hyper_parallel": _PARALLEL,
    "hyper_parallel_": _PARALLEL,
}


def without_effect(stage: str, method: str) -> tuple[str, ...]:
    """Return the names of keys without an effect on the model, in a stage and a method of LLaMA-Factory."""
    stages = (name for owner, names in OF_STAGES.items() if owner != stage for name in names)
    methods = (name for owner, names in OF_METHODS.items() if owner != method for name in names)
    return (*WITHOUT_EFFECT, *stages, *methods)
