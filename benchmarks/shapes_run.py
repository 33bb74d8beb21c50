"""The rate of matrix products at a decoder's own shapes.

`benchmarks/speed.py` starts it as `python -m benchmarks.shapes_run FILE`. Timed are the products of a training step in
bfloat16, worked out as a stage does: of each weight its output, its input's gradient and its own, and attention's.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from tasks.common.modelling import models
from tasks.common.modelling.models import Shape
from tasks.common.modelling.pretrained import New
from tasks.common.settings import Numerics
from tasks.common.stage import write_json

SECONDS, WARM = 0.3, 3  # each product is repeated for so long, after so many that warm up


def products(shape: Shape, vocabulary: int, batch: int, window: int) -> list[tuple[int, int, int, int]]:
    """Return (how many at once, rows, inner, columns) of a step's products, each shape of a kind once."""
    tokens, width = batch * window, shape.hidden // shape.heads
    weights = [(shape.hidden, shape.hidden), (shape.hidden, shape.feed_forward), (shape.feed_forward, shape.hidden),
               (shape.hidden, vocabulary)]  # fmt: skip
    several = batch * shape.heads
    found = []
    for inner, outer in weights:
        found += [(1, tokens, inner, outer), (1, tokens, outer, inner), (1, inner, tokens, outer)]
    scores, sums = (several, window, width, window), (several, window, window, width)
    return [*found, scores, sums, sums, sums, scores, sums]  # forward: scores, sums; backward: two of each


def rate(several: int, rows: int, inner: int, columns: int) -> float:
    """Return the median FLOP/s of a product."""
    import torch

    left = torch.randn(several, rows, inner).bfloat16()
    right = torch.randn(several, inner, columns).bfloat16()
    call: Callable[[], Any] = (lambda: torch.bmm(left, right)) if several > 1 else (lambda: torch.mm(left[0], right[0]))
    for _ in range(WARM):
        call()
    times: list[float] = []
    while sum(times) < SECONDS:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 2.0 * several * rows * inner * columns / statistics.median(times)


def main() -> None:
    """Measure and write the median."""
    request = harness.read_request()
    models.prepare_torch(Numerics.model_validate(request["numerics"]), seed=1)
    shape = New.model_validate(request["model"])
    found = [rate(*product) for product in products(shape, request["vocabulary"], request["batch"], request["window"])]
    write_json(Path(request["result"]), {"gflops": statistics.median(found) / 1e9})


if __name__ == "__main__":
    main()
