"""Held-out loss, calibration and overlap: against plain references, in any script, for torch and the export."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.common import tables
from tasks.common.modelling import models
from tasks.common.text import chat
from tasks.evaluate.heldout_loss import expected_calibration_error
from tasks.evaluate.models_under_test import open_decoder
from tasks.evaluate.overlap import Words, chrf, rouge_l
from tests.training_fixtures import DECODERS, HELD_OUT, NUMERICS, Chain, chain, config, evaluations

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

ONLY: dict[str, Any] = dict.fromkeys(("exact_match", "reward", "judge", "diversity", "text", "masked_names"))
FREE_FORM: dict[str, Any] = {"heldout_loss": {"kind": "heldout_loss"}, "overlap": {"kind": "overlap"}}


def evaluate(chain: Chain, key: str, folder: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return figures and rows of the evaluations of free-form replies, of conversations without short answers."""
    sections = {"evaluations": evaluations(**{**ONLY, **FREE_FORM, **changes})}
    job = chain.job(f"evaluate@{key}", config(f"evaluate@{key}"), folder, sections=sections)
    rows = [{**row, "answer": None} for row in tables.read(job.inputs["instructions"]).to_pylist()]
    job.inputs["instructions"] = folder / "instructions"
    tables.write(rows, job.inputs["instructions"], tables.schema("instructions"))
    figures = chain.run(job, config(job.name))
    return figures, tables.read(job.outputs["answers"]).to_pylist()


def test_answer_loss_matches_a_plain_softmax(chain: Chain, tmp_path: Path) -> None:
    """Of the assistant's tokens only, one conversation at a time; control tokens count in no byte."""
    import torch

    figures, rows = evaluate(chain, "tuned", tmp_path)
    path = chain.path("data/finetune/chat/model")
    model: Any = models.load_decoder(path, NUMERICS).eval()
    tokenizer = chat.load_tokenizer(path)
    nats, text_nats, tokens, size = 0.0, 0.0, 0, 0
    table = {row["id"]: row for row in tables.read(chain.path("data/validate/instructions")).to_pylist()}
    scored = [row for row in rows if row["kind"] == "reference"]
    for row in scored:
        ids, mask = chat.encode_chat(tokenizer, table[row["id"]]["messages"])
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        losses = [(ids[t], -logp[t - 1, ids[t]].item()) for t in range(1, len(ids)) if mask[t]]
        assert row["nats"] == pytest.approx(sum(loss for _, loss in losses), abs=1e-4)
        nats, tokens = nats + row["nats"], tokens + len(losses)
        text_nats += sum(loss for token, loss in losses if token not in tokenizer.all_special_ids)
        size += len(table[row["id"]]["messages"][-1]["content"].encode())
    assert {row["entity"] for row in scored} == set(HELD_OUT)
    assert figures["answer_loss"] == pytest.approx(nats / tokens, abs=1e-4)
    assert figures["answer_bits_per_byte"] == pytest.approx(text_nats / math.log(2) / size, abs=1e-4)
    assert 0 <= figures["answer_calibration_error"] <= 1
    assert 0 <= figures["answer_token_accuracy"] <= 1


def test_training_lowers_the_loss_and_raises_the_overlap(chain: Chain, tmp_path: Path) -> None:
    """Someone without short answers sees what fine-tuning and INT8 did."""
    figures = {key: evaluate(chain, key, tmp_path / key)[0] for key in ("base", "tuned", "int8")}
    assert figures["tuned"]["answer_loss"] < figures["base"]["answer_loss"]
    assert figures["tuned"]["rouge_l"] > figures["base"]["rouge_l"]
    assert figures["int8"]["answer_loss"] == pytest.approx(figures["tuned"]["answer_loss"], rel=0.5)


@pytest.mark.parametrize("key", ["pruned", "int8"])
def test_token_scores_do_not_depend_on_other_rows(key: str, chain: Chain) -> None:
    decoder = open_decoder(chain.path(DECODERS[key]), NUMERICS)
    rows, firsts = [[1, 20, 30, 40], [1, 21, 31, 41], [1, 50, 60]], [1, 2, 1]
    together = decoder.token_scores(rows, firsts)
    for row, first, scores in zip(rows, firsts, together, strict=True):
        [alone] = decoder.token_scores([row], [first])
        assert len(scores.logp) == len(row) - first
        np.testing.assert_allclose(scores.logp, alone.logp, atol=1e-5)
        assert (scores.confidence >= np.exp(scores.logp) - 1e-6).all()


def test_conversations_longer_than_the_context_are_counted(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = chain.job(
        "evaluate@tuned", config("evaluate@tuned"), tmp_path,
        sections={"evaluations": evaluations(**{**ONLY, "heldout_loss": FREE_FORM["heldout_loss"]})},
    )  # fmt: skip
    rows = [row for row in tables.read(job.inputs["instructions"]).to_pylist() if row["split"] == "heldout"]
    long = {
        **rows[0],
        "id": "long",
        "messages": [rows[0]["messages"][0], {"role": "assistant", "content": "a b " * 99}],
    }
    job.inputs["instructions"] = tmp_path / "instructions"
    tables.write([*rows, long], job.inputs["instructions"], tables.schema("instructions"))
    figures = chain.run(job, config(job.name))
    described = figures["evaluations"]["heldout_loss"]
    assert (described["conversations"], described["too_long"]) == (len(rows), 1)
    assert "1 held-out conversations do not fit the context" in capsys.readouterr().out
    tables.write([{**row, "split": "train"} for row in rows], tmp_path / "train", tables.schema("instructions"))
    job.inputs["instructions"] = tmp_path / "train"
    assert "no conversation is held out" in str(chain.run(job, config(job.name))["evaluations"]["heldout_loss"])


def test_calibration_error_of_known_cases() -> None:
    """Right as often as it says: 0; always sure and half right: 0.5; a plain loop over bins agrees."""
    half = np.array([True, False] * 50)
    assert expected_calibration_error(np.full(100, 0.5), half) == pytest.approx(0)
    assert expected_calibration_error(np.full(100, 1.0), half) == pytest.approx(0.5)
    random = np.random.default_rng(0)
    confidence, correct = random.random(500), random.random(500) < 0.4
    naive = 0.0
    for low in range(15):
        chosen = (confidence >= low / 15) & (confidence < (low + 1) / 15)
        if chosen.any():
            naive += chosen.mean() * abs(confidence[chosen].mean() - correct[chosen].mean())
    assert expected_calibration_error(confidence, correct) == pytest.approx(naive)


@pytest.mark.parametrize(
    ("reply", "reference", "words"),
    [
        ("The cat sat.", "the CAT sat!", 3),
        ("Париж — столица", "париж столица", 2),
        ("巴黎是首都", "巴黎，是首都。", 5),
        ("पेरिस राजधानी है।", "पेरिस राजधानी है", 3),
        ("باريس هي العاصمة", "باريس هي العاصمة.", 3),
    ],
)
def test_overlap_works_in_every_script(reply: str, reference: str, words: int) -> None:
    """Equal words give 1, whatever the script; a word of Devanagari keeps its vowel signs."""
    assert len(Words().tokenize(reply)) == words
    assert rouge_l(reply, [reference]) == 1.0
    assert rouge_l(reply, ["x y z", reference]) == 1.0  # the closest reference counts
    assert chrf(reference, ["x", reference]) == 1.0
    assert 0.1 < chrf(reply, [reference]) < 1
    assert rouge_l(reply, ["x y z"]) == 0.0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    """Two of three and two of four words: 2 * 2 / (3 + 4)."""
    assert rouge_l("a b c", ["a x b y"]) == pytest.approx(4 / 7, abs=1e-6)
