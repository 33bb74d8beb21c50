"""The sheet: its figures follow from its rows, its questions are distinct, and learning shows in it."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from flows.runner import BAR
from tasks import evaluate
from tasks.common import tables
from tasks.common.evaluation import sheet
from tasks.common.evaluation.candidates import OnnxDecoder, TorchDecoder, open_decoder
from tasks.common.evaluation.scoring import Scorer
from tasks.common.modelling import models
from tasks.common.stage import StageError
from tasks.common.text.shards import Document, Split, write_split
from tests.training_fixtures import CAPITALS, HELD_OUT, NUMERICS, TONES, Chain, chain, config, instructions

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

KEYS = [*evaluate.DECODERS, *evaluate.ENCODERS]


@pytest.fixture(scope="module")
def sheets(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], list[Any]]]:
    """The whole chain before the sheet: figures and rows of every model."""
    result = {}
    for key in KEYS:
        job = chain.job(f"evaluate@{key}", config("evaluate"), tmp_path_factory.mktemp(key))
        figures = chain.run(job, config("evaluate"))
        result[key] = figures, tables.read(job.outputs["answers"]).to_pylist()
    return result


def rows_of(kind: str, split: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of one kind and side."""
    return [row for row in rows if row["kind"] == kind and row["split"] == split]


# Whole sheets


@pytest.mark.parametrize("key", evaluate.DECODERS)
def test_a_decoders_figures_follow_from_its_answers(key: str, sheets: Any, chain: Chain) -> None:
    """Rates, mean reward, its spread and diversity, computed again from the rows that the sheet keeps."""
    figures, rows = sheets[key]
    for rate, split in (("exact_match_tuned", "train"), ("exact_match_heldout", "heldout")):
        greedy = rows_of("greedy", split, rows)
        assert figures[rate] == round(sum(row["correct"] for row in greedy) / len(greedy), 4)
        assert all(row["correct"] == (row["given"] == row["wanted"]) for row in greedy)
        assert {row["entity"] in HELD_OUT for row in greedy} == {split == "heldout"}
    sampled = [row for row in rows if row["kind"] == "sampled"]
    rewards = [row["reward"] for row in sampled]
    assert len(rewards) == config("evaluate").samples
    assert figures["reward_mean"] == pytest.approx(np.mean(rewards), abs=1e-4)
    assert figures["reward_std"] == pytest.approx(np.std(rewards, ddof=1), abs=1e-4)
    assert figures["distinct_2"] == round(sheet.distinct([row["reply"] for row in sampled], 2), 4)
    exchanges = [([{"role": "user", "content": row["question"]}], row["reply"]) for row in sampled]
    for column, model in (("reward", "policy"), ("judged", "judge")):
        scorer = Scorer.load(chain.path(f"data/reward/{model}/model"), NUMERICS)
        assert [row[column] for row in sampled] == pytest.approx(scorer.score(exchanges), abs=2e-5)


def test_tuning_teaches_to_answer(sheets: Any) -> None:
    """The base model answers no question, the tuned one nearly all of those that it was tuned on."""
    assert sheets["base"][0]["exact_match_tuned"] == 0
    assert sheets["tuned"][0]["exact_match_tuned"] >= 0.9
    assert sheets["tuned"][0]["model"] == "tuned"


def test_sizes_are_those_of_the_files(sheets: Any, chain: Chain) -> None:
    """Parameters and bytes; pruning and quantization are seen in them."""
    for key, path in (evaluate.DECODERS | evaluate.ENCODERS).items():
        name = "model.onnx" if "int8" in key else "model.safetensors"
        assert sheets[key][0]["bytes"] == (chain.path(path) / name).stat().st_size
    sizes = {key: figures["parameters"] for key, (figures, _) in sheets.items()}
    assert sizes["base"] == sizes["tuned"] == sizes["policy"] > sizes["pruned"] == sizes["int8"]
    assert sizes["encoder"] == sizes["encoder-int8"]


@pytest.mark.parametrize("key", evaluate.ENCODERS)
def test_an_encoder_names_what_it_read(key: str, sheets: Any) -> None:
    """The first name of each statement among all names of the corpus: nearly all of the toy's are right."""
    figures, rows = sheets[key]
    assert figures["candidates"] == len({name for pair in CAPITALS.items() for name in pair})
    # "The capital of Mexico is Mexico City." is left out: its first name stands twice in it.
    assert figures["masked_statements"] == len(rows) == len(CAPITALS) - 1
    assert figures["masked_names"] == round(sum(row["correct"] for row in rows) / len(rows), 4) >= 0.8
    assert all(row["correct"] == (row["given"] == row["wanted"]) for row in rows)
    assert {row["question"].count("[MASK]") for row in rows} == {1}
    assert not any(row["wanted"] in row["question"] for row in rows)


def test_a_sheet_is_the_same_twice(sheets: Any, chain: Chain, tmp_path: Path) -> None:
    """Sampled replies included."""
    job = chain.job("evaluate@tuned", config("evaluate"), tmp_path)
    figures = chain.run(job, config("evaluate"))
    assert (figures, tables.read(job.outputs["answers"]).to_pylist()) == sheets["tuned"]


def test_a_corpus_without_names_gives_no_figure(chain: Chain, tmp_path: Path) -> None:
    """Nothing to mask is `None`, neither 0 nor an error."""
    job = chain.job("evaluate@encoder", config("evaluate"), tmp_path)
    job.inputs["corpus"] = tmp_path / "corpus"
    prose = [row for row in tables.read(chain.path("data/validate/corpus")).to_pylist() if not row["names"]]
    tables.write(prose, job.inputs["corpus"], tables.schema("corpus"))
    assert chain.run(job, config("evaluate"))["masked_names"] is None


def test_questions_that_leave_no_room_for_a_reply_are_not_asked(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of any model, so that the sheet is one for all; where none is left, a sentence tells so."""
    job = chain.job("evaluate@tuned", config("evaluate"), tmp_path)
    table = tables.read(chain.path("data/validate/instructions")).to_pylist()
    long = [{**row, "messages": [{"role": "user", "content": "Rome " * 60}, row["messages"][1]]} for row in table]
    job.inputs["instructions"] = tmp_path / "instructions"
    tables.write([table[0], *long[1:]], job.inputs["instructions"], tables.schema("instructions"))
    chain.run(job, config("evaluate"))
    asked = {row["question"] for row in tables.read(job.outputs["answers"]).to_pylist()}
    assert asked == {table[0]["messages"][0]["content"]}
    assert f"{len({row['entity'] for row in table})} questions are not asked" in capsys.readouterr().out
    job = chain.job("evaluate@tuned", config("evaluate"), tmp_path / "again")
    job.inputs["instructions"] = tmp_path / "long"
    tables.write(long, job.inputs["instructions"], tables.schema("instructions"))
    with pytest.raises(StageError, match=rf"none of the {len(long)} conversations has a short answer and leaves"):
        chain.run(job, config("evaluate"))


@pytest.mark.parametrize("refused", ["Is <|end|> the end?", "Rome " * 200])
def test_a_question_that_the_engine_refuses_is_told_as_such(refused: str, chain: Chain) -> None:
    """In a sentence that names the question and says what to do, not in a traceback."""
    decoder = OnnxDecoder.load(chain.path("data/quantize/policy/model"), NUMERICS)
    with pytest.raises(StageError, match=rf"refuses the question '{re.escape(refused[:70])}.*params\.yaml"):
        decoder.reply([[{"role": "user", "content": refused}]], 8, 0.0, 1)


def test_a_decoder_goes_on_with_text_and_replies_to_conversations(chain: Chain) -> None:
    """What it read in pretraining it can end; the same words as a question are another prompt."""
    text, asked = "The capital of France is", [{"role": "user", "content": "The capital of France is"}]
    base = TorchDecoder.load(chain.path("data/pretrain/clm/model"), NUMERICS)
    assert base.reply([text, asked], 6, 0.0, 1)[0].startswith("Paris.")
    for path in ("data/prune/model", "data/quantize/policy/model"):
        decoder = open_decoder(chain.path(path), NUMERICS)
        assert decoder.reply([text, asked], 6, 0.0, 1) == [
            decoder.reply([prompt], 6, 0.0, 1)[0] for prompt in (text, asked)
        ]  # fmt: skip


def test_an_expression_that_cannot_be_one_is_told_before_anything_runs() -> None:
    with pytest.raises(ValidationError, match="should be a regular expression of Python's"):
        config("evaluate", masked="The capital of (.*")


@pytest.mark.parametrize("key", ["tuned", "int8"])
def test_a_sheet_shows_its_progress(key: str, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Questions, samples and perplexity, in bars that the runner reads."""
    chain.run(chain.job(f"evaluate@{key}", config("evaluate"), tmp_path), config("evaluate"))
    bars = [bar["what"] for text in re.split(r"[\r\n]+", capsys.readouterr().err) if (bar := BAR.match(text))]
    assert list(dict.fromkeys(bars)) == [f"evaluate@{key} {part}" for part in ("questions", "samples", "perplexity")]


# Questions


def all_fit(row: dict[str, Any]) -> bool:
    """No question is too long."""
    return True


def test_questions_are_distinct_and_do_not_hang_on_the_order() -> None:
    """A question in three tones is one question; which rows are chosen follows from their ids alone."""
    table = list(instructions())
    for split, entities in (("train", 8), ("heldout", 2)):
        chosen = sheet.choose(table, split, 100, all_fit)
        asked = {(row["entity"], row["messages"][0]["content"]) for row in chosen}
        assert len(chosen) == len(asked) == 2 * entities
        assert sheet.choose(table[::-1], split, 100, all_fit) == chosen
        assert sheet.choose(table, split, 3, all_fit) == chosen[:3]
    assert len(TONES) == 3


def test_questions_without_a_short_answer_are_not_asked() -> None:
    """Small talk has no right answer."""
    table = [{**row, "answer": None} for row in instructions()]
    assert sheet.choose(table, "train", 100, all_fit) == []


@pytest.mark.parametrize(
    ("rows", "count", "expected"),
    [(10, 5, [0, 2, 4, 6, 8]), (10, 10, list(range(10))), (3, 7, [0, 1, 2, 0, 1, 2, 0]), (10, 3, [0, 3, 6])],
)
def test_samples_are_spread_evenly(rows: int, count: int, expected: list[int]) -> None:
    """At even distances, and round again where there are fewer questions than samples."""
    assert [row["n"] for row in sheet.spread([{"n": n} for n in range(rows)], count)] == expected


@pytest.mark.parametrize(
    ("text", "names", "masked"),
    [
        ("The capital of France is Paris.", ["Paris", "France"], "The capital of [MASK] is Paris."),
        ("Paris is the capital of France.", ["France", "Paris"], "[MASK] is the capital of France."),
        ("Guinea-Bissau has Bissau.", ["Bissau", "Guinea-Bissau"], "[MASK] has Bissau."),
        ("The capital of Mexico is Mexico City.", ["Mexico", "Mexico City"], None),
    ],
)
def test_the_first_name_is_masked(text: str, names: list[str], masked: str | None) -> None:
    """The one that comes first, whole, and only where the rest of the text does not give it away."""
    found = evaluate.mask_first_name([{"text": text, "names": names}])
    assert [shown for _, shown, _ in found] == ([masked] if masked else [])
    assert all(shown.replace("[MASK]", name) == text for _, shown, name in found)


# Figures


class Guess:
    """A decoder that finds every token of a vocabulary equally likely."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def negative_log_likelihood(self, rows: Any, desc: str | None = None) -> list[float]:
        """Return each row's surprise."""
        return [(len(row) - 1) * math.log(self.vocabulary) for row in rows]


def test_the_perplexity_of_a_guess_is_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    """Whatever the text and the window; text that does not fill a window gives no figure."""
    write_split(tmp_path / "split", [Document(list(range(100)), [])], 300)
    split, decoder = Split.open(tmp_path / "split"), Guess(50)
    judged: Any = decoder
    assert evaluate.perplexity(judged, split, 16) == pytest.approx(50, abs=1e-3)
    assert evaluate.perplexity(judged, split, 99) == pytest.approx(50, abs=1e-3)
    assert evaluate.perplexity(judged, split, 101) is None


def test_the_surprise_of_a_text_is_a_plain_sum(chain: Chain) -> None:
    """Row by row against a softmax; the INT8 decoder's own sums are close to those of the model it was made of."""
    import torch

    path = chain.path("data/prune/model")
    rows = Split.open(chain.path("data/tokenize/shards") / "heldout").tokens[:64].reshape(4, 16)
    model: Any = models.load_decoder(path, NUMERICS).eval()
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=torch.from_numpy(rows.astype(np.int64))).logits, -1)
    naive = [-sum(logp[row, t - 1, rows[row, t]].item() for t in range(1, 16)) for row in range(4)]
    ours = TorchDecoder.load(path, NUMERICS).negative_log_likelihood(rows)
    assert ours == pytest.approx(naive, rel=1e-5)
    quantized = OnnxDecoder.load(chain.path("data/quantize/policy/model"), NUMERICS).negative_log_likelihood(rows)
    assert quantized == pytest.approx(naive, rel=0.05)
    assert quantized != pytest.approx(naive, rel=1e-6)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b c"], 1.0),
        (["a b a b"], 2 / 3),
        (["a b", "a b", "a b", "a b"], 1 / 4),
        (["a b", "b a"], 1.0),
        (["a", "b"], 0.0),
        ([], 0.0),
        (["我喜欢它", "我喜欢"], 3 / 5),
        (["とても とても"], 3 / 5),
    ],
)
def test_diversity_is_the_share_of_different_pairs(texts: list[str], expected: float) -> None:
    """Word pairs within replies, counted over all of them; pairs do not straddle two replies."""
    assert sheet.distinct(texts, 2) == pytest.approx(expected)


def test_repetition_is_the_share_of_three_words_that_a_reply_has_said_before() -> None:
    """A mean over replies, those of fewer words too; signs stand for words where these are not kept apart."""
    assert sheet.repetition(["a b c a b c", "a b"]) == pytest.approx(1 / 8)
    assert sheet.repetition(["很好看很好看", "很好"]) == pytest.approx(1 / 8)
