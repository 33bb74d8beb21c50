"""Tensor parallelism for Llama-style decoders: each process holds some heads and neurons of every block.

Shoeybi et al. 2019 ("Megatron-LM", section 3), by torch's parallelize plans. The input matrices of attention and
feed-forward layers are sharded by output features (`ColwiseParallel`) and their output matrices by input features
(`RowwiseParallel`), so each layer needs one all-reduce. Embedding and output head are sharded by the vocabulary. Norms
are replicated, as DTensors on the same mesh: the fused optimizer and the gradient norm do not accept a mix of DTensors
and plain tensors.
"""

from typing import TYPE_CHECKING, Any

from tasks.common.harness.job import StageError

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

ARCHITECTURE = "LlamaForCausalLM"
# Config fields that must be multiples of the number of processes.
DIVISIBLE_FIELDS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def check_divisible(model: "torch.nn.Module", size: int) -> None:
    """Raise StageError if a model is not of `ARCHITECTURE`, or cannot be split evenly over `size` processes."""
    kind = type(model).__name__
    if kind != ARCHITECTURE:
        raise StageError(
            f"numerics.parallel.engine is tensor, which supports plain {ARCHITECTURE} decoders only, but the model to "
            f"train is a {kind}: set the engine to data or fsdp for this stage."
        )
    config: Any = model.config
    for name in DIVISIBLE_FIELDS:
        value = getattr(config, name)
        if value % size:
            raise StageError(
                f"numerics.parallel.engine is tensor, and the model's {name} ({value}) is not a multiple of "
                f"numerics.parallel.processes ({size}): change one of them, or set the engine to fsdp."
            )


def parallelize(model: Any, mesh: "DeviceMesh") -> None:
    """Shard a decoder's weights over a device mesh, in place; its inputs and logits are replicated.

    Raises StageError if the model has weights that the plan does not cover (adapters, LoRA).
    """
    from torch.distributed.tensor import DTensor, Replicate, distribute_module
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
        **{f"model.layers.*.self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")},
        **{f"model.layers.*.mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")},
        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
    }
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            distribute_module(module, mesh, input_fn=_replicate_inputs, output_fn=_replicate_output)
    parallelize_module(model, mesh, plan)
    model.tie_weights()  # the plan sharded the tied weight twice
    uncovered = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if uncovered:
        raise StageError(
            f"numerics.parallel.engine is tensor, which cannot shard {uncovered[0]}: it supports only a decoder's "
            "own weights. Set the engine to data or fsdp, or the method to full or top_layers."
        )


def _replicate_inputs(_: Any, inputs: "tuple[torch.Tensor, ...]", mesh: "DeviceMesh") -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    return tuple(DTensor.from_local(tensor, mesh, [Replicate()], run_check=False) for tensor in inputs)


def _replicate_output(_: Any, output: Any, mesh: "DeviceMesh") -> Any:
    """Wrap a norm's output in one replicated DTensor, so that the gradients of its readers are reduced once."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(output.to_local(), mesh, [Replicate()], run_check=False)
