"""The arithmetic of PPO against plain references: advantages, KL estimators, means and whitening over a mask."""

import math

import pytest

from tasks.common.alignment import estimates


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_discounted_sum_of_surprises(discount: float, trace: float) -> None:
    """Against the double sum of the paper (equation 16), over replies of different lengths, padding ignored."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths, width = [7, 1, 4, 6], 7
    rewards, values = (torch.randn(4, width, generator=generator, dtype=torch.float64) for _ in range(2))
    replied = torch.tensor([[t < length for t in range(width)] for length in lengths])
    rewards, values = rewards * replied, values * replied
    advantages, returns = estimates.gae(rewards, values, replied, discount, trace)
    for row, length in enumerate(lengths):
        after = [*values[row, 1:length].tolist(), 0.0]
        surprise = [float(rewards[row, t]) + discount * after[t] - float(values[row, t]) for t in range(length)]
        for t in range(width):
            naive = sum((discount * trace) ** (k - t) * surprise[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(naive, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(naive + float(values[row, t]), abs=1e-12)


def test_with_a_whole_trace_returns_are_what_was_earned() -> None:
    """lambda = gamma = 1 and any values: the return of a token is the sum of the rewards from it on."""
    import torch

    rewards, values = torch.tensor([[1.0, -2.0, 4.0]]), torch.tensor([[0.3, 0.7, -0.2]])
    _, returns = estimates.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    assert returns[0].tolist() == pytest.approx([3.0, 2.0, 4.0])


def test_means_and_whitening_leave_padding_out() -> None:
    """Mean, and mean 0 and variance 1, over what the mask holds; the rest becomes 0."""
    import torch

    values = torch.tensor([[1.0, 5.0, 900.0], [3.0, -900.0, 900.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert estimates.masked_mean(values, mask).item() == pytest.approx(3.0)
    white = estimates.whiten(values, mask)
    scale = math.sqrt(8 / 3)
    expected = torch.tensor([[-2 / scale, 2 / scale, 0], [0, 0, 0]])
    torch.testing.assert_close(white, expected, atol=1e-6, rtol=0)


def test_kl_estimators_are_right_on_average_and_k3_is_never_negative() -> None:
    """Over all tokens of a distribution, weighted by their probability, both give the KL divergence."""
    import torch

    generator = torch.Generator().manual_seed(0)
    logp, reference = (
        torch.log_softmax(torch.randn(50, generator=generator, dtype=torch.float64), 0) for _ in range(2)
    )
    exact = (logp.exp() * (logp - reference)).sum().item()
    for name in ("k1", "k3"):
        found = estimates.kl(logp, reference, name)
        assert (logp.exp() * found).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (estimates.kl(logp, reference, "k3") >= 0).all()
    assert (estimates.kl(logp, reference, "k1") < 0).any()


def test_whitening_may_leave_the_mean() -> None:
    """What is scaled and not shifted keeps its sign where all are alike in it."""
    import torch

    values, mask = torch.tensor([[2.0, 4.0, 6.0, 99.0]]), torch.tensor([[True, True, True, False]])
    white = estimates.whiten(values, mask, shift=False)
    assert white[0].tolist() == pytest.approx([4 - math.sqrt(1.5), 4, 4 + math.sqrt(1.5), 0], abs=1e-5)


def test_explained_variance_is_one_for_the_returns_and_none_for_their_mean() -> None:
    """And beneath 0 for what is worse than the mean; padding is left out."""
    import torch

    returns = torch.tensor([[1.0, 2.0, 3.0, 50.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert estimates.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert estimates.explained_variance(torch.full_like(returns, 7.0), returns, mask) == pytest.approx(0.0)
    assert estimates.explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert estimates.explained_variance(returns, torch.ones(1, 4), mask) == 0.0
