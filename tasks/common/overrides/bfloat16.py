"""Matrix products in bfloat16 on processors without bfloat16 instructions.

There torch computes them one element at a time, sixty times slower than in float32 (with AVX2: 0.8 instead of 54
GFLOP/s). The result does not depend on the processor: inputs rounded to bfloat16, summed in float32, the sum rounded
once. This module computes exactly that with torch's float32 products. Only the order of summation differs from
processors with bfloat16 instructions, as it does between any two kinds of processor.

Replaces: torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm (torch 2.13)
Delete when: torch multiplies bfloat16 on AVX2 about as fast as float32, or every supported processor has AVX512-BF16.
"""

import warnings
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MATMUL_OPERATORS = ("mm", "addmm", "bmm", "baddbmm")
OVERLOADS = ("default", "out")  # return the result, or write it into `out=`, as compiled graphs do

# Kept alive here: a library's kernels are unregistered when it is garbage collected.
_registered_libraries: "list[torch.library.Library]" = []


def has_native_bfloat16() -> bool:
    """Return whether this processor has bfloat16 instructions that torch uses."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def install() -> None:
    """Compute bfloat16 products in float32 in this process, on a CPU; products of other dtypes do not change."""
    import torch

    library = torch.library.Library("aten", "IMPL")
    _registered_libraries.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the warning that a kernel is replaced
        for name in MATMUL_OPERATORS:
            for overload in OVERLOADS:
                operator = getattr(getattr(torch.ops.aten, name), overload)
                kernel = torch.library.get_kernel(operator, "CPU")
                operator_name = name if overload == "default" else f"{name}.{overload}"
                replacement = partial(_product, kernel)
                library.impl(operator_name, replacement, "CPU", with_keyset=True, allow_override=True)
    torch.backends.cuda.enable_flash_sdp(False)  # also affects the CPU, where fused attention has its own products


def _product(kernel: Any, keys: Any, *operands: Any, out: "torch.Tensor | None" = None, **factors: Any) -> Any:
    """Call a kernel; if its operands are bfloat16, compute in float32 and round the result."""
    import torch

    if operands[-1].dtype != torch.bfloat16:
        out_argument = {} if out is None else {"out": out}
        return kernel.call_boxed(keys, *operands, **factors, **out_argument)
    float_operands = [operand.float() for operand in operands]
    if out is None:
        return kernel.call_boxed(keys, *float_operands, **factors).bfloat16()
    return out.copy_(kernel.call_boxed(keys, *float_operands, **factors, out=out.float()))
