"""The arithmetic of PPO against plain references: advantages, KL estimators, masked means and whitening."""

import math
from typing import TYPE_CHECKING, Any

import pytest

from tasks.align import estimates

if TYPE_CHECKING:
    import torch


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_discounted_sum_of_td_errors(gamma: float, gae_lambda: float) -> None:
    """Compared with the double sum of the paper (equation 16), for replies of different lengths with padding."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths, width = [7, 1, 4, 6], 7
    rewards, values = (torch.randn(4, width, generator=generator, dtype=torch.float64) for _ in range(2))
    reply_mask = torch.tensor([[t < length for t in range(width)] for length in lengths])
    rewards, values = rewards * reply_mask, values * reply_mask
    advantages, returns = estimates.gae(rewards, values, reply_mask, gamma, gae_lambda)
    for row, length in enumerate(lengths):
        after = [*values[row, 1:length].tolist(), 0.0]
        td_errors = [float(rewards[row, t]) + gamma * after[t] - float(values[row, t]) for t in range(length)]
        for t in range(width):
            naive = sum((gamma * gae_lambda) ** (k - t) * td_errors[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(naive, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(naive + float(values[row, t]), abs=1e-12)


def test_with_gae_lambda_one_returns_are_sums_of_rewards() -> None:
    """With lambda = gamma = 1 and any values, a token's return is the sum of the rewards from it on."""
    import torch

    rewards, values = torch.tensor([[1.0, -2.0, 4.0]]), torch.tensor([[0.3, 0.7, -0.2]])
    _, returns = estimates.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    assert returns[0].tolist() == pytest.approx([3.0, 2.0, 4.0])


def test_means_and_whitening_ignore_padding() -> None:
    """Mean, and mean 0 and variance 1, over the mask; the rest becomes 0."""
    import torch

    values = torch.tensor([[1.0, 5.0, 900.0], [3.0, -900.0, 900.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert estimates.masked_mean(values, mask).item() == pytest.approx(3.0)
    white = estimates.whiten(values, mask)
    scale = math.sqrt(8 / 3)
    expected = torch.tensor([[-2 / scale, 2 / scale, 0], [0, 0, 0]])
    torch.testing.assert_close(white, expected, atol=1e-6, rtol=0)


def test_kl_estimators_are_right_on_average_and_k3_is_never_negative() -> None:
    """The expectation of both over a distribution is its exact KL divergence."""
    import torch

    generator = torch.Generator().manual_seed(0)
    logp, reference = (
        torch.log_softmax(torch.randn(50, generator=generator, dtype=torch.float64), 0) for _ in range(2)
    )
    exact = (logp.exp() * (logp - reference)).sum().item()
    for name in ("k1", "k3"):
        estimate = estimates.kl(logp, reference, name)
        assert (logp.exp() * estimate).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (estimates.kl(logp, reference, "k3") >= 0).all()
    assert (estimates.kl(logp, reference, "k1") < 0).any()


def test_whitening_may_leave_the_mean() -> None:
    """Without the shift, values that all have one sign keep it."""
    import torch

    values, mask = torch.tensor([[2.0, 4.0, 6.0, 99.0]]), torch.tensor([[True, True, True, False]])
    white = estimates.whiten(values, mask, shift=False)
    assert white[0].tolist() == pytest.approx([4 - math.sqrt(1.5), 4, 4 + math.sqrt(1.5), 0], abs=1e-5)


def test_explained_variance_is_one_for_the_returns_and_none_for_their_mean() -> None:
    """It is negative for values worse than the mean; padding is ignored."""
    import torch

    returns = torch.tensor([[1.0, 2.0, 3.0, 50.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert estimates.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert estimates.explained_variance(torch.full_like(returns, 7.0), returns, mask) == pytest.approx(0.0)
    assert estimates.explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert estimates.explained_variance(returns, torch.ones(1, 4), mask) == 0.0


# The numbers, in both precisions

PRECISIONS = [("float64", 1e-10), ("float32", 1e-5)]


def assert_near(actual: "torch.Tensor", expected: list[Any], tolerance: float) -> None:
    """Assert that a tensor equals plain numbers up to a tolerance relative to the largest of them."""
    import torch

    plain = torch.tensor(expected, dtype=torch.float64)
    assert (actual.double() - plain).abs().max().item() <= tolerance * max(1.0, plain.abs().max().item())


def sample(dtype: str, *shape: int, scale: float = 1.0) -> "torch.Tensor":
    """Return normal random numbers of a dtype; the float64 ones are the float32 ones."""
    import torch

    values = scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)
    return values.to(getattr(torch, dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_log_probabilities_and_entropies_are_plain_softmaxes(dtype: str, tolerance: float) -> None:
    """Against exponentials and their sum in plain Python."""
    import torch

    logits = sample(dtype, 3, 5, 40, scale=4.0)
    chosen = torch.randint(40, (3, 5), generator=torch.Generator().manual_seed(1))
    logp, entropy = estimates.log_probabilities(logits, chosen, entropy=True)
    assert entropy is not None
    assert torch.equal(estimates.log_probabilities(logits, chosen)[0], logp)
    norms = [[math.log(math.fsum(map(math.exp, row))) for row in rows] for rows in logits.tolist()]
    every = [
        [[value - norm for value in row] for row, norm in zip(rows, row_norms, strict=True)]
        for rows, row_norms in zip(logits.tolist(), norms, strict=True)
    ]
    assert_near(logp, [[every[n][t][int(chosen[n, t])] for t in range(5)] for n in range(3)], tolerance)
    assert_near(entropy, [[-math.fsum(math.exp(x) * x for x in row) for row in rows] for rows in every], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_kl_and_advantages_are_plain_sums(dtype: str, tolerance: float) -> None:
    """k1 and k3 token by token, and the double sum of equation 16 of Schulman et al. 2016."""
    import torch

    logp, reference = sample(dtype, 4, 30), sample(dtype, 4, 31)[:, :30]
    gaps = [[p - q for p, q in zip(*rows, strict=True)] for rows in zip(logp.tolist(), reference.tolist(), strict=True)]
    assert_near(estimates.kl(logp, reference, "k1"), gaps, tolerance)
    assert_near(estimates.kl(logp, reference, "k3"), [[math.exp(-g) - 1 + g for g in row] for row in gaps], tolerance)
    reply_mask = torch.ones(4, 30, dtype=torch.bool)
    advantages, returns = estimates.gae(logp, reference, reply_mask, 0.99, 0.95)
    plain = []
    for rewards, values in zip(logp.tolist(), reference.tolist(), strict=True):
        after = [*values[1:], 0.0]
        td_errors = [r + 0.99 * v - now for r, v, now in zip(rewards, after, values, strict=True)]
        plain.append([math.fsum((0.99 * 0.95) ** (k - t) * td_errors[k] for k in range(t, 30)) for t in range(30)])
    assert_near(advantages, plain, tolerance)
    pairs = zip(plain, reference.tolist(), strict=True)
    assert_near(returns, [[a + v for a, v in zip(*rows, strict=True)] for rows in pairs], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_losses_and_whitening_are_plain_arithmetic(dtype: str, tolerance: float) -> None:
    """Token by token, clipped and not."""
    import torch

    new, old, gain = (sample(dtype, 6, 20 + more)[:, :20] for more in range(3))
    new = old + 0.3 * new
    losses, ratio = estimates.policy_losses(new, old, gain, 0.2)
    rows = [list(zip(*row, strict=True)) for row in zip(new.tolist(), old.tolist(), gain.tolist(), strict=True)]
    assert ((ratio - 1).abs() > 0.2).any()
    assert_near(ratio, [[math.exp(n - o) for n, o, _ in row] for row in rows], tolerance)
    clipped = [[max(-g * (r := math.exp(n - o)), -g * min(max(r, 0.8), 1.2)) for n, o, g in row] for row in rows]
    assert_near(losses, clipped, tolerance)
    assert_near(estimates.value_losses(new, old, gain, 0.1),
         [[max((n - g) ** 2, (o + min(max(n - o, -0.1), 0.1) - g) ** 2) / 2 for n, o, g in row] for row in rows],
         tolerance)  # fmt: skip
    flat = [value for row in gain.tolist() for value in row]
    mean = math.fsum(flat) / len(flat)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in flat) / len(flat) + 1e-8)
    white = [[(value - mean) / spread for value in row] for row in gain.tolist()]
    assert_near(estimates.whiten(gain, torch.ones(6, 20, dtype=torch.bool)), white, tolerance)
