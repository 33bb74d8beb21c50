"""Settings of the alternatives to PPO: DPO, RLOO and GRPO, run by TRL's trainers (`by_trl.py`).

Rafailov et al. 2023 (DPO, arXiv 2305.18290), Ahmadian et al. 2024 (RLOO, arXiv 2402.14740), Shao et al. 2024 (GRPO,
arXiv 2402.03300). None of them has a value function; RLOO and GRPO use the other replies to a prompt as the baseline.
"""

from typing import Annotated, Literal

from pydantic import Field

from tasks.align.ptx import Ptx
from tasks.common.settings import Settings


class _Alternative(Settings):
    """Settings of all alternatives."""

    epochs: int = Field(default=1, description="Passes over an iteration's replies or pairs", ge=1)
    ptx: Ptx = Ptx()


class Sigmoid(Settings):
    """-log sigmoid(beta × margin) (Rafailov et al. 2023, equation 7)."""

    name: Literal["sigmoid"] = Field(description="Loss of a pair")


class Robust(Settings):
    """The sigmoid loss corrected for flipped preference labels (Chowdhury et al. 2024, arXiv 2403.00409)."""

    name: Literal["robust"] = Field(description="Loss of a pair")
    flipped: float = Field(default=0.1, description="Assumed share of pairs with a flipped preference", ge=0, lt=0.5)


class Hinge(Settings):
    """max(0, 1 - beta × margin) (Zhao et al. 2023, arXiv 2305.10425)."""

    name: Literal["hinge"] = Field(description="Loss of a pair")


class Ipo(Settings):
    """(margin per token - 1 / (2 beta))² (Azar et al. 2024, arXiv 2310.12036, equation 17)."""

    name: Literal["ipo"] = Field(description="Loss of a pair")


class Dpo(_Alternative):
    """Settings of direct preference optimization."""

    name: Literal["dpo"] = Field(description="Algorithm")
    generations: int = Field(
        default=4,
        description="Replies per prompt; the highest and the lowest rewarded make a pair. `episodes` must be a "
        "multiple. With people's rankings as the reward, no replies are sampled for pairs",
        ge=2,
    )
    loss: Annotated[Sigmoid | Robust | Hinge | Ipo, Field(discriminator="name", description="Loss of a pair")] = (
        Sigmoid(name="sigmoid")
    )
    beta: float = Field(default=0.1, description="Strength of the KL regularization towards the tuned model", gt=0)


class _Grouped(_Alternative):
    """Settings of RLOO and GRPO, which compare the replies to one prompt."""

    generations: int = Field(default=4, description="Replies per prompt; `episodes` must be a multiple", ge=2)
    beta: float = Field(
        default=0.05, description="KL penalty towards the tuned model, in reward per nat; 0 disables it", ge=0
    )
    clip_range: float = Field(default=0.2, description="epsilon of the clipped probability ratio", gt=0, lt=1)


class Rloo(_Grouped):
    """Settings of REINFORCE with the mean reward of the prompt's other replies as the baseline."""

    name: Literal["rloo"] = Field(description="Algorithm")
    normalize_advantages: bool = Field(
        default=False, description="Normalize an iteration's advantages to mean 0 and variance 1"
    )


class Grpo(_Grouped):
    """Settings of group relative policy optimization."""

    name: Literal["grpo"] = Field(description="Algorithm")
    scale: Literal["group", "batch", "none"] = Field(
        default="group",
        description="Divide rewards by their standard deviation over a prompt's replies, over the batch, or not at all",
    )
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = Field(
        default="dapo",
        description="Denominator of a token's loss: the tokens of its reply (grpo), of the micro-batch (bnpo), the "
        "maximum reply length (dr_grpo), or the tokens of the update (dapo)",
    )
    ratio: Literal["token", "sequence"] = Field(
        default="token",
        description="token: one probability ratio per token, which also weights the KL penalty so that its gradient is "
        "unbiased; sequence: one ratio per reply (Zheng et al. 2025, GSPO)",
    )


Alternative = Dpo | Rloo | Grpo
