"""Evaluate the base and the tuned model of a scratch project on held-out questions, with greedy decoding.

`benchmarks/medquad.py` runs it in that project as `python -m benchmarks.medquad_run FILE`.
"""

import json
import string
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tasks.common import tables
from tasks.common.generation import sampling
from tasks.common.harness.records import write_json
from tasks.common.modelling import models, torch_setup
from tasks.common.settings import Numerics
from tasks.common.text import chat

SEED = 1
MAX_REPLY_TOKENS = 160
SOURCE_MARK = " Source: "
ARTICLES = ("a", "an", "the")
MODELS = {"base": Path("data/pretrain/causal/model"), "tuned": Path("data/finetune/chat/model")}


def ask(model: Path, questions: list[dict[str, Any]], numerics: Numerics) -> list[tuple[str, bool]]:
    """Return a model's reply to each question, and whether it ended with the end token."""
    tokenizer = chat.load_tokenizer(model)
    prompts = [chat.encode_prompt(tokenizer, row["messages"][:-1]) for row in questions]
    ids = sampling.generate_replies(
        models.load_decoder(model, numerics), tokenizer, prompts, max_new_tokens=MAX_REPLY_TOKENS, temperature=0.0,
        seed=SEED, numerics=numerics,
    )  # fmt: skip
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [(text.strip(), bool(reply) and reply[-1] == tokenizer.eos_token_id)
            for text, reply in zip(texts, ids, strict=True)]  # fmt: skip


def overlap(reply: str, answer: str) -> float:
    """Return SQuAD's F1 of a reply: on lower-case words, without punctuation and articles."""

    def words(text: str) -> Counter[str]:
        plain = text.lower().translate(str.maketrans("", "", string.punctuation))
        return Counter(word for word in plain.split() if word not in ARTICLES)

    reply_words, answer_words = words(reply), words(answer)
    return 2 * (reply_words & answer_words).total() / max(1, reply_words.total() + answer_words.total())


def score_replies(replies: list[tuple[str, bool]], answers: list[str]) -> dict[str, float]:
    """Return the mean F1, and the shares of replies that name a site, name the right one, and end."""
    sites = [text.partition(SOURCE_MARK)[2].strip() for text, _ in replies]
    right = [site == answer.partition(SOURCE_MARK)[2].strip() for site, answer in zip(sites, answers, strict=True)]
    overlaps = [
        overlap(text.partition(SOURCE_MARK)[0], answer.partition(SOURCE_MARK)[0])
        for (text, _), answer in zip(replies, answers, strict=True)
    ]
    count = len(answers)
    return {
        "overlap": sum(overlaps) / count, "named": sum(map(bool, sites)) / count, "right": sum(right) / count,
        "ended": sum(ended for _, ended in replies) / count,
    }  # fmt: skip


def main() -> None:
    """Evaluate both models and write the figures."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    numerics = Numerics.model_validate(request["numerics"])
    torch_setup.prepare_torch(numerics, SEED)
    rows = tables.read(Path("data/validate/instructions"), "heldout").to_pylist()
    questions = sorted(rows, key=lambda row: str(row["id"]))[: request["asked"]]
    answers = [row["messages"][-1]["content"] for row in questions]
    found: dict[str, Any] = {}
    example = [f"Asked: {questions[0]['messages'][-2]['content']}", f"Reference answer: {answers[0]}"]
    for name, path in MODELS.items():
        replies = ask(path, questions, numerics)
        found[name] = score_replies(replies, answers)
        example.append(f"The {name} model: {replies[0][0]}")
    write_json(Path("asked.json"), {**found, "example": example})


if __name__ == "__main__":
    main()
