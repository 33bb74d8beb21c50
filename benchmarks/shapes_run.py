"""The rate of matrix products at a decoder's shapes.

`benchmarks/speed.py` runs it as `python -m benchmarks.shapes_run FILE`. It times the bfloat16 products of a training
step: for each weight the output, the input's gradient and the weight's gradient, and those of attention. Operands that
are transposed in a step (the weight for the output, the output's gradient for the weight's gradient) are transposed
here too. A second figure has all operands contiguous, which is faster and could be reached by copying.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import harness
from tasks.common.harness.records import write_json
from tasks.common.modelling import torch_setup
from tasks.common.modelling.models import Shape
from tasks.common.settings import Numerics
from tasks.pretrain.pretrained import New

if TYPE_CHECKING:
    import torch

MIN_SECONDS, WARMUP_RUNS = 0.3, 3  # minimum time per product in seconds, after warm-up runs


@dataclass(frozen=True)
class Product:
    """`count` batched products (rows, inner) x (inner, columns), and which operands are transposed views."""

    count: int
    rows: int
    inner: int
    columns: int
    left_transposed: bool = False
    right_transposed: bool = False

    def rate(self) -> float:
        """Return the median FLOP/s."""
        import torch

        left = _operand(self.count, self.rows, self.inner, self.left_transposed)
        right = _operand(self.count, self.inner, self.columns, self.right_transposed)
        if self.count == 1:
            left, right = left[0], right[0]
        for _ in range(WARMUP_RUNS):
            torch.matmul(left, right)
        times: list[float] = []
        while sum(times) < MIN_SECONDS:
            started = time.perf_counter()
            torch.matmul(left, right)
            times.append(time.perf_counter() - started)
        return 2.0 * self.count * self.rows * self.inner * self.columns / statistics.median(times)


def _operand(count: int, rows: int, columns: int, transposed: bool) -> "torch.Tensor":
    import torch

    shape = (count, columns, rows) if transposed else (count, rows, columns)
    made = torch.randn(shape).bfloat16()
    return made.mT if transposed else made


def products(shape: Shape, vocabulary: int, batch: int, window: int) -> list[Product]:
    """Return a step's products: x W^T and its gradients once per kind of weight, and attention's."""
    tokens, width = batch * window, shape.hidden // shape.heads
    weights = [(shape.hidden, shape.hidden), (shape.hidden, shape.feed_forward), (shape.feed_forward, shape.hidden),
               (shape.hidden, vocabulary)]  # fmt: skip
    heads = batch * shape.heads
    found = []
    for inner, outer in weights:
        found += [
            Product(1, tokens, inner, outer, right_transposed=True),
            Product(1, tokens, outer, inner),
            Product(1, outer, tokens, inner, left_transposed=True),
        ]
    return [
        *found,
        Product(heads, window, width, window, right_transposed=True),  # attention scores
        Product(heads, window, window, width),  # attention output
        Product(heads, window, window, width, left_transposed=True),  # gradient of the values
        Product(heads, window, width, window, right_transposed=True),  # gradient of the attention weights
        Product(heads, window, window, width),  # gradient of the queries
        Product(heads, window, window, width, left_transposed=True),  # gradient of the keys
    ]


def main() -> None:
    """Measure all products and write the median rates."""
    request = harness.read_request()
    torch_setup.prepare_torch(Numerics.model_validate(request["numerics"]), seed=1)
    shape = New.model_validate(request["model"])
    step_products = products(shape, request["vocabulary"], request["batch"], request["window"])
    contiguous = [replace(product, left_transposed=False, right_transposed=False) for product in step_products]
    rates = {
        product: product.rate() for product in dict.fromkeys([*step_products, *contiguous])
    }  # equal products are measured once
    figures = {
        name: statistics.median(rates[product] for product in kind) / 1e9
        for name, kind in (("gflops", step_products), ("straight_gflops", contiguous))
    }
    write_json(Path(request["result"]), figures)


if __name__ == "__main__":
    main()
