"""Products of bfloat16 on processors without them: what they are, and that all other products stay as they were.

They hold for a whole process, so each test asks one of its own.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START = """
import torch
from tasks.common.modelling import bfloat16

torch.manual_seed(0)
a, b, c = torch.randn(30, 64), torch.randn(64, 20), torch.randn(30, 20)
several = torch.randn(3, 30, 64), torch.randn(3, 64, 20)
narrow, wide = lambda *given: [x.bfloat16() for x in given], lambda *given: [x.bfloat16().double() for x in given]
"""


def run(code: str) -> None:
    """Run code in a process of its own, in which an assertion that fails is an error."""
    done = subprocess.run([sys.executable, "-c", START + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_product_is_the_sum_of_rounded_numbers_rounded_once() -> None:
    """To a unit in the last of bfloat16's 8 digits: the sum in float32 may fall on the other side of a rounding."""
    run("""
bfloat16.provide()
close = dict(rtol=2**-8, atol=1e-6)
torch.testing.assert_close(torch.mm(*narrow(a, b)).double(), torch.mm(*wide(a, b)), **close)
torch.testing.assert_close(torch.bmm(*narrow(*several)).double(), torch.bmm(*wide(*several)), **close)
torch.testing.assert_close(torch.addmm(*narrow(c, a, b)).double(), torch.addmm(*wide(c, a, b)), **close)
found = torch.addmm(*narrow(c, a, b), beta=0.5, alpha=2.0)
assert found.dtype == torch.bfloat16
torch.testing.assert_close(found.double(), torch.addmm(*wide(c, a, b), beta=0.5, alpha=2.0), **close)
""")


def test_a_product_into_a_given_tensor_is_written_there() -> None:
    """Compiled programs give the tensor that a result goes into."""
    run("""
bfloat16.provide()
target = torch.empty(30, 20, dtype=torch.bfloat16)
assert torch.mm(*narrow(a, b), out=target) is target
assert torch.equal(target, torch.mm(*narrow(a, b)))
""")


def test_products_of_other_types_keep_their_bytes() -> None:
    run("""
before = [torch.mm(a, b), torch.addmm(c, a, b), torch.bmm(*several), torch.mm(a.double(), b.double())]
bfloat16.provide()
bfloat16.provide()
after = [torch.mm(a, b), torch.addmm(c, a, b), torch.bmm(*several), torch.mm(a.double(), b.double())]
assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
target = torch.empty(30, 20)
assert torch.equal(torch.mm(a, b, out=target), before[0])
""")


def test_gradients_flow_as_through_torch_s_own() -> None:
    run("""
layer, rows = torch.nn.Linear(64, 20), torch.randn(30, 64)

def gradient() -> torch.Tensor:
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(rows).float().square().sum()
    loss.backward()
    return layer.weight.grad.clone()

own = gradient()
bfloat16.provide()
torch.testing.assert_close(gradient(), own, rtol=0.02, atol=0.02 * own.abs().max().item())
""")
