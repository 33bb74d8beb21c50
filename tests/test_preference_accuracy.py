"""Preferences of held-out rankings: by likelihood against a plain softmax, and by the implicit reward of DPO."""

from pathlib import Path
from typing import Any

import pytest

from tasks.common import tables
from tasks.common.modelling import models
from tasks.common.text import chat
from tasks.compare import implicit_rewards
from tests.training_fixtures import DECODERS, NUMERICS, Chain, chain, config, evaluations

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

ONLY: dict[str, Any] = {
    **dict.fromkeys(("exact_match", "reward", "judge", "diversity", "text", "masked_names")),
    "preferences": {"kind": "preferences"},
}


def ranking(
    name: str, *responses: str, question: str = "What is the capital of Peru?", **fields: Any
) -> dict[str, Any]:
    return {
        "id": name, "prompt": [{"role": "user", "content": question}], "responses": list(responses),
        "ranks": list(range(1, len(responses) + 1)), "scores": None, "scale": None, "annotators": 1, "annotator": None,
        "models": [], "source": "test", "split": "heldout", **fields,
    }  # fmt: skip


RIGHT, WRONG = "The capital of Peru is Lima.", "Peru is wonderful."
RANKINGS = [
    ranking("a", RIGHT, WRONG),
    ranking("b", WRONG, RIGHT, question="Name the capital of Peru."),
    ranking("c", "Lima, obviously.", RIGHT, WRONG, ranks=[1, 1, 2]),
    ranking("d", RIGHT, ""),
    ranking("e", RIGHT, WRONG, split="train", question="What is the capital of the old Peru?"),
]


def evaluate(
    chain: Chain, key: str, folder: Path, rows: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    job = chain.job(f"evaluate@{key}", config(f"evaluate@{key}"), folder, sections={"evaluations": evaluations(**ONLY)})
    job.inputs["rankings"] = folder / "rankings"
    tables.write(rows, job.inputs["rankings"], tables.schema("rankings"))
    return chain.run(job, config(job.name)), tables.read(job.outputs["answers"]).to_pylist()


def plain_nats(chain: Chain, key: str, question: str, reply: str) -> tuple[float, int]:
    """Return the negative log-likelihood of a reply with its end token, and its tokens, one at a time."""
    import torch

    path = chain.path(DECODERS[key])
    model: Any = models.load_decoder(path, NUMERICS).eval()
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    ids, mask = chat.encode_chat(chat.load_tokenizer(path), turns)
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
    nats = [-logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]]
    return sum(nats), len(nats)


def test_preference_accuracy_matches_a_plain_softmax(chain: Chain, tmp_path: Path) -> None:
    """By the mean over a reply's tokens; ties make no pair, and an empty reply may be the rejected one."""
    figures, rows = evaluate(chain, "tuned", tmp_path, RANKINGS)
    assert [row["id"] for row in rows] == ["a:0>1", "b:0>1", "c:0>2", "c:1>2", "d:0>1"]
    for row in rows:
        chosen, tokens = plain_nats(chain, "tuned", row["question"], row["reference"])
        rejected, others = plain_nats(chain, "tuned", row["question"], row["reply"])
        assert (row["chosen_nats"], row["rejected_nats"]) == pytest.approx((chosen, rejected), abs=1e-3)
        assert row["correct"] == (chosen / tokens < rejected / others)
    assert (rows[0]["correct"], rows[1]["correct"]) == (True, False)  # it was taught the right answers
    assert figures["preference_accuracy"] == pytest.approx(sum(row["correct"] for row in rows) / 5)
    assert len({row["entity"] for row in rows}) == 2  # a cluster for each prompt
    assert {row["seen_text"] for row in rows if row["entity"] == rows[0]["entity"]} == {"nearly"}
    described = figures["evaluations"]["preferences"]
    assert (described["rankings"], described["pairs"]) == (4, 5)


def test_pairs_that_a_model_cannot_compare_are_counted(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*RANKINGS, ranking("f", RIGHT, "Lima " * 99), ranking("g", RIGHT, f"{WRONG}{chat.EOS}")]
    figures, _ = evaluate(chain, "tuned", tmp_path / "mixed", rows)
    described = figures["evaluations"]["preferences"]
    assert (described["pairs"], described["too_long"], described["control_token"]) == (5, 1, 1)
    assert "1 pairs do not fit the context" in capsys.readouterr().out
    for name, unusable, reason in (
        ("tied", [ranking("h", RIGHT, WRONG, ranks=[1, 1])], "all responses are tied"),
        ("long", [ranking("h", RIGHT, "Lima " * 99)], "1 pairs do not fit the context"),
        ("train", [ranking("h", RIGHT, WRONG, split="train")], "no ranking is held out"),
    ):
        figures, rows = evaluate(chain, "tuned", tmp_path / name, unusable)
        assert reason in figures["evaluations"]["preferences"]["absent"]
        assert (rows, figures.get("preference_accuracy")) == ([], None)


def test_export_scores_pairs_as_its_parent_does(chain: Chain, tmp_path: Path) -> None:
    nats = {
        key: [row["chosen_nats"] for row in evaluate(chain, key, tmp_path / key, RANKINGS)[1]]
        for key in ("pruned", "int8")
    }
    assert nats["int8"] == pytest.approx(nats["pruned"], rel=0.2)


def pair(
    name: str, chosen: float, rejected: float, prompt: str = "p", evaluation: str = "preferences"
) -> dict[str, Any]:
    return {
        "id": name, "entity": prompt, "kind": "preference", "evaluation": evaluation, "chosen_nats": chosen,
        "rejected_nats": rejected,
    }  # fmt: skip


def test_implicit_reward_is_the_gain_over_the_reference() -> None:
    """Rafailov et al. 2023: log ratios decide, whatever the model itself finds likelier. A tie counts half."""
    reference = [pair("a", 9.0, 5.0), pair("b", 5.0, 9.0, "q"), pair("c", 5.0, 5.0, "r"), pair("only", 1.0, 2.0)]
    model = [
        pair("a", 8.0, 5.0), pair("b", 5.0, 7.0, "q"), pair("c", 4.0, 4.0, "r"),
        pair("a", 9.0, 0.0, evaluation="other"),
    ]  # fmt: skip
    found = implicit_rewards.accuracy(reference, model, "preferences")
    assert found["implicit_reward_accuracy"] == 0.5  # right, wrong, tied
    low, high = found["implicit_reward_accuracy_interval"]
    assert 0 < low < 0.5 < high < 1
    assert implicit_rewards.accuracy(reference, [], "preferences") == {
        "implicit_reward_accuracy": None, "implicit_reward_accuracy_interval": None,
    }  # fmt: skip
