"""LAMB: layer-wise adaptive moments for large batches.

You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", arXiv 1904.00962,
algorithm 2, with the paper's bias correction, φ(z) = z, and a trust ratio of 1 if a norm is 0.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def lamb(groups: Iterable[dict[str, Any]], lr: float, betas: list[float], eps: float) -> "torch.optim.Optimizer":
    """Return the optimizer over parameter groups, each with its `weight_decay`."""
    import torch

    class Lamb(torch.optim.Optimizer):
        """Adam's update plus decay, scaled for each tensor to the length of its weights."""

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for x in group["params"]:
                    if x.grad is not None:
                        _update(x, x.grad, self.state[x], group)

    return Lamb(groups, {"lr": lr, "betas": betas, "eps": eps})


def _update(x: "torch.Tensor", g: "torch.Tensor", state: dict[str, "torch.Tensor"], group: dict[str, Any]) -> None:
    """Update one layer's weights x with its gradient g. Variables are named as in the paper."""
    import torch

    if not state:
        state |= {"step": torch.zeros(()), "m": torch.zeros_like(x), "v": torch.zeros_like(x)}
    state["step"] += 1
    t, (beta1, beta2), m, v = state["step"].item(), group["betas"], state["m"], state["v"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    r = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
    u = r.add(x, alpha=group["weight_decay"])
    weight, length = x.norm(), u.norm()
    trust = torch.where((weight > 0) & (length > 0), weight / length, torch.ones_like(weight))
    x.sub_(u * trust, alpha=group["lr"])
