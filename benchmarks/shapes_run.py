"""The rate of matrix products at a decoder's own shapes.

`benchmarks/speed.py` starts it as `python -m benchmarks.shapes_run FILE`. Timed are the products of a training step in
bfloat16, worked out as a stage does: of each weight its output, its input's gradient and its own, and attention's. An
operand that a step reads across its rows (the weight for its output, the output's gradient for the weight's) is read so
here; a second figure has all operands straight, which is faster and what a step could have by copying alone.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import harness
from tasks.common.modelling import models
from tasks.common.modelling.models import Shape
from tasks.common.modelling.pretrained import New
from tasks.common.settings import Numerics
from tasks.common.stage import write_json

if TYPE_CHECKING:
    import torch

SECONDS, WARM = 0.3, 3  # each product is repeated for so long, after so many that warm up


@dataclass(frozen=True)
class Product:
    """So many products at once of (rows, inner) and (inner, columns), and which operands lie across."""

    several: int
    rows: int
    inner: int
    columns: int
    left_across: bool = False
    right_across: bool = False

    def rate(self) -> float:
        """Return the median FLOP/s."""
        import torch

        left = _operand(self.several, self.rows, self.inner, self.left_across)
        right = _operand(self.several, self.inner, self.columns, self.right_across)
        if self.several == 1:
            left, right = left[0], right[0]
        for _ in range(WARM):
            torch.matmul(left, right)
        times: list[float] = []
        while sum(times) < SECONDS:
            started = time.perf_counter()
            torch.matmul(left, right)
            times.append(time.perf_counter() - started)
        return 2.0 * self.several * self.rows * self.inner * self.columns / statistics.median(times)


def _operand(several: int, rows: int, columns: int, across: bool) -> "torch.Tensor":
    import torch

    shape = (several, columns, rows) if across else (several, rows, columns)
    made = torch.randn(shape).bfloat16()
    return made.mT if across else made


def products(shape: Shape, vocabulary: int, batch: int, window: int) -> list[Product]:
    """Return a step's products: of each kind of weight (x W^T) once, and of attention."""
    tokens, width = batch * window, shape.hidden // shape.heads
    weights = [(shape.hidden, shape.hidden), (shape.hidden, shape.feed_forward), (shape.feed_forward, shape.hidden),
               (shape.hidden, vocabulary)]  # fmt: skip
    several = batch * shape.heads
    found = []
    for inner, outer in weights:
        found += [
            Product(1, tokens, inner, outer, right_across=True),
            Product(1, tokens, outer, inner),
            Product(1, outer, tokens, inner, left_across=True),
        ]
    return [
        *found,
        Product(several, window, width, window, right_across=True),  # scores
        Product(several, window, window, width),  # what they choose
        Product(several, window, window, width, left_across=True),  # and their gradients: of what is chosen,
        Product(several, window, width, window, right_across=True),  # of the choice,
        Product(several, window, window, width),  # of queries
        Product(several, window, window, width, left_across=True),  # and of keys
    ]


def main() -> None:
    """Measure and write the median."""
    request = harness.read_request()
    models.prepare_torch(Numerics.model_validate(request["numerics"]), seed=1)
    shape = New.model_validate(request["model"])
    asked = products(shape, request["vocabulary"], request["batch"], request["window"])
    straight = [replace(product, left_across=False, right_across=False) for product in asked]
    rates = {product: product.rate() for product in dict.fromkeys([*asked, *straight])}  # many are the same
    figures = {
        name: statistics.median(rates[product] for product in kind) / 1e9
        for name, kind in (("gflops", asked), ("straight_gflops", straight))
    }
    write_json(Path(request["result"]), figures)


if __name__ == "__main__":
    main()
