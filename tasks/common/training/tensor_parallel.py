"""Tensor parallelism for Llama-style decoders: each process holds some heads and neurons of every block.

Shoeybi et al. 2019 ("Megatron-LM", section 3), by torch's own plans. The matrices into attention and feed-forward are
cut by rows of their weights (`ColwiseParallel`), those out of them by columns, so that each block needs one sum over
the processes after each of the two. Embedding and output head are cut by the vocabulary. Norms are whole everywhere,
but as distributed tensors on the same mesh: the fused optimizer and the gradient's norm take no mixture.
"""

from typing import TYPE_CHECKING, Any

from tasks.common.stage import StageError

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

ARCHITECTURE = "LlamaForCausalLM"
CUT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # what each process must get a like part of


def must_divide(model: "torch.nn.Module", size: int) -> None:
    """Raise StageError where a model is of another kind, or cannot be cut into `size` like parts."""
    kind = type(model).__name__
    if kind != ARCHITECTURE:
        raise StageError(
            f"numerics.parallel.engine is tensor, which shares out plain {ARCHITECTURE} decoders only, but what is to "
            f"be trained is a {kind}: take the engine data or fsdp for this stage."
        )
    config: Any = model.config
    for name in CUT:
        value = getattr(config, name)
        if value % size:
            raise StageError(
                f"numerics.parallel.engine is tensor, and the model's {name} ({value}) is no multiple of "
                f"numerics.parallel.processes ({size}): change one of them, or take the engine fsdp."
            )


def parallelize(model: Any, mesh: "DeviceMesh") -> None:
    """Cut a decoder's weights over the processes of a mesh, in place; its inputs and logits stay whole in each.

    Raises StageError where the model holds weights beside an ordinary decoder's, which the plan leaves as they are.
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
            distribute_module(module, mesh, input_fn=_enter, output_fn=_leave)
    parallelize_module(model, mesh, plan)
    model.tie_weights()  # the plan has cut one tensor twice
    loose = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if loose:
        raise StageError(
            f"numerics.parallel.engine is tensor, which cannot cut {loose[0]}: it knows a decoder's own weights only. "
            "Take the engine data or fsdp, or finetune.method full or top."
        )


def _enter(_: Any, inputs: "tuple[torch.Tensor, ...]", mesh: "DeviceMesh") -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    return tuple(DTensor.from_local(tensor, mesh, [Replicate()], run_check=False) for tensor in inputs)


def _leave(_: Any, output: Any, mesh: "DeviceMesh") -> Any:
    """Hand a norm's output to all the matrices that read it as one tensor, so that their gradients are summed once."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(output.to_local(), mesh, [Replicate()], run_check=False)
