"""Settings of what can stand in PPO's place: DPO, RLOO and GRPO, which TRL's trainers run (`by_trl.py`).

Rafailov et al. 2023 (DPO, arXiv 2305.18290), Ahmadian et al. 2024 (RLOO, arXiv 2402.14740), Shao et al. 2024 (GRPO,
arXiv 2402.03300). None of them has a value function; RLOO and GRPO take the other replies to a question in its place.
"""

from typing import Annotated, Literal

from pydantic import Field

from tasks.common.alignment.ptx import Ptx
from tasks.common.evaluation.scoring import Reads
from tasks.common.settings import Settings


class _Alternative(Settings):
    """What the alternatives share."""

    epochs: int = Field(description="Times that an iteration's replies or pairs are gone through", ge=1)
    ptx: Ptx


class Sampled(Settings):
    """Of a question's replies that the policy gives in an iteration, the most and the least rewarded make a pair."""

    name: Literal["sampled"] = Field(description="Where pairs come from")
    generations: int = Field(description="Replies to a question; `episodes` are a multiple", ge=2)


class Ranked(Settings):
    """Responses that people ranked: each pair of which one beats the other; `episodes` / 2 of them an iteration."""

    name: Literal["rankings"] = Field(description="Where pairs come from")
    judge_share: float = Field(description="Share left to the judge, as `reward.judge_share` has it", ge=0, lt=1)
    reads: Reads = Field(description="As `reward.reads` has it: what tells the judge's rankings from the policy's")


class Sigmoid(Settings):
    """-log sigmoid(beta × margin) (Rafailov et al. 2023, equation 7)."""

    name: Literal["sigmoid"] = Field(description="Loss of a pair")


class Robust(Settings):
    """The same where some pairs stand the wrong way round (Chowdhury et al. 2024, arXiv 2403.00409)."""

    name: Literal["robust"] = Field(description="Loss of a pair")
    flipped: float = Field(description="Share of pairs that are taken to be the wrong way round", ge=0, lt=0.5)


class Hinge(Settings):
    """max(0, 1 - beta × margin) (Zhao et al. 2023, arXiv 2305.10425)."""

    name: Literal["hinge"] = Field(description="Loss of a pair")


class Ipo(Settings):
    """(margin a token - 1 / (2 beta))² (Azar et al. 2024, arXiv 2310.12036, equation 17)."""

    name: Literal["ipo"] = Field(description="Loss of a pair")


class Dpo(_Alternative):
    """Settings of direct preference optimization."""

    name: Literal["dpo"] = Field(description="Algorithm")
    pairs: Annotated[Sampled | Ranked, Field(discriminator="name", description="Where the pairs come from")]
    loss: Annotated[Sigmoid | Robust | Hinge | Ipo, Field(discriminator="name", description="Loss of a pair")]
    beta: float = Field(description="How strongly the policy is held to the tuned model", gt=0)


class _Grouped(_Alternative):
    """What the two share that compare the replies to one question."""

    generations: int = Field(description="Replies to a question; `episodes` are a multiple", ge=2)
    beta: float = Field(description="Price of a nat of KL to the tuned model, in reward; 0 leaves it out", ge=0)
    clip: float = Field(description="epsilon: how far a probability ratio may move", gt=0, lt=1)


class Rloo(_Grouped):
    """Settings of REINFORCE with the mean reward of a question's other replies as its baseline."""

    name: Literal["rloo"] = Field(description="Algorithm")
    normalise: bool = Field(description="Bring an iteration's advantages to mean 0 and variance 1")


class Grpo(_Grouped):
    """Settings of group relative policy optimization."""

    name: Literal["grpo"] = Field(description="Algorithm")
    scale: Literal["group", "batch", "none"] = Field(
        description="Rewards are divided by their standard deviation: a question's, all questions', or not at all"
    )
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = Field(
        description="What a token's loss is divided by: its reply's tokens, those worked out together, the longest "
        "reply's, or those of the update"
    )
    ratio: Literal["token", "sequence"] = Field(
        description="token: each has its probability ratio, by which its price is weighed too, so that the price's "
        "gradient is right on average; sequence: a reply has one (Zheng et al. 2025, GSPO)"
    )


Alternative = Dpo | Rloo | Grpo


def replies_to_a_question(algorithm: Alternative) -> int:
    """Return how many replies to one question are sampled in an iteration."""
    if isinstance(algorithm, Dpo):
        return algorithm.pairs.generations if isinstance(algorithm.pairs, Sampled) else 1
    return algorithm.generations
