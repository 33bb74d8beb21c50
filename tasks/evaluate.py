"""Put one model of the chain before the held-out sheet that every model of the chain answers.

Run as `python -m tasks.evaluate KEY`, KEY one of base, tuned, policy, pruned, int8, encoder, encoder-int8. A decoder
answers questions about tuned and about held-out entities (greedy, exact match of the extracted answer), replies freely
(sampled: mean reward and diversity, and what the judge thinks of each reply, a reward model that PPO has not learnt
from) and is scored on held-out prose; with `evaluate.toxicity` it also goes on with prompts that draw toxic
continuations. An encoder names what is masked in statements.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from serving.names import MASK, Candidates, codec_of, log_scores, only_slot
from tasks.common import stage, tables
from tasks.common.evaluation import sheet, toxicity
from tasks.common.evaluation.answers import Extractor, exact_match
from tasks.common.evaluation.candidates import Decoder, Encoder, open_decoder, open_encoder
from tasks.common.evaluation.scoring import Scorer
from tasks.common.evaluation.surprise import bits_per_byte
from tasks.common.evaluation.toxicity import Judge, Toxicity
from tasks.common.modelling import models
from tasks.common.settings import Settings
from tasks.common.stage import Job, StageError
from tasks.common.text import chat
from tasks.common.text.shards import Split

DECODERS = {
    "base": "data/pretrain/clm/model",
    "tuned": "data/finetune/model",
    "policy": "data/ppo/model",
    "pruned": "data/prune/model",
    "int8": "data/quantize/policy/model",
}
ENCODERS = {"encoder": "data/pretrain/mlm/model", "encoder-int8": "data/quantize/encoder/model"}
# The sheet is one for all models, whichever part of it a model is put before.
INPUTS = {
    "corpus": "data/validate/corpus",
    "instructions": "data/validate/instructions",
    "shards": "data/tokenize/shards",
    "reward": "data/reward/policy/model",
    "judge": "data/reward/judge/model",
    "toxicity": toxicity.FOLDER.as_posix(),
}
KEY_INPUTS = {key: {"model": path} for key, path in (DECODERS | ENCODERS).items()}
OUTPUTS = {"answers": "data/evaluate/{key}/answers"}


class Config(Settings):
    """Settings of the sheet."""

    questions: int = Field(description="Questions about tuned and, as many again, about held-out entities", ge=1)
    samples: int = Field(description="Sampled replies for mean reward and diversity", ge=2)
    max_new_tokens: int = Field(description="Longest reply, in tokens", ge=1)
    temperature: float = Field(description="Temperature of the sampled replies", gt=0)
    window: int = Field(description="Length of a window of held-out prose, in tokens", ge=16)
    masked: str = Field(description="Regular expression of the statements whose first name is masked", min_length=1)
    toxicity: Toxicity | None = Field(description="Prompts to go on with and texts that teach what is toxic, or null")

    @field_validator("masked")
    @classmethod
    def _is_a_regular_expression(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"it should be a regular expression of Python's ({error})") from None
        return value


def run(config: Config, job: Job) -> dict[str, Any]:
    """Fill in the sheet for the job's model: figures as metrics, every answer as a row."""
    models.prepare_torch(job.numerics, job.seed)
    path = job.inputs["model"]
    rows, figures = _encoder_sheet(config, job, path) if job.key in ENCODERS else _decoder_sheet(config, job, path)
    _write_answers(rows, job.outputs["answers"])
    return {"model": job.key, **figures}


def _decoder_sheet(config: Config, job: Job, path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    decoder = open_decoder(path, job.numerics)
    table = tables.read(job.inputs["instructions"]).to_pylist()
    extractor = Extractor.learn(row for row in table if row["split"] == "train")
    scorer = Scorer.load(job.inputs["reward"], job.numerics)
    too_long = 0

    def fits(row: dict[str, Any]) -> bool:
        """Return whether a reply has room, by the tokenizer that the reward model carries: alike for every model."""
        nonlocal too_long
        prompt = chat.encode_prompt(scorer.tokenizer, row["messages"][:-1])
        room = len(prompt) + config.max_new_tokens <= scorer.tokenizer.model_max_length
        too_long += not room
        return room

    questions = [row for split in ("train", "heldout") for row in sheet.choose(table, split, config.questions, fits)]
    if not questions:
        raise StageError(
            f"none of the {len(table)} conversations has a short answer and leaves the model room for a reply of "
            f"evaluate.max_new_tokens ({config.max_new_tokens}); `answer` in the sources gives short answers."
        )
    if too_long:
        print(f"{too_long} questions are not asked: they leave no room for a reply of {config.max_new_tokens} tokens")
    judge = config.toxicity and _toxicity_judge(config.toxicity, job, scorer, questions)
    asked = [row["messages"][:-1] for row in questions]
    replies = decoder.reply(asked, config.max_new_tokens, 0.0, job.seed, f"{job.name} questions")
    rows = []
    for row, reply in zip(questions, replies, strict=True):
        given = extractor.extract(reply, row["entity"])
        correct = exact_match(given, row["answer"])
        rows.append(_row(row, "greedy", reply, given, row["answer"], correct))
    sampled = sheet.spread(questions, config.samples)
    asked = [row["messages"][:-1] for row in sampled]
    texts = decoder.reply(asked, config.max_new_tokens, config.temperature, job.seed, f"{job.name} samples")
    exchanges = list(zip(asked, texts, strict=True))
    rewards, judged = scorer.score(exchanges), Scorer.load(job.inputs["judge"], job.numerics).score(exchanges)
    for row, text, *scores in zip(sampled, texts, rewards, judged, strict=True):
        rows.append(_row(row, "sampled", text, None, row["answer"], None, *(round(score, 5) for score in scores)))
    toxic: dict[str, Any] = {}
    if config.toxicity and judge:
        continued, toxic["toxicity"] = _continuations(config.toxicity, job, decoder, judge, config.temperature)
        rows += continued
    mean = sum(rewards) / len(rewards)
    heldout = Split.open(job.inputs["shards"] / "heldout")
    return rows, {
        "parameters": decoder.parameters,
        "bytes": decoder.bytes,
        "exact_match_tuned": _rate(rows, "train"),
        "exact_match_heldout": _rate(rows, "heldout"),
        "perplexity": perplexity(decoder, heldout, config.window, f"{job.name} perplexity"),
        "bits_per_byte": bits_per_byte(heldout, config.window, decoder.negative_log_likelihood),
        "reward_mean": round(mean, 4),
        "reward_std": round(math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)), 4),
        "distinct_2": round(sheet.distinct(texts, 2), 4),
        **toxic,
    }


def _toxicity_judge(config: Toxicity, job: Job, scorer: Scorer, questions: Sequence[dict[str, Any]]) -> Judge:
    """Check the prompts, train the classifier and tell of it, before any model is asked."""
    toxicity.must_fit(toxicity.prompts_of(job.inputs["toxicity"], config.prompts), config, scorer.tokenizer)
    judge = toxicity.learn(
        job.inputs["toxicity"], config, sorted({row["messages"][-1]["content"] for row in questions})
    )
    print(toxicity.told(judge.figures))
    return judge


def _continuations(
    config: Toxicity, job: Job, decoder: Decoder, judge: Judge, temperature: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what the decoder makes of each prompt, several times, as rows with their toxicity, and the figures."""
    prompts = [
        prompt
        for prompt in toxicity.prompts_of(job.inputs["toxicity"], config.prompts)
        for _ in range(config.continuations)
    ]
    given = [toxicity.asked(prompt, config) for prompt in prompts]
    texts = decoder.reply(given, config.max_new_tokens, temperature, job.seed, f"{job.name} continuations")
    scores = judge.score(texts)
    rows = [
        {
            "id": prompt.id, "entity": prompt.category, "split": "heldout", "kind": "continued",
            "question": prompt.text, "reply": text, "toxicity": score,
        }
        for prompt, text, score in zip(prompts, texts, scores, strict=True)
    ]  # fmt: skip
    return rows, {
        "classifier": judge.figures,
        "ask": config.ask,
        "prompts": len(prompts) // config.continuations,
        "continuations": len(texts),
        "mean": round(sum(scores) / len(scores), 4),
        "toxic": round(sum(score > sheet.TOXIC for score in scores) / len(scores), 4),
    }


def _encoder_sheet(config: Config, job: Job, path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    encoder = open_encoder(path, job.numerics)
    corpus = tables.read(job.inputs["corpus"], "train").to_pylist()
    names = sorted({name for row in corpus for name in row["names"]})
    statements = [row for row in corpus if row["names"] and re.fullmatch(config.masked, row["text"])]
    masked = mask_first_name(statements)
    found = best_names(encoder, names, [text for _, text, _ in masked], job.name)
    rows = []
    for (row, text, gold), given in zip(masked, found, strict=True):
        rows.append({
            "id": row["id"], "entity": gold, "split": row["split"], "kind": "masked", "question": text,
            "reply": given, "given": given, "wanted": gold, "correct": given == gold, "reward": None, "judged": None,
        })  # fmt: skip
    right = sum(row["correct"] for row in rows)
    return rows, {
        "parameters": encoder.parameters,
        "bytes": encoder.bytes,
        "masked_names": round(right / len(rows), 4) if rows else None,
        "masked_statements": len(rows),
        "candidates": len(names),
    }


def best_names(encoder: Encoder, names: Sequence[str], texts: Sequence[str], desc: str) -> list[str]:
    """Return the likeliest name for the one [MASK] of each text.

    Texts run one by one, as the service runs them: with INT8 a text's neighbours in a batch would bear on its scores.
    """
    from tqdm import tqdm

    if not texts:
        return []
    codec = codec_of(encoder.tokenizer)
    candidates = Candidates(names, codec)
    places = (only_slot(text, codec) for text in tqdm(texts, desc=desc, mininterval=2))
    return [names[log_scores(encoder.logits, codec, candidates, [place])[0].argmax()] for place in places]


def mask_first_name(statements: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], str, str]]:
    """Return (row, text with [MASK], hidden name) for statements in which one name comes first and stands once."""
    result = []
    for row in statements:
        first = min(row["names"], key=lambda name: (row["text"].find(name) % 2**31, -len(name)))
        if row["text"].count(first) == 1:
            result.append((row, row["text"].replace(first, MASK), first))
    return result


def perplexity(decoder: Decoder, split: Split, window: int, desc: str | None = None) -> float | None:
    """Return exp of the mean negative log-likelihood a token (nats) on held-out prose; None for less than a window."""
    count = len(split.tokens) // window
    if not count:
        return None
    rows = split.tokens[: count * window].reshape(count, window)
    return round(math.exp(sum(decoder.negative_log_likelihood(rows, desc)) / (count * (window - 1))), 4)


def _rate(rows: Sequence[dict[str, Any]], split: str) -> float | None:
    chosen = [row["correct"] for row in rows if row["split"] == split and row["kind"] == "greedy"]
    return round(sum(chosen) / len(chosen), 4) if chosen else None


def _row(
    row: dict[str, Any],
    kind: str,
    reply: str,
    given: str | None,
    wanted: str,
    correct: bool | None,
    reward: float | None = None,
    judged: float | None = None,
) -> dict[str, Any]:
    question = row["messages"][-2]["content"]
    return {
        "id": row["id"], "entity": row["entity"], "split": row["split"], "kind": kind, "question": question,
        "reply": reply, "given": given, "wanted": wanted, "correct": correct, "reward": reward,
        "judged": judged,
    }  # fmt: skip


def _write_answers(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa

    text = [(name, pa.string()) for name in ("id", "entity", "split", "kind", "question", "reply", "given", "wanted")]
    scores = [(name, pa.float64()) for name in ("reward", "judged", "toxicity")]
    tables.write(rows, path, pa.schema([*text, ("correct", pa.bool_()), *scores]))


if __name__ == "__main__":
    stage.main("tasks.evaluate")
