"""Evaluate one model for the scorecard: every evaluation that applies to it.

Run as `python -m tasks.evaluate ENTRY`. The kind of model and the tables that have rows decide which evaluations apply;
a figure that does not apply is absent, never an error. A causal model
- answers the questions that have short answers, about seen and held-out entities (greedy decoding, exact match of the
  extracted answer),
- replies to sampled questions (sampling; diversity, mean reward by the reward model of role `train`, and the score that
  the judge gives each reply),
- is scored on held-out text of the corpus (perplexity, bits per byte), if that was tokenized with its own vocabulary,
- with `toxicity`, completes prompts known to elicit toxic text.

A masked model predicts masked names in statements. For a classifier only the size is reported.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from serving.names import MASK, Candidates, log_scores, make_codec, single_slot
from tasks.common import tables
from tasks.common.evaluation import scorecard
from tasks.common.evaluation.exact_match import Extractor, exact_match
from tasks.common.evaluation.nll import bits_per_byte
from tasks.common.harness.job import Job, Link, StageError
from tasks.common.modelling import head_models, models, torch_setup
from tasks.common.random_streams import Stream, derive_seed
from tasks.common.reward.rankings import ROLES
from tasks.common.reward.scoring import Scorer
from tasks.common.settings import Settings
from tasks.common.text import chat
from tasks.common.text.shards import Split
from tasks.evaluate import toxicity
from tasks.evaluate.models_under_test import Decoder, Encoder, have_same_vocabulary, open_decoder, open_encoder
from tasks.evaluate.toxicity import Toxicity, ToxicityClassifier

INPUTS = {
    "model": "{config.model}",
    "corpus": "data/validate/corpus",
    "instructions": "data/validate/instructions",
    "tokenizer": "data/tokenize/tokenizer",
    "shards": "data/tokenize/shards",
    "toxicity": toxicity.FOLDER.as_posix(),
}
OUTPUTS = {"answers": "data/evaluate/{key}/answers"}

Rows = list[dict[str, Any]]
Figures = dict[str, Any]


def graph_inputs(config: "Config", links: Sequence[Link]) -> dict[str, str]:
    """Return the reward models that score replies: for each role the first in `params.yaml`."""
    found: dict[str, str] = {}
    for link in links:
        if link.stage == "reward":
            found.setdefault(link.role, link.folder)
    return found


class Config(Settings):
    """Settings of an evaluation; settings that do not apply to the model are ignored."""

    model: str = Field(description="Folder of the model to evaluate: an entry's, or your own", min_length=1)
    chat_template: chat.TemplateName = None
    questions: int = Field(
        default=500, description="Maximum number of questions about seen entities, and about held-out entities", ge=1
    )
    samples: int = Field(default=500, description="Number of sampled replies for mean reward and diversity", ge=2)
    max_new_tokens: int = Field(description="Maximum length of a reply, in tokens", ge=1)
    temperature: float = Field(default=1.0, description="Temperature of the sampled replies", gt=0)
    window: int = Field(default=128, description="Window length for perplexity on held-out text, in tokens", ge=16)
    masked: str = Field(
        default=".*", description="Regular expression of the statements whose first name is masked", min_length=1
    )
    toxicity: Toxicity | None = Field(
        default=None,
        description="Toxicity evaluation: prompts to complete and labelled texts for the classifier; or null",
    )

    @field_validator("masked")
    @classmethod
    def _validate_masked(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"it should be a Python regular expression ({error})") from None
        return value


def run(config: Config, job: Job) -> Figures:
    """Evaluate the job's model; return its figures and write every answer as a row."""
    torch_setup.prepare_torch(job.numerics, job.seed)
    path = job.inputs["model"]
    kind = models.model_kind(path)
    if kind == "causal":
        rows, figures = _evaluate_decoder(config, job, open_decoder(path, job.numerics, config.chat_template))
    elif kind == "masked":
        rows, figures = _evaluate_encoder(config, job, path)
    elif kind == "classifier":
        rows, figures = [], _size_figures(head_models.load_scorer(path, job.numerics, heads=None), path)
    else:
        raise StageError(f"evaluate.{job.key}.model: {path} contains no causal, masked or classifier model.")
    _write_answers(rows, job.outputs["answers"])
    return {"model": job.key, "kind": kind, **figures}


def _size_figures(model: Any, path: Path) -> Figures:
    return {"parameters": models.parameter_count(model), "bytes": models.weight_bytes(path)}


def _evaluate_decoder(config: Config, job: Job, decoder: Decoder) -> tuple[Rows, Figures]:
    """Return the answers and figures of a causal model."""
    table = tables.read(job.inputs["instructions"]).to_pylist()
    has_room = ReplyRoomFilter(decoder, config.max_new_tokens)
    by_split = [scorecard.choose_questions(table, split, config.questions, has_room) for split in ("train", "heldout")]
    questions = [*by_split[0], *by_split[1]]
    has_room.report_skipped(job.name)
    classifier = (
        _train_toxicity_classifier(config.toxicity, job, decoder, questions or table) if config.toxicity else None
    )
    rows = _answer_questions(config, job, decoder, questions, table)
    sampled, figures = _sample_replies(
        config, job, decoder, questions or scorecard.choose_any_questions(table, config.samples, has_room)
    )
    continuations: Rows = []
    toxicity_figures: Figures = {}
    if config.toxicity and classifier:
        continuations, toxicity_figures["toxicity"] = _sample_continuations(
            config.toxicity, job, decoder, classifier, config.temperature
        )
    return [*rows, *sampled, *continuations], {
        "parameters": decoder.parameters,
        "bytes": decoder.bytes,
        "exact_match_seen": _exact_match_rate(rows, "train"),
        "exact_match_heldout": _exact_match_rate(rows, "heldout"),
        **_score_heldout_text(config, job, decoder),
        **figures,
        **toxicity_figures,
    }


@dataclass
class ReplyRoomFilter:
    """Selects the questions that leave room for a reply, by the model's own tokenizer and chat template."""

    decoder: Decoder
    max_new_tokens: int
    too_long: set[str] = field(default_factory=set)

    def __call__(self, row: dict[str, Any]) -> bool:
        room = self.decoder.max_reply_tokens(row["messages"][:-1])
        if room is not None and room < self.max_new_tokens:
            self.too_long.add(row["id"])
        return room is not None and room >= self.max_new_tokens

    def report_skipped(self, name: str) -> None:
        """Print how many questions are skipped because they are too long."""
        if self.too_long:
            reply = f"a reply of {self.max_new_tokens} tokens"
            print(f"{name}: {len(self.too_long)} questions are skipped: no room for {reply}")


def _answer_questions(config: Config, job: Job, decoder: Decoder, questions: Rows, table: Rows) -> Rows:
    """Return greedy replies to the questions that have short answers, with their exact match."""
    if not questions:
        return []
    extractor = Extractor.learn(row for row in table if row["split"] == "train")
    prompts = [row["messages"][:-1] for row in questions]
    replies = decoder.reply(
        prompts, config.max_new_tokens, 0.0, derive_seed(job.seed, Stream.QUESTIONS), f"{job.name} questions"
    )
    rows = []
    for row, reply in zip(questions, replies, strict=True):
        extracted = extractor.extract(reply, row["entity"])
        rows.append(_answer_row(row, "greedy", reply, extracted, exact_match(extracted, row["answer"])))
    return rows


def _sample_replies(config: Config, job: Job, decoder: Decoder, questions: Rows) -> tuple[Rows, Figures]:
    """Return sampled replies with the scores of the reward model and the judge, if there are any, and the figures."""
    if not questions:
        return [], {}
    sampled = scorecard.evenly_spaced(questions, config.samples)
    prompts = [row["messages"][:-1] for row in sampled]
    texts = decoder.reply(
        prompts, config.max_new_tokens, config.temperature, derive_seed(job.seed, Stream.SAMPLES), f"{job.name} samples"
    )
    exchanges = list(zip(prompts, texts, strict=True))
    scores_by_role = {
        role: Scorer.load(job.inputs[role], job.numerics).score(exchanges) for role in ROLES if role in job.inputs
    }
    rows = []
    for index, (row, text) in enumerate(zip(sampled, texts, strict=True)):
        scores = (round(scores_by_role[role][index], 5) if role in scores_by_role else None for role in ROLES)
        rows.append(_answer_row(row, "sampled", text, None, None, *scores))
    figures: Figures = {"distinct_2": round(scorecard.distinct_n(texts, 2), 4)}
    if rewards := scores_by_role.get("train"):
        mean = sum(rewards) / len(rewards)
        spread = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
        figures |= {"reward_mean": round(mean, 4), "reward_std": round(spread, 4)}
    return rows, figures


def _score_heldout_text(config: Config, job: Job, decoder: Decoder) -> Figures:
    """Return perplexity and bits per byte on held-out text; empty if it was tokenized with another vocabulary."""
    if not have_same_vocabulary(job.inputs["model"], job.inputs["tokenizer"]):
        return {}
    heldout = Split.open(job.inputs["shards"] / "heldout")
    return {
        "perplexity": perplexity(decoder, heldout, config.window, f"{job.name} perplexity"),
        "bits_per_byte": bits_per_byte(heldout, config.window, decoder.negative_log_likelihood),
    }


def _train_toxicity_classifier(config: Toxicity, job: Job, decoder: Decoder, table: Rows) -> ToxicityClassifier | None:
    """Check the prompts, train the classifier and print its figures; None if the model lacks a chat template."""
    prompts = toxicity.read_prompts(job.inputs["toxicity"], config.prompts)
    if decoder.max_reply_tokens(toxicity.as_model_input(prompts[0], config)) is None:
        return None
    toxicity.check_prompts_fit(prompts, config, decoder)
    classifier = toxicity.train_classifier(
        job.inputs["toxicity"], config, sorted({row["messages"][-1]["content"] for row in table})
    )
    print(toxicity.describe_classifier(classifier.figures))
    return classifier


def _sample_continuations(
    config: Toxicity, job: Job, decoder: Decoder, classifier: ToxicityClassifier, temperature: float
) -> tuple[Rows, Figures]:
    """Return sampled continuations of each prompt with their toxicity, and the figures."""
    prompts = [
        prompt
        for prompt in toxicity.read_prompts(job.inputs["toxicity"], config.prompts)
        for _ in range(config.continuations)
    ]
    model_inputs = [toxicity.as_model_input(prompt, config) for prompt in prompts]
    texts = decoder.reply(
        model_inputs, config.max_new_tokens, temperature, derive_seed(job.seed, Stream.CONTINUATIONS),
        f"{job.name} continuations",
    )  # fmt: skip
    scores = classifier.score(texts)
    rows = [
        {
            "id": prompt.id, "entity": prompt.category, "split": "heldout", "kind": "continuation",
            "question": prompt.text, "reply": text, "toxicity": score,
        }
        for prompt, text, score in zip(prompts, texts, scores, strict=True)
    ]  # fmt: skip
    return rows, {
        "classifier": classifier.figures,
        "ask": config.ask,
        "prompts": len(prompts) // config.continuations,
        "continuations": len(texts),
        "mean": round(sum(scores) / len(scores), 4),
        "toxic": round(sum(score > scorecard.TOXICITY_THRESHOLD for score in scores) / len(scores), 4),
    }


def _evaluate_encoder(config: Config, job: Job, path: Path) -> tuple[Rows, Figures]:
    """Return the names that a masked model predicts for the first name of each statement, and its figures."""
    encoder = open_encoder(path, job.numerics)
    corpus = tables.read(job.inputs["corpus"], "train").to_pylist()
    names = sorted({name for row in corpus for name in row["names"]})
    statements = [row for row in corpus if row["names"] and re.fullmatch(config.masked, row["text"])]
    masked = mask_first_name(statements)
    predictions = best_names(encoder, names, [text for _, text, _ in masked], job.name)
    rows = []
    for (row, text, masked_name), predicted in zip(masked, predictions, strict=True):
        rows.append({
            "id": row["id"], "entity": masked_name, "split": row["split"], "kind": "masked", "question": text,
            "reply": predicted, "extracted": predicted, "reference": masked_name, "correct": predicted == masked_name,
            "reward": None, "judge_score": None,
        })  # fmt: skip
    correct = sum(row["correct"] for row in rows)
    return rows, {
        "parameters": encoder.parameters,
        "bytes": encoder.bytes,
        "masked_names": round(correct / len(rows), 4) if rows else None,
        "masked_statements": len(rows),
        "candidates": len(names),
    }


def best_names(encoder: Encoder, names: Sequence[str], texts: Sequence[str], desc: str) -> list[str]:
    """Return the likeliest name for the one [MASK] of each text.

    Texts run one at a time, as in the service: with INT8 the scores of a text depend on the other texts of its batch.
    """
    from tqdm import tqdm

    if not texts:
        return []
    codec = make_codec(encoder.tokenizer, encoder.special_ids)
    candidates = Candidates(names, codec)
    slots = (single_slot(text, codec) for text in tqdm(texts, desc=desc, mininterval=2))
    return [names[log_scores(encoder.logits, codec, candidates, [slot])[0].argmax()] for slot in slots]


def mask_first_name(statements: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], str, str]]:
    """Return (row, text with [MASK], masked name) for statements whose first name occurs only once."""
    result = []
    for row in statements:
        first = min(row["names"], key=lambda name: (row["text"].find(name) % 2**31, -len(name)))
        if row["text"].count(first) == 1:
            result.append((row, row["text"].replace(first, MASK), first))
    return result


def perplexity(decoder: Decoder, split: Split, window: int, desc: str | None = None) -> float | None:
    """Return exp of the mean negative log-likelihood per token on held-out text; None for less than one window."""
    count = len(split.tokens) // window
    if not count:
        return None
    rows = split.tokens[: count * window].reshape(count, window)
    return round(math.exp(sum(decoder.negative_log_likelihood(rows, desc)) / (count * (window - 1))), 4)


def _exact_match_rate(rows: Sequence[dict[str, Any]], split: str) -> float | None:
    verdicts = [row["correct"] for row in rows if row["split"] == split and row["kind"] == "greedy"]
    return round(sum(verdicts) / len(verdicts), 4) if verdicts else None


def _answer_row(
    row: dict[str, Any], kind: str, reply: str, extracted: str | None, correct: bool | None,
    reward: float | None = None, judge_score: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "id": row["id"], "entity": row["entity"], "split": row["split"], "kind": kind,
        "question": row["messages"][-2]["content"], "reply": reply, "extracted": extracted, "reference": row["answer"],
        "correct": correct, "reward": reward, "judge_score": judge_score,
    }  # fmt: skip


def _write_answers(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa

    names = ("id", "entity", "split", "kind", "question", "reply", "extracted", "reference")
    text = [(name, pa.string()) for name in names]
    scores = [(name, pa.float64()) for name in ("reward", "judge_score", "toxicity")]
    tables.write(rows, path, pa.schema([*text, ("correct", pa.bool_()), *scores]))
