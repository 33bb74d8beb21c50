"""What a reward model cannot learn from: pairs of responses that are the same to it, and special tokens in texts.

Responses that differ only after `max_tokens` are the same to the model. Such pairs, and rankings that spell a special
token, are rejected: they are in neither training nor accuracy, and are counted and named. If no training pair is left,
the stage stops.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.common.harness.job import StageError
from tasks.common.modelling import models
from tasks.common.reward.rankings import UNLIMITED_TOKENS, Ranking, Row, first_difference, read_ranking
from tasks.common.training.loop import MAX_LISTED_ITEMS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def alike_ids(rankings: Sequence[Ranking]) -> list[str]:
    """Return the ids of the rankings with a rejected pair."""
    return [ranking.id for ranking in rankings if ranking.alike]


def has_something_to_learn(ranking: Ranking) -> bool:
    """Return whether a ranking has ratings, a pair, or ties that people made, and not only rejected pairs."""
    return bool(ranking.pairs or ranking.ratings or not ranking.alike)


def report_alike(rankings: Sequence[Ranking], max_tokens: int) -> None:
    """Print how many pairs are rejected, and of which rankings."""
    alike, named = sum(ranking.alike for ranking in rankings), alike_ids(rankings)
    if alike:
        pairs = alike + sum(len(ranking.pairs) for ranking in rankings)
        more = ", …" if len(named) > MAX_LISTED_ITEMS else ""
        print(
            f"{alike} of {pairs} pairs are the same tokens within the {max_tokens} tokens of reward.max_tokens and are "
            f"rejected from training and accuracy (rankings {', '.join(named[:MAX_LISTED_ITEMS])}{more})"
        )


def check_differences(
    rankings: Sequence[Ranking], rows: Sequence[Row], tokenizer: "PreTrainedTokenizerFast", max_tokens: int
) -> None:
    """Raise StageError if every training pair is the same to the model, with the number of tokens that would do."""
    alike = sum(ranking.alike for ranking in rankings)
    if not alike or any(ranking.pairs for ranking in rankings):
        return
    needed = sorted(_tokens_needed(rows, tokenizer))
    remedy = "the responses of each are the same tokens at any length; correct the sources"
    if needed:
        remedy = (
            f"half of them differ within {needed[len(needed) // 2]} tokens of the response, all within {needed[-1]}: "
            "raise reward.max_tokens, or use shorter responses"
        )
    raise StageError(
        f"all {alike} pairs of the training rankings are the same to the model, which reads {max_tokens} tokens "
        f"(reward.max_tokens); expected are responses that differ within them. There is no order to learn: {remedy}."
    )


def _tokens_needed(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Return the number of tokens from which each pair differs; pairs that never differ have none."""
    with models.suppress_warnings("transformers"):  # of texts longer than the model's context
        found = [
            first_difference(row, tokenizer, i, j)
            for row in rows
            for i, j, _ in read_ranking(row, tokenizer, UNLIMITED_TOKENS, "response").pairs
        ]
    return [tokens for tokens in found if tokens is not None]


def report_control_tokens(ids: Sequence[str]) -> None:
    """Print which rankings are rejected because a text of theirs would be encoded as a special token."""
    if ids:
        more = ", …" if len(ids) > MAX_LISTED_ITEMS else ""
        print(
            f"{len(ids)} rankings spell a special token of the model's tokenizer and are rejected "
            f"({', '.join(ids[:MAX_LISTED_ITEMS])}{more})"
        )
