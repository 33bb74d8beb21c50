"""Pairs that are the same to a reward model: rejected, counted and named; the stage stops if all are."""

import math
from pathlib import Path
from typing import Any

import pytest

from tasks.common import tables
from tasks.common.harness.job import StageError
from tasks.common.reward.rankings import Ranking, read_ranking, split_control_tokens, tie_alike
from tasks.reward import rejected
from tests.training_fixtures import Chain, chain, config, rankings

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

MAX_TOKENS = 16
BEGINNING = "The soup was good, the bread was good, the day was good, the song was good, the book was"
ORDER_ONLY = {"mse_weight": 0.0, "ordering": {"name": "bradley_terry", "weight": 1.0, "margin": 0.0}}


def ranked(identifier: str, *responses: str, split: str = "train") -> dict[str, Any]:
    """Return a row of the rankings table, its responses from best to worst."""
    row = next(rankings())
    ranks = list(range(1, len(responses) + 1))
    return {
        **row, "id": identifier, "responses": list(responses), "ranks": ranks, "scores": None, "scale": None,
        "prompt": [{"role": "user", "content": identifier}], "split": split,
    }  # fmt: skip


def read(row: dict[str, Any], chain: Chain, *, lexicon: bool = False) -> Ranking:
    return read_ranking(row, chain.tokenizer(), MAX_TOKENS, "response", lexicon=lexicon)


def late(identifier: str, split: str = "train") -> dict[str, Any]:
    """Return a pair that differs after the tokens that are read."""
    return ranked(identifier, f"{BEGINNING} wonderful.", f"{BEGINNING} terrible.", split=split)


def run(rows: list[dict[str, Any]], chain: Chain, folder: Path, **changes: Any) -> dict[str, Any]:
    settings = config(
        "reward", max_tokens=MAX_TOKENS, steps=1, judge_share=1e-9, lexicon=False, **ORDER_ONLY, **changes
    )
    job = chain.job("reward@train", settings, folder)
    job.inputs["rankings"] = folder / "table"
    tables.write(rows, job.inputs["rankings"], tables.schema("rankings"))
    return chain.run(job, settings)


def test_pairs_alike_after_truncation_are_rejected(chain: Chain) -> None:
    row = ranked("three", f"{BEGINNING} wonderful.", f"{BEGINNING} terrible.", "It was terrible.")
    found = read(row, chain)
    assert [pair[:2] for pair in found.pairs] == [(0, 2), (1, 2)]
    assert all(math.isnan(gap) for *_, gap in found.pairs)
    assert (found.alike, found.truncated, found.order) == (1, 2, [[0, 1], [2]])


def test_lexicon_tells_truncated_responses_apart(chain: Chain) -> None:
    found = read(late("two"), chain, lexicon=True)
    assert (len(found.pairs), found.alike) == (1, 0)


def test_alike_responses_are_tied_with_those_between_them() -> None:
    assert tie_alike([[0], [1], [2], [3]], ["a", "b", "a", "c"]) == [[0, 1, 2], [3]]
    assert tie_alike([[0], [1, 2]], ["a", "b", "c"]) == [[0], [1, 2]]


def test_alike_pairs_are_counted_named_and_not_scored(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        *(ranked(f"good {number}", "It was wonderful.", "It was terrible.") for number in range(3)),
        late("late train"),
        ranked("good heldout", "It was good.", "It was bad.", split="heldout"),
        late("late heldout", "heldout"),
    ]
    figures = run(rows, chain, tmp_path)
    assert (figures["rankings"], figures["alike_pairs"], figures["heldout_pairs"]) == (3, 2, 1)
    assert figures["alike_rankings"] == ["late train", "late heldout"]
    assert figures["ranked_only"]["pairs"] == 1
    printed = capsys.readouterr().out
    assert "2 of 6 pairs are the same tokens within the 16 tokens of reward.max_tokens" in printed
    assert "(rankings late train, late heldout)" in printed


def test_training_pairs_that_are_all_alike_are_refused(chain: Chain, tmp_path: Path) -> None:
    rows = [late("one"), late("two"), ranked("heldout", "It was good.", "It was bad.", split="heldout")]
    with pytest.raises(StageError, match=r"all 2 pairs of the training rankings .* reads 16 tokens .*raise reward"):
        run(rows, chain, tmp_path)


def test_refusal_says_how_many_tokens_would_do(chain: Chain) -> None:
    row = late("one")
    with pytest.raises(StageError) as caught:
        rejected.check_differences([read(row, chain)], [row], chain.tokenizer(), MAX_TOKENS)
    needed = int(str(caught.value).split("half of them differ within ")[1].split()[0])
    tokenizer = chain.tokenizer()
    assert not read_ranking(row, tokenizer, needed - 1, "response").pairs
    assert read_ranking(row, tokenizer, needed, "response").pairs


def test_responses_of_the_same_tokens_are_refused_without_a_number(chain: Chain) -> None:
    row = ranked("same", "It was good.", " It was good.")  # the space before a response is not read
    with pytest.raises(StageError, match="the same tokens at any length; correct the sources"):
        rejected.check_differences([read(row, chain)], [row], chain.tokenizer(), MAX_TOKENS)


def test_rankings_that_spell_special_tokens_are_rejected(chain: Chain, tmp_path: Path) -> None:
    """Those of the tokenizer in use: another template's are ordinary text."""
    rows = [
        ranked("good", "It was wonderful.", "It was <|im_start|> terrible."),
        ranked("response", "It was wonderful.", "It was <|user|> terrible."),
        {**ranked("prompt", "It was wonderful.", "It was bad."), "prompt": [{"role": "user", "content": "[MASK]?"}]},
    ]
    kept, spelled = split_control_tokens(rows, chain.tokenizer())
    assert ([row["id"] for row in kept], spelled) == (["good"], ["response", "prompt"])
    assert run(rows, chain, tmp_path)["control_token_rankings"] == ["response", "prompt"]


def test_empty_worse_response_makes_a_pair(chain: Chain, tmp_path: Path) -> None:
    figures = run([ranked("empty", "It was wonderful.", "")], chain, tmp_path)
    assert (figures["rankings"], figures["alike_pairs"]) == (1, 0)
