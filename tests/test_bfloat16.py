"""bfloat16 products on processors without bfloat16: their values, and that other products do not change.

The override affects the whole process, so each test runs in a process of its own.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START = """
import torch
from tasks.common.overrides import bfloat16

torch.manual_seed(0)
a, b, c = torch.randn(30, 64), torch.randn(64, 20), torch.randn(30, 20)
several = torch.randn(3, 30, 64), torch.randn(3, 64, 20)
narrow, wide = lambda *given: [x.bfloat16() for x in given], lambda *given: [x.bfloat16().double() for x in given]
"""


def run(code: str) -> None:
    """Run code in a new process; a failed assertion in it fails the test."""
    done = subprocess.run([sys.executable, "-c", START + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_matmul_rounds_inputs_and_result_once() -> None:
    """Up to the last of bfloat16's 8 bits of precision: the float32 sum may round to the other side."""
    run("""
bfloat16.install()
close = dict(rtol=2**-8, atol=1e-6)
torch.testing.assert_close(torch.mm(*narrow(a, b)).double(), torch.mm(*wide(a, b)), **close)
torch.testing.assert_close(torch.bmm(*narrow(*several)).double(), torch.bmm(*wide(*several)), **close)
torch.testing.assert_close(torch.addmm(*narrow(c, a, b)).double(), torch.addmm(*wide(c, a, b)), **close)
found = torch.addmm(*narrow(c, a, b), beta=0.5, alpha=2.0)
assert found.dtype == torch.bfloat16
torch.testing.assert_close(found.double(), torch.addmm(*wide(c, a, b), beta=0.5, alpha=2.0), **close)
""")


def test_a_product_into_a_given_tensor_is_written_there() -> None:
    """Compiled graphs pass `out=`."""
    run("""
bfloat16.install()
target = torch.empty(30, 20, dtype=torch.bfloat16)
assert torch.mm(*narrow(a, b), out=target) is target
assert torch.equal(target, torch.mm(*narrow(a, b)))
""")


def test_products_of_other_types_keep_their_bytes() -> None:
    run("""
before = [torch.mm(a, b), torch.addmm(c, a, b), torch.bmm(*several), torch.mm(a.double(), b.double())]
bfloat16.install()
bfloat16.install()
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
bfloat16.install()
torch.testing.assert_close(gradient(), own, rtol=0.02, atol=0.02 * own.abs().max().item())
""")
