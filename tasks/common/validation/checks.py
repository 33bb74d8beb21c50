"""Checks of single rows: what can be refused alone, and why. The suites (`suites.py`) judge what is left.

Each row is reduced to the few scalars that the checks and the suites need (its features); a nested column never
reaches Great Expectations, which hashes the whole frame on every validation.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field

from tasks.common.settings import Settings

Row = Mapping[str, Any]
Features = dict[str, Any]

SPLITS = ("train", "heldout")
TURNS = r"^(?:system )?(?:user assistant )*user assistant$"
# U+FFFD, the byte-order mark, control characters, and UTF-8 that was read as Latin-1 or Windows-1252 ("Ã©", "â€™").
DAMAGE = "[\ufffd\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|[ÂÃ][\u00a0-\u00bf]|â€|ï»¿"

# What the chat template is made of (`chat.SPECIAL_TOKENS`, which a test compares): text that spells one would open or
# close a turn in training, and the served engine refuses it.
CONTROL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "[MASK]", "<|system|>", "<|user|>", "<|assistant|>")


class Rows(Settings):
    """Fewest rows of each table."""

    corpus: int = Field(description="Fewest documents after refusing", ge=1)
    instructions: int = Field(description="Fewest chats after refusing", ge=1)
    rankings: int = Field(description="Fewest rankings after refusing", ge=1)


class Limits(Settings):
    """What rows and tables are held to."""

    text_characters: int = Field(description="Characters of the longest document", ge=1)
    message_characters: int = Field(description="Characters of the longest message or response", ge=1)
    refused_share: float = Field(description="Largest share of a table's rows that may be refused", ge=0, le=1)
    rows: Rows
    heldout_questions: int = Field(description="Fewest different questions about held-out entities", ge=0)


def corpus_features(row: Row) -> Features:
    """Reduce a document."""
    text = row["text"] or ""
    return {
        **{column: row[column] for column in ("id", "source", "licence", "split")},
        "text": text,
        "absent_names": sum(name not in text for name in row["names"] or []),
        "same": " ".join(text.split()),
    }


def instructions_features(row: Row) -> Features:
    """Reduce a chat."""
    messages = [message or {} for message in row["messages"] or []]
    contents = [message.get("content") or "" for message in messages]
    reply = contents[-1] if contents else ""
    return {
        **{column: row[column] for column in ("id", "source", "entity", "split")},
        "text": "\n".join(contents),
        "turns": " ".join(str(message.get("role")) for message in messages),
        "shortest": min(map(len, map(str.strip, contents)), default=0),
        "longest": max(map(len, contents), default=0),
        "answer_given": row["answer"] is None or (bool(row["answer"]) and row["answer"] in reply),
        "heldout_question": contents[-2] if row["split"] == "heldout" and len(contents) > 1 else None,
        "same": "\n".join(" ".join(text.split()) for text in contents),
        "pairs": (digest(row["entity"] or ""),),
    }


def rankings_features(row: Row) -> Features:
    """Reduce a ranking."""
    prompt = [message or {} for message in row["prompt"] or []]
    responses = [response or "" for response in row["responses"] or []]
    plain = [" ".join(response.split()) for response in responses]
    turns = [message.get("content") or "" for message in prompt]
    asked = "\n".join(turns)
    return {
        **{column: row[column] for column in ("id", "source", "split")},
        "text": "\n".join([asked, *responses]),
        "turns": " ".join([*(str(message.get("role")) for message in prompt), "assistant"]),
        "responses": len(responses),
        "repeated": len(plain) - len(set(plain)),
        "shortest": min(len(text.strip()) for text in (*plain, *turns)) if turns else 0,
        "longest": max(map(len, (*responses, *turns)), default=0),
        "fit": judgement_fit(row, len(responses)),
        # What one person said twice; the same responses judged by another, or otherwise, are another ranking.
        "same": "\n".join(
            [row.get("annotator") or "", asked, *sorted(map(repr, zip(plain, _worth(row), strict=False)))]
        ),
        # A prompt may stand on both sides only with other responses ("Write a sentence."), a response likewise.
        "pairs": tuple(digest(f"{asked}\x00{response}") for response in plain),
    }


def _worth(row: Row) -> list[Any]:
    """Return what each response was judged to be: its rank, counted without gaps after ties, or its scores."""
    ranks = row["ranks"]
    if ranks is None:
        return list(row["scores"] or [])
    order = sorted({rank for rank in ranks if rank is not None})
    return [None if rank is None else order.index(rank) for rank in ranks]


def judgement_fit(row: Row, responses: int) -> str:
    """Return `fits`, or what is wrong with a ranking's ranks or scores."""
    ranks, scores, scale = row["ranks"], row["scores"], row["scale"]
    if (ranks is None) == (scores is None):
        return "exactly one of ranks and scores must be given"
    if ranks is not None:
        if len(ranks) != responses:
            return "the number of ranks is not the number of responses"
        fits = all(rank is not None and 1 <= rank <= responses for rank in ranks) and min(ranks, default=0) == 1
        return "fits" if fits else "ranks do not run from 1 to the number of responses"
    if len(scores) != responses:
        return "the number of score lists is not the number of responses"
    if scale is None or len(scale) != 2 or not scale[0] < scale[1]:
        return "scores without a scale of two rising ends"
    if not all(scores):
        return "a response without any score"
    inside = all(score is not None and scale[0] <= score <= scale[1] for given in scores for score in given)
    return "fits" if inside else "a score outside the scale"


FEATURES: dict[str, Callable[[Row], Features]] = {
    "corpus": corpus_features,
    "instructions": instructions_features,
    "rankings": rankings_features,
}
FILLED = {
    "corpus": ("id", "text", "source", "licence"),
    "instructions": ("id", "text", "source", "entity"),
    "rankings": ("id", "text", "source"),
}


def objection(table: str, features: Features, limits: Limits) -> str | None:
    """Return why a row is refused, or None."""
    empty = [column for column in FILLED[table] if not (features[column] or "").strip()]
    if empty:
        return f"{empty[0]} is empty"
    if features["split"] not in SPLITS:
        return "the split is neither train nor heldout"
    if re.search(DAMAGE, features["text"]):
        return "damaged encoding"
    spelt = next((token for token in CONTROL_TOKENS if token in features["text"]), None)
    if spelt:
        return f"the text holds {spelt}, which is reserved for the chat template"
    own = {"corpus": _corpus_objection, "instructions": _chat_objection, "rankings": _ranking_objection}
    return own[table](features, limits)


def _corpus_objection(features: Features, limits: Limits) -> str | None:
    if len(features["text"]) > limits.text_characters:
        return f"longer than {limits.text_characters} characters"
    if not any(sign.isalnum() for sign in features["text"]):
        return "no letter and no digit in the text"
    return "a name that is not in the text" if features["absent_names"] else None


def _chat_objection(features: Features, limits: Limits) -> str | None:
    if not re.match(TURNS, features["turns"]):
        return "turns are not: system (if any), then user and assistant in turn, the assistant last"
    if not features["shortest"]:
        return "an empty message"
    if features["longest"] > limits.message_characters:
        return f"a message longer than {limits.message_characters} characters"
    return None if features["answer_given"] else "the reply does not hold the answer"


def _ranking_objection(features: Features, limits: Limits) -> str | None:
    if not re.match(TURNS, features["turns"]):
        return "the prompt is not: system (if any), then user and assistant in turn, the user last"
    if features["responses"] - features["repeated"] < 2:
        return "fewer than two distinct responses"
    if features["repeated"]:
        return "two of the responses are the same text"
    if not features["shortest"]:
        return "an empty message or response"
    if features["longest"] > limits.message_characters:
        return f"a message or a response longer than {limits.message_characters} characters"
    return None if features["fit"] == "fits" else str(features["fit"])


def judge(table: str, rows: Iterable[Row], limits: Limits, seen: set[bytes]) -> tuple[list[Features], list[str | None]]:
    """Return the features of every row and the reason against each (None for a row that is kept).

    A table may come in several parts; `seen` goes from one to the next and holds what their rows say, as digests.
    """
    found: list[Features] = []
    reasons: list[str | None] = []
    for row in rows:
        features = FEATURES[table](row)
        reason = objection(table, features, limits)
        same = digest(features["same"])
        if reason is None and same in seen:
            reason = "the same content came before"
        if reason is None:
            seen.add(same)
        found.append({**features, "same": same.hex(), **_measured(features["text"])})
        reasons.append(reason)
    return found, reasons


def _measured(text: str) -> Features:
    """Return what the suites ask of a text, so that they need not see all of it."""
    return {"characters": len(text), "damaged": bool(re.search(DAMAGE, text))}


def digest(text: str) -> bytes:
    """Return 16 bytes that stand for a text, so that it need not be kept."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def sides(pairs: Sequence[Iterable[bytes]], splits: Sequence[str]) -> list[int]:
    """Return on how many sides of the split each row's entity (or its prompt with a response) stands: 1 is right."""
    stands: dict[bytes, set[str]] = defaultdict(set)
    for own, split in zip(pairs, splits, strict=True):
        for pair in own:
            stands[pair].add(split)
    return [max((len(stands[pair]) for pair in own), default=1) for own in pairs]
