"""Matrix products in bfloat16 on processors that have none.

torch works them out number by number there, sixty times slower than in float32 (AVX2 alone: 0.8 of 54 GFLOP/s). What
such a product is does not hang on the processor: numbers rounded to bfloat16, summed in float32, the sum rounded once.
So on these processors it is computed as just that, by torch's own products in float32; only the order of sums differs
from a processor that has them, as it differs between any two kinds.
"""

import warnings
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
FORMS = ("default", "out")  # the result returned, or written into a tensor that is given, as compiled programs do

_kept: "list[torch.library.Library]" = []  # what a library registered is gone when it is


def built_in() -> bool:
    """Return whether torch multiplies bfloat16 with instructions of this processor."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def provide() -> None:
    """Have this process compute products of bfloat16 in float32, once; products of other types stay as they are."""
    import torch

    library = torch.library.Library("aten", "IMPL")
    _kept.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced, which is what is meant
        for name in PRODUCTS:
            for form in FORMS:
                operator = getattr(getattr(torch.ops.aten, name), form)
                kernel = torch.library.get_kernel(operator, "CPU")
                replaced = name if form == "default" else f"{name}.{form}"
                call = partial(_product, kernel)
                library.impl(replaced, call, "CPU", with_keyset=True, allow_override=True)
    torch.backends.cuda.enable_flash_sdp(False)  # on a CPU too: fused attention has products of its own


def _product(kernel: Any, keys: Any, *operands: Any, out: "torch.Tensor | None" = None, **factors: Any) -> Any:
    """Return what a kernel makes of its operands, in float32 where they are bfloat16."""
    import torch

    if operands[-1].dtype != torch.bfloat16:
        given = {} if out is None else {"out": out}
        return kernel.call_boxed(keys, *operands, **factors, **given)
    wide = [operand.float() for operand in operands]
    if out is None:
        return kernel.call_boxed(keys, *wide, **factors).bfloat16()
    return out.copy_(kernel.call_boxed(keys, *wide, **factors, out=out.float()))
