"""The stage `evaluate`: its figures follow from its rows, its questions are distinct, and training improves them."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from flows.runner import PROGRESS_BAR
from tasks.common import tables
from tasks.common.evaluation import scorecard
from tasks.common.harness.job import Link, StageError
from tasks.common.modelling import models
from tasks.common.reward.scoring import Scorer
from tasks.common.text.shards import Document, Split, write_split
from tasks.evaluate import stage as evaluate
from tasks.evaluate.masked_names import MaskedNames, mask_first_name
from tasks.evaluate.models_under_test import EngineDecoder, TorchDecoder, open_decoder
from tasks.evaluate.text import perplexity
from tests.training_fixtures import (
    CAPITALS,
    DECODERS,
    ENCODERS,
    EVALUATED,
    HELD_OUT,
    NUMERICS,
    TONES,
    Chain,
    chain,
    config,
    instructions,
)

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

KEYS = list(EVALUATED)


@pytest.fixture(scope="module")
def evaluations(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], list[Any]]]:
    """Figures and answer rows of every model of the chain."""
    result = {}
    for key in KEYS:
        job = chain.job(f"evaluate@{key}", config(f"evaluate@{key}"), tmp_path_factory.mktemp(key))
        figures = chain.run(job, config(job.name))
        result[key] = figures, tables.read(job.outputs["answers"]).to_pylist()
    return result


def rows_of(kind: str, split: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of one kind and split."""
    return [row for row in rows if row["kind"] == kind and row["split"] == split]


# Whole evaluations


@pytest.mark.parametrize("key", DECODERS)
def test_a_decoders_figures_follow_from_its_answers(key: str, evaluations: Any, chain: Chain) -> None:
    """Rates, mean reward, its standard deviation and diversity, recomputed from the answer rows."""
    figures, rows = evaluations[key]
    for rate, split in (("exact_match_seen", "train"), ("exact_match_heldout", "heldout")):
        greedy = rows_of("greedy", split, rows)
        assert figures[rate] == round(sum(row["correct"] for row in greedy) / len(greedy), 4)
        assert all(row["correct"] == (row["extracted"] == row["reference"]) for row in greedy)
        assert {row["entity"] in HELD_OUT for row in greedy} == {split == "heldout"}
    sampled = [row for row in rows if row["kind"] == "sampled"]
    rewards = [row["reward"] for row in sampled]
    assert len(rewards) == config("evaluate").samples
    assert figures["reward_mean"] == pytest.approx(np.mean(rewards), abs=1e-4)
    assert figures["reward_std"] == pytest.approx(np.std(rewards, ddof=1), abs=1e-4)
    assert figures["distinct_2"] == round(scorecard.distinct_n([row["reply"] for row in sampled], 2), 4)
    exchanges = [([{"role": "user", "content": row["question"]}], row["reply"]) for row in sampled]
    for column, model in (("reward", "train"), ("judge_score", "judge")):
        scorer = Scorer.load(chain.path(f"data/reward/{model}/model"), NUMERICS)
        assert [row[column] for row in sampled] == pytest.approx(scorer.score(exchanges), abs=2e-5)


def test_fine_tuned_model_answers_training_questions_and_base_none(evaluations: Any) -> None:
    """The base model answers no question, the fine-tuned one nearly all of its training questions."""
    assert evaluations["base"][0]["exact_match_seen"] == 0
    assert evaluations["tuned"][0]["exact_match_seen"] >= 0.9
    assert evaluations["tuned"][0]["model"] == "tuned"


def test_size_figures_match_file_sizes(evaluations: Any, chain: Chain) -> None:
    """Parameters and bytes, which pruning and quantization reduce."""
    for key, path in EVALUATED.items():
        name = "openvino_model.bin" if "int8" in key else "model.safetensors"
        assert evaluations[key][0]["bytes"] == (chain.path(path) / name).stat().st_size
    sizes = {key: figures["parameters"] for key, (figures, _) in evaluations.items()}
    assert sizes["base"] == sizes["tuned"] == sizes["policy"] > sizes["pruned"] == sizes["int8"]
    assert sizes["encoder"] == sizes["encoder-int8"]


@pytest.mark.parametrize("key", ENCODERS)
def test_encoder_fills_first_names_of_statements(key: str, evaluations: Any) -> None:
    """The first name of each statement among all names of the corpus: nearly all of the toy's are right."""
    figures, rows = evaluations[key]
    assert figures["candidates"] == len({name for pair in CAPITALS.items() for name in pair})
    # "The capital of Mexico is Mexico City." is skipped: its first name occurs twice.
    assert figures["masked_statements"] == len(rows) == len(CAPITALS) - 1
    assert figures["masked_names"] == round(sum(row["correct"] for row in rows) / len(rows), 4) >= 0.8
    assert all(row["correct"] == (row["extracted"] == row["reference"]) for row in rows)
    assert {row["question"].count("[MASK]") for row in rows} == {1}
    assert not any(row["reference"] in row["question"] for row in rows)


def test_evaluation_is_reproducible(evaluations: Any, chain: Chain, tmp_path: Path) -> None:
    """Sampled replies included."""
    job = chain.job("evaluate@tuned", config("evaluate@tuned"), tmp_path)
    figures = chain.run(job, config(job.name))
    assert (figures, tables.read(job.outputs["answers"]).to_pylist()) == evaluations["tuned"]


def test_a_corpus_without_names_gives_no_figure(chain: Chain, tmp_path: Path) -> None:
    """Without names the figure is `None`, not 0 and not an error."""
    job = chain.job("evaluate@encoder", config("evaluate@encoder"), tmp_path)
    job.inputs["corpus"] = tmp_path / "corpus"
    prose = [row for row in tables.read(chain.path("data/validate/corpus")).to_pylist() if not row["names"]]
    tables.write(prose, job.inputs["corpus"], tables.schema("corpus"))
    assert chain.run(job, config(job.name))["masked_names"] is None


def test_questions_without_room_for_a_reply_are_skipped(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured with the model's own tokenizer; their number is printed, and without questions there are no figures."""
    job = chain.job("evaluate@tuned", config("evaluate@tuned"), tmp_path)
    table = tables.read(chain.path("data/validate/instructions")).to_pylist()
    long = [{**row, "messages": [{"role": "user", "content": "Rome " * 60}, row["messages"][1]]} for row in table]
    job.inputs["instructions"] = tmp_path / "instructions"
    tables.write([table[0], *long[1:]], job.inputs["instructions"], tables.schema("instructions"))
    chain.run(job, config(job.name))
    questions = {row["question"] for row in tables.read(job.outputs["answers"]).to_pylist()}
    assert questions == {table[0]["messages"][0]["content"]}
    assert "questions are skipped: no room for a reply of 24 tokens" in capsys.readouterr().out
    job = chain.job("evaluate@tuned", config("evaluate@tuned"), tmp_path / "again")
    job.inputs["instructions"] = tmp_path / "long"
    tables.write(long, job.inputs["instructions"], tables.schema("instructions"))
    figures = chain.run(job, config(job.name))
    assert figures["exact_match_seen"] is None
    assert "reward_mean" not in figures
    assert figures["evaluations"]["exact_match"]["absent"].startswith("no question with a short answer leaves room")
    assert figures["bits_per_byte"] > 0


def test_conversations_that_spell_special_tokens_are_rejected(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine rejects such a question, which would stop the stage after all training."""
    settings = config("evaluate@chat")
    job = chain.job("evaluate@chat", settings, tmp_path)
    first, *others = tables.read(chain.path("data/validate/instructions")).to_pylist()
    spelled = {**first, "id": "odd", "messages": [{"role": "user", "content": "Is <|end|> it?"}, first["messages"][1]]}
    job.inputs["instructions"] = tmp_path / "instructions"
    tables.write([spelled, first, *others], job.inputs["instructions"], tables.schema("instructions"))
    chain.run(job, settings)
    assert "odd" not in {row["id"] for row in tables.read(job.outputs["answers"]).to_pylist()}
    assert "1 conversations spell special tokens and are rejected" in capsys.readouterr().out


def test_conversations_without_short_answers_get_sampled_replies(chain: Chain, tmp_path: Path) -> None:
    """A user's conversations give diversity, reward and judge scores, but no exact match."""
    job = chain.job("evaluate@tuned", config("evaluate@tuned"), tmp_path)
    table = [{**row, "answer": None} for row in tables.read(chain.path("data/validate/instructions")).to_pylist()]
    job.inputs["instructions"] = tmp_path / "instructions"
    tables.write(table, job.inputs["instructions"], tables.schema("instructions"))
    figures = chain.run(job, config(job.name))
    rows = tables.read(job.outputs["answers"]).to_pylist()
    assert {row["kind"] for row in rows} == {"sampled"}
    assert (figures["exact_match_seen"], figures["exact_match_heldout"]) == (None, None)
    assert figures["reward_mean"] == pytest.approx(np.mean([row["reward"] for row in rows]), abs=1e-4)
    assert "heldout" in {row["split"] for row in rows}


def test_evaluate_without_tables_and_reward_models_reports_only_size(chain: Chain, tmp_path: Path) -> None:
    """A checkpoint served without training: no conversations, corpus or rankings."""
    job = chain.job("evaluate@tuned", config("evaluate@tuned"), tmp_path)
    for table in ("instructions", "corpus"):
        job.inputs[table] = tmp_path / table
        tables.write([], job.inputs[table], tables.schema(table))
    del job.inputs["train"], job.inputs["judge"]
    job.inputs["tokenizer"] = tmp_path  # of no corpus, or of another model's
    figures = chain.run(job, config(job.name))
    described = figures.pop("evaluations")
    assert {name for name, value in figures.items() if value is not None} == {"model", "kind", "parameters", "bytes"}
    assert all(described[name]["absent"] for name in ("exact_match", "reward", "judge", "diversity", "text"))
    assert tables.read(job.outputs["answers"]).num_rows == 0


def test_first_reward_model_of_each_role_scores_replies(chain: Chain) -> None:
    links = (Link("reward@b", ("m",), "judge"), Link("reward@a", ("m",), "train"), Link("reward@c", ("m",), "train"))
    inputs = evaluate.graph_inputs(config("evaluate@tuned"), links)
    assert inputs == {"judge": "data/reward/b/model", "train": "data/reward/a/model"}


@pytest.mark.parametrize("rejected", ["Is <|end|> the end?", "Rome " * 200])
def test_engine_rejection_names_the_question_and_remedy(rejected: str, chain: Chain) -> None:
    """The error names the question and the remedy."""
    decoder = EngineDecoder.load(chain.path("data/quantize/chat/model"), NUMERICS)
    with pytest.raises(StageError, match=rf"rejects the question '{re.escape(rejected[:70])}.*params\.yaml"):
        decoder.reply([[{"role": "user", "content": rejected}]], 8, 0.0, 1)


def test_decoder_continues_text_and_replies_to_conversations(chain: Chain) -> None:
    """The base model completes a pretraining sentence; the same words as a message are another prompt."""
    text, messages = "The capital of France is", [{"role": "user", "content": "The capital of France is"}]
    base = TorchDecoder.load(chain.path("data/pretrain/causal/model"), NUMERICS)
    assert base.reply([text, messages], 6, 0.0, 1)[0].startswith("Paris.")
    for path in ("data/prune/pruned/model", "data/quantize/chat/model"):
        decoder = open_decoder(chain.path(path), NUMERICS)
        assert decoder.reply([text, messages], 6, 0.0, 1) == [
            decoder.reply([prompt], 6, 0.0, 1)[0] for prompt in (text, messages)
        ]  # fmt: skip


def test_invalid_masked_expression_is_a_settings_error() -> None:
    with pytest.raises(ValidationError, match="should be a Python regular expression"):
        MaskedNames(kind="masked_names", statements="The capital of (.*")


@pytest.mark.parametrize("key", ["tuned", "int8"])
def test_evaluation_shows_its_progress(
    key: str, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress bars for questions, samples and perplexity, in the format that the runner parses."""
    chain.run(chain.job(f"evaluate@{key}", config(f"evaluate@{key}"), tmp_path), config(f"evaluate@{key}"))
    bars = [bar["what"] for text in re.split(r"[\r\n]+", capsys.readouterr().err) if (bar := PROGRESS_BAR.match(text))]
    assert list(dict.fromkeys(bars)) == [f"evaluate@{key} {part}" for part in ("questions", "samples", "perplexity")]


# Questions


def all_fit(row: dict[str, Any]) -> bool:
    """No question is too long."""
    return True


def test_questions_are_distinct_and_independent_of_row_order() -> None:
    """A question in three tones is one question; the selection depends only on the row ids."""
    table = list(instructions())
    for split, entities in (("train", 8), ("heldout", 2)):
        chosen = scorecard.choose_questions(table, split, 100, all_fit)
        questions = {(row["entity"], row["messages"][0]["content"]) for row in chosen}
        assert len(chosen) == len(questions) == 2 * entities
        assert scorecard.choose_questions(table[::-1], split, 100, all_fit) == chosen
        assert scorecard.choose_questions(table, split, 3, all_fit) == chosen[:3]
    assert len(TONES) == 3


def test_questions_without_a_short_answer_are_not_asked() -> None:
    """Small talk has no right answer."""
    table = [{**row, "answer": None} for row in instructions()]
    assert scorecard.choose_questions(table, "train", 100, all_fit) == []


@pytest.mark.parametrize(
    ("rows", "count", "expected"),
    [(10, 5, [0, 2, 4, 6, 8]), (10, 10, list(range(10))), (3, 7, [0, 1, 2, 0, 1, 2, 0]), (10, 3, [0, 3, 6])],
)
def test_samples_are_spread_evenly(rows: int, count: int, expected: list[int]) -> None:
    """Evenly spaced, and cycling if there are fewer questions than samples."""
    assert [row["n"] for row in scorecard.evenly_spaced([{"n": n} for n in range(rows)], count)] == expected


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
    """The longest name at the first position, and only if it occurs once."""
    examples = mask_first_name([{"text": text, "names": names}])
    assert [masked_text for _, masked_text, _ in examples] == ([masked] if masked else [])
    assert all(masked_text.replace("[MASK]", name) == text for _, masked_text, name in examples)


# Figures


class UniformDecoder:
    """A decoder that assigns the same probability to every token."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def negative_log_likelihood(self, rows: Any, desc: str | None = None) -> list[float]:
        """Return each row's negative log-likelihood in nats."""
        return [(len(row) - 1) * math.log(self.vocabulary) for row in rows]


def test_perplexity_of_a_uniform_model_is_the_vocabulary_size(tmp_path: Path) -> None:
    """For any text and window; a text shorter than a window gives None."""
    write_split(tmp_path / "split", [Document(list(range(100)), [])], 300)
    split, decoder = Split.open(tmp_path / "split"), UniformDecoder(50)
    judged: Any = decoder
    assert perplexity(judged, split, 16) == pytest.approx(50, abs=1e-3)
    assert perplexity(judged, split, 99) == pytest.approx(50, abs=1e-3)
    assert perplexity(judged, split, 101) is None


def test_negative_log_likelihood_matches_a_plain_sum(chain: Chain) -> None:
    """Compared with a softmax; the INT8 decoder's sums are close to those of the model that it was exported from."""
    import torch

    path = chain.path("data/prune/pruned/model")
    rows = Split.open(chain.path("data/tokenize/shards") / "heldout").tokens[:64].reshape(4, 16)
    model: Any = models.load_decoder(path, NUMERICS).eval()
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=torch.from_numpy(rows.astype(np.int64))).logits, -1)
    naive = [-sum(logp[row, t - 1, rows[row, t]].item() for t in range(1, 16)) for row in range(4)]
    ours = TorchDecoder.load(path, NUMERICS).negative_log_likelihood(rows)
    assert ours == pytest.approx(naive, rel=1e-5)
    quantized = EngineDecoder.load(chain.path("data/quantize/chat/model"), NUMERICS).negative_log_likelihood(rows)
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
    """Word pairs within replies, counted over all replies."""
    assert scorecard.distinct_n(texts, 2) == pytest.approx(expected)


def test_repetition_is_the_share_of_repeated_word_triples() -> None:
    """A mean over all replies, also shorter ones; characters count as words in text without spaces."""
    assert scorecard.repetition(["a b c a b c", "a b"]) == pytest.approx(1 / 8)
    assert scorecard.repetition(["很好看很好看", "很好"]) == pytest.approx(1 / 8)
