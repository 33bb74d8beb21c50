"""Loss functions against plain loops over their formulas."""

import math
from functools import partial
from itertools import permutations
from typing import Any

import pytest

from tasks.common.training import losses
from tasks.common.training.losses import IGNORE_INDEX, Loss


def logits(rows: int = 6, vocabulary: int = 11) -> Any:
    """Return random logits."""
    import torch

    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def token_nlls(row: list[float]) -> list[float]:
    """Return −log softmax of plain numbers."""
    total = math.log(sum(math.exp(value) for value in row))
    return [total - value for value in row]


def test_cross_entropy_is_summed_nll() -> None:
    """Against a naive softmax; ignored targets do not count."""
    import torch

    sample_logits, targets = logits(), [3, 0, IGNORE_INDEX, 10, 5, IGNORE_INDEX]
    naive = sum(
        token_nlls(row)[target] for row, target in zip(sample_logits.tolist(), targets, strict=True) if target >= 0
    )
    assert losses.cross_entropy(sample_logits, torch.tensor(targets)).item() == pytest.approx(naive, rel=1e-6)


@pytest.mark.parametrize("z", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_compiled_cross_entropy_matches_eager(kind: str, z: float) -> None:
    """Equal sums and gradients."""
    import torch

    targets, results = torch.tensor([3, 0, IGNORE_INDEX, 10, 5, IGNORE_INDEX]), []
    settings = Loss(label_smoothing=0.0, z_loss=z)
    for loss in (partial(losses.compiled_cross_entropy, z=z), partial(losses.cross_entropy, loss=settings)):
        inputs = logits().to(getattr(torch, kind)).requires_grad_()
        total = loss(inputs, targets)
        (0.7 * total).backward()
        results.append((total.detach(), inputs.grad))
    torch.testing.assert_close(*results)
    assert results[0][1][2].abs().sum() == 0


def test_label_smoothing_matches_formula() -> None:
    """(1 − ε) × the target's NLL + ε × the mean NLL over the vocabulary (Szegedy et al. 2016, section 7)."""
    import torch

    sample_logits, targets = logits(), [3, 0, IGNORE_INDEX, 10, 5, 1]
    naive = sum(
        0.8 * (row := token_nlls(values))[target] + 0.2 * sum(row) / len(row)
        for values, target in zip(sample_logits.tolist(), targets, strict=True)
        if target >= 0
    )
    smoothed = losses.cross_entropy(sample_logits, torch.tensor(targets), Loss(label_smoothing=0.2, z_loss=0.0))
    assert smoothed.item() == pytest.approx(naive, rel=1e-6)


def test_the_z_loss_is_the_square_of_the_log_partition() -> None:
    """The squares are summed over the targets, weighted, and added to the cross-entropy."""
    import torch

    sample_logits, targets = logits(), [3, 0, IGNORE_INDEX, 10, 5, 1]
    plain = losses.cross_entropy(sample_logits, torch.tensor(targets)).item()
    partition = [math.log(sum(map(math.exp, row))) for row in sample_logits.tolist()]
    naive = plain + 0.01 * sum(z**2 for z, target in zip(partition, targets, strict=True) if target >= 0)
    assert losses.cross_entropy(
        sample_logits, torch.tensor(targets), Loss(label_smoothing=0.0, z_loss=0.01)
    ).item() == pytest.approx(naive, rel=1e-6)


def test_next_token_matches_shifted_cross_entropy() -> None:
    """Equal to the loss of logits without the last position, which gets no gradient."""
    import torch

    ids = torch.randint(11, (3, 5))
    logits = torch.randn(3, 5, 11, requires_grad=True)
    total = losses.next_token(logits, ids)
    reference = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="sum")
    torch.testing.assert_close(total, reference)
    total.backward()
    assert logits.grad is not None
    assert not logits.grad[:, -1].any()
    assert logits.grad[:, :-1].any(dim=-1).all()


def test_squared_error() -> None:
    """The sum of squared differences."""
    import torch

    assert losses.squared_error(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])).item() == pytest.approx(9.25)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_bradley_terry(margin: float) -> None:
    """−log σ(better − worse − margin × gap), summed; a missing gap (NaN) counts as 0."""
    import torch

    scores, pairs = [1.0, 3.0, -0.5], [(1, 0, 2.0), (0, 2, 0.5), (2, 1, math.nan)]
    distances = [scores[b] - scores[w] - margin * (0 if math.isnan(gap) else gap) for b, w, gap in pairs]
    naive = sum(math.log1p(math.exp(-distance)) for distance in distances)
    assert losses.bradley_terry(torch.tensor(scores), pairs, margin).item() == pytest.approx(naive, rel=1e-6)


def test_plackett_luce_matches_sequential_choice() -> None:
    """A softmax over all, then over the rest; the likelihoods of all orders sum to 1."""
    import torch

    scores = torch.tensor([0.5, -1.0, 2.0, 0.0])
    one = losses.plackett_luce(scores, [[[2], [0], [3], [1]]]).item()
    plain = [2.0, 0.5, 0.0, -1.0]
    naive = sum(math.log(sum(map(math.exp, plain[at:]))) - plain[at] for at in range(3))
    assert one == pytest.approx(naive, rel=1e-6)
    likelihoods = [
        math.exp(-losses.plackett_luce(scores, [[[place] for place in order]]).item())
        for order in permutations(range(4))
    ]
    assert sum(likelihoods) == pytest.approx(1, rel=1e-5)


def test_plackett_luce_ignores_order_within_ties() -> None:
    """Each of two tied replies is compared with the third only; a single tied group gives loss 0."""
    import torch

    scores = torch.tensor([0.5, -1.0, 2.0])
    naive = sum(math.log(math.exp(score) + math.exp(2.0)) - score for score in (0.5, -1.0))
    assert losses.plackett_luce(scores, [[[0, 1], [2]]]).item() == pytest.approx(naive, rel=1e-6)
    assert losses.plackett_luce(scores, [[[0, 1, 2]]]).item() == 0


def test_plackett_luce_of_two_equals_bradley_terry() -> None:
    """With two replies the listwise and the pairwise loss are equal."""
    import torch

    scores = torch.tensor([0.5, -1.0])
    pair = losses.bradley_terry(scores, [(0, 1, math.nan)]).item()
    assert losses.plackett_luce(scores, [[[0], [1]]]).item() == pytest.approx(pair, rel=1e-6)


@pytest.mark.parametrize("loss", [lambda s: losses.bradley_terry(s, []), lambda s: losses.plackett_luce(s, [])])
def test_empty_batch_gives_zero_loss(loss: Any) -> None:
    """A batch without rankings gives a differentiable 0."""
    import torch

    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    loss(scores).backward()
    assert scores.grad is not None
    assert not scores.grad.any()
