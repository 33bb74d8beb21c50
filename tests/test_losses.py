"""Losses against plain loops over their formulas."""

import math
from functools import partial
from itertools import permutations
from typing import Any

import pytest

from tasks.common.training import losses
from tasks.common.training.losses import IGNORED, Entropy


def logits(rows: int = 6, vocabulary: int = 11) -> Any:
    """Return random logits."""
    import torch

    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def surprises(row: list[float]) -> list[float]:
    """Return −log softmax of plain numbers."""
    total = math.log(sum(math.exp(value) for value in row))
    return [total - value for value in row]


def test_cross_entropy_is_the_sum_of_surprises() -> None:
    """Against a naive softmax; what is ignored counts for nothing."""
    import torch

    found, targets = logits(), [3, 0, IGNORED, 10, 5, IGNORED]
    naive = sum(surprises(row)[target] for row, target in zip(found.tolist(), targets, strict=True) if target >= 0)
    assert losses.cross_entropy(found, torch.tensor(targets)).item() == pytest.approx(naive, rel=1e-6)


@pytest.mark.parametrize("z", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_what_is_written_for_a_compiler_is_the_same_loss(kind: str, z: float) -> None:
    """Its sum, and each logit's gradient."""
    import torch

    targets, found = torch.tensor([3, 0, IGNORED, 10, 5, IGNORED]), []
    entropy = Entropy(smoothing=0.0, z=z)
    for loss in (partial(losses.for_compilers, z=z), partial(losses.cross_entropy, entropy=entropy)):
        given = logits().to(getattr(torch, kind)).requires_grad_()
        total = loss(given, targets)
        (0.7 * total).backward()
        found.append((total.detach(), given.grad))
    torch.testing.assert_close(*found)
    assert found[0][1][2].abs().sum() == 0


def test_smoothing_shares_a_part_of_the_target_among_all() -> None:
    """(1 − ε) × the target's surprise + ε × the mean surprise of the vocabulary (Szegedy et al. 2016, section 7)."""
    import torch

    found, targets = logits(), [3, 0, IGNORED, 10, 5, 1]
    naive = sum(
        0.8 * (row := surprises(values))[target] + 0.2 * sum(row) / len(row)
        for values, target in zip(found.tolist(), targets, strict=True)
        if target >= 0
    )
    smoothed = losses.cross_entropy(found, torch.tensor(targets), Entropy(smoothing=0.2, z=0.0))
    assert smoothed.item() == pytest.approx(naive, rel=1e-6)


def test_the_z_loss_is_the_square_of_the_log_partition() -> None:
    """Summed over what is asked, times its weight, on top of the rest."""
    import torch

    found, targets = logits(), [3, 0, IGNORED, 10, 5, 1]
    plain = losses.cross_entropy(found, torch.tensor(targets)).item()
    partition = [math.log(sum(map(math.exp, row))) for row in found.tolist()]
    naive = plain + 0.01 * sum(z**2 for z, target in zip(partition, targets, strict=True) if target >= 0)
    assert losses.cross_entropy(found, torch.tensor(targets), Entropy(smoothing=0.0, z=0.01)).item() == pytest.approx(
        naive, rel=1e-6
    )


def test_each_token_is_told_by_those_before_it() -> None:
    """The same sum as of logits cut by their last place, and no gradient there."""
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
    """The sum of squares of the differences."""
    import torch

    assert losses.squared_error(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])).item() == pytest.approx(9.25)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_bradley_terry(margin: float) -> None:
    """−log σ(better − worse − margin × gap), summed; an unmeasured gap asks for no distance."""
    import torch

    scores, pairs = [1.0, 3.0, -0.5], [(1, 0, 2.0), (0, 2, 0.5), (2, 1, math.nan)]
    distances = [scores[b] - scores[w] - margin * (0 if math.isnan(gap) else gap) for b, w, gap in pairs]
    naive = sum(math.log1p(math.exp(-distance)) for distance in distances)
    assert losses.bradley_terry(torch.tensor(scores), pairs, margin).item() == pytest.approx(naive, rel=1e-6)


def test_plackett_luce_is_a_choice_after_the_other() -> None:
    """The best of all, then the best of the rest, by softmax; over all orders the likelihoods sum to 1."""
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


def test_ties_say_nothing_of_their_own_order() -> None:
    """Of two tied replies above a third, each is chosen from itself and the third; one tied group says nothing."""
    import torch

    scores = torch.tensor([0.5, -1.0, 2.0])
    naive = sum(math.log(math.exp(score) + math.exp(2.0)) - score for score in (0.5, -1.0))
    assert losses.plackett_luce(scores, [[[0, 1], [2]]]).item() == pytest.approx(naive, rel=1e-6)
    assert losses.plackett_luce(scores, [[[0, 1, 2]]]).item() == 0


def test_a_pair_is_a_list_of_two() -> None:
    """With two replies listwise and pairwise are the same."""
    import torch

    scores = torch.tensor([0.5, -1.0])
    pair = losses.bradley_terry(scores, [(0, 1, math.nan)]).item()
    assert losses.plackett_luce(scores, [[[0], [1]]]).item() == pytest.approx(pair, rel=1e-6)


@pytest.mark.parametrize("nothing", [lambda s: losses.bradley_terry(s, []), lambda s: losses.plackett_luce(s, [])])
def test_nothing_to_learn_from_is_no_loss(nothing: Any) -> None:
    """A batch without orders gives 0 that can be differentiated."""
    import torch

    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    nothing(scores).backward()
    assert scores.grad is not None
    assert not scores.grad.any()
