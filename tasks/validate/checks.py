"""Checks of single rows: each is rejected with a reason, or kept. The suites (`suites.py`) validate the kept rows.

Each row is reduced to the few scalars that the checks and the suites need (its features). Nested columns never reach
Great Expectations, because it hashes the whole frame on every validation.
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
TURNS_PATTERN = r"^(?:system )?(?:user assistant )*user assistant$"
# U+FFFD, the byte-order mark, control characters, and UTF-8 that was read as Latin-1 or Windows-1252 ("Ã©", "â€™").
DAMAGE_PATTERN = "[\ufffd\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|[ÂÃ][\u00a0-\u00bf]|â€|ï»¿"

# The special tokens of the chat template (`chat.SPECIAL_TOKENS`; a test compares them). A text that contains one would
# open or close a turn in training, and the served engine rejects it.
CONTROL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "[MASK]", "<|system|>", "<|user|>", "<|assistant|>")


class MinRows(Settings):
    """Minimum number of rows that each table must keep."""

    corpus: int = Field(default=0, description="Minimum number of documents that must be kept", ge=0)
    instructions: int = Field(default=0, description="Minimum number of chats that must be kept", ge=0)
    rankings: int = Field(default=0, description="Minimum number of rankings that must be kept", ge=0)


class Limits(Settings):
    """Limits on rows and tables."""

    max_text_characters: int = Field(default=1_000_000, description="Maximum characters of a document", ge=1)
    max_message_characters: int = Field(
        default=100_000, description="Maximum characters of a message or response", ge=1
    )
    max_rejected_share: float = Field(
        default=0.05, description="Maximum share of a table's rows that may be rejected", ge=0, le=1
    )
    min_rows: MinRows = MinRows()
    min_heldout_questions: int = Field(
        default=0, description="Minimum number of different questions about held-out entities", ge=0
    )


def corpus_features(row: Row) -> Features:
    """Return the features of a document."""
    text = row["text"] or ""
    return {
        **{column: row[column] for column in ("id", "source", "licence", "split")},
        "text": text,
        "absent_names": sum(name not in text for name in row["names"] or []),
        "content_key": " ".join(text.split()),
    }


def instructions_features(row: Row) -> Features:
    """Return the features of a chat."""
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
        "content_key": "\n".join(" ".join(text.split()) for text in contents),
        "split_keys": (digest(row["entity"] or ""),),
    }


def rankings_features(row: Row) -> Features:
    """Return the features of a ranking."""
    prompt = [message or {} for message in row["prompt"] or []]
    responses = [response or "" for response in row["responses"] or []]
    normalized = [" ".join(response.split()) for response in responses]
    turns = [message.get("content") or "" for message in prompt]
    prompt_text = "\n".join(turns)
    judged = zip(normalized, _canonical_judgements(row), strict=False)
    return {
        **{column: row[column] for column in ("id", "source", "split")},
        "text": "\n".join([prompt_text, *responses]),
        "turns": " ".join([*(str(message.get("role")) for message in prompt), "assistant"]),
        "responses": len(responses),
        "repeated": len(normalized) - len(set(normalized)),
        "shortest": min(len(text.strip()) for text in (*normalized, *turns)) if turns else 0,
        "longest": max(map(len, (*responses, *turns)), default=0),
        "fit": check_judgements(row, len(responses)),
        # The same judgement of one person twice is a duplicate; one of another person, or another one, is not.
        "content_key": "\n".join([row.get("annotator") or "", prompt_text, *sorted(map(repr, judged))]),
        # A prompt may be in both splits with different responses ("Write a sentence."), as may a response.
        "split_keys": tuple(digest(f"{prompt_text}\x00{response}") for response in normalized),
    }


def _canonical_judgements(row: Row) -> list[Any]:
    """Return the judgement of each response: its dense rank (no gaps after ties), or its scores."""
    ranks = row["ranks"]
    if ranks is None:
        return list(row["scores"] or [])
    order = sorted({rank for rank in ranks if rank is not None})
    return [None if rank is None else order.index(rank) for rank in ranks]


def check_judgements(row: Row, responses: int) -> str:
    """Return `fits`, or what is wrong with the ranks or scores of a ranking."""
    ranks, scores, scale = row["ranks"], row["scores"], row["scale"]
    if (ranks is None) == (scores is None):
        return "exactly one of ranks and scores must be given"
    if ranks is not None:
        if len(ranks) != responses:
            return "the number of ranks is not the number of responses"
        valid = all(rank is not None and 1 <= rank <= responses for rank in ranks) and min(ranks, default=0) == 1
        return "fits" if valid else "ranks do not run from 1 to the number of responses"
    if len(scores) != responses:
        return "the number of score lists is not the number of responses"
    if scale is None or len(scale) != 2 or not scale[0] < scale[1]:
        return "scores without a scale of two rising ends"
    if not all(scores):
        return "a response without any score"
    inside = all(score is not None and scale[0] <= score <= scale[1] for ratings in scores for score in ratings)
    return "fits" if inside else "a score outside the scale"


FEATURES: dict[str, Callable[[Row], Features]] = {
    "corpus": corpus_features,
    "instructions": instructions_features,
    "rankings": rankings_features,
}
REQUIRED_COLUMNS = {
    "corpus": ("id", "text", "source", "licence"),
    "instructions": ("id", "text", "source", "entity"),
    "rankings": ("id", "text", "source"),
}


def rejection_reason(table: str, features: Features, limits: Limits) -> str | None:
    """Return why a row is rejected, or None."""
    empty = [column for column in REQUIRED_COLUMNS[table] if not (features[column] or "").strip()]
    if empty:
        return f"{empty[0]} is empty"
    if features["split"] not in SPLITS:
        return "the split is neither train nor heldout"
    if re.search(DAMAGE_PATTERN, features["text"]):
        return "damaged encoding"
    token = next((token for token in CONTROL_TOKENS if token in features["text"]), None)
    if token:
        return f"the text contains {token}, which is reserved for the chat template"
    table_reason = {
        "corpus": _corpus_rejection_reason,
        "instructions": _chat_rejection_reason,
        "rankings": _ranking_rejection_reason,
    }
    return table_reason[table](features, limits)


def _corpus_rejection_reason(features: Features, limits: Limits) -> str | None:
    if len(features["text"]) > limits.max_text_characters:
        return f"longer than {limits.max_text_characters} characters"
    if not any(character.isalnum() for character in features["text"]):
        return "no letter and no digit in the text"
    return "a name that is not in the text" if features["absent_names"] else None


def _chat_rejection_reason(features: Features, limits: Limits) -> str | None:
    if not re.match(TURNS_PATTERN, features["turns"]):
        return "turns are not: system (if any), then user and assistant in turn, the assistant last"
    if not features["shortest"]:
        return "an empty message"
    if features["longest"] > limits.max_message_characters:
        return f"a message longer than {limits.max_message_characters} characters"
    return None if features["answer_given"] else "the reply does not hold the answer"


def _ranking_rejection_reason(features: Features, limits: Limits) -> str | None:
    if not re.match(TURNS_PATTERN, features["turns"]):
        return "the prompt is not: system (if any), then user and assistant in turn, the user last"
    if features["responses"] - features["repeated"] < 2:
        return "fewer than two distinct responses"
    if features["repeated"]:
        return "two of the responses are the same text"
    if not features["shortest"]:
        return "an empty message or response"
    if features["longest"] > limits.max_message_characters:
        return f"a message or a response longer than {limits.max_message_characters} characters"
    return None if features["fit"] == "fits" else str(features["fit"])


def check_rows(
    table: str, rows: Iterable[Row], limits: Limits, seen: set[bytes]
) -> tuple[list[Features], list[str | None]]:
    """Return the features of every row, and the rejection reason of each (None for a row that is kept).

    A table may be checked in batches: `seen` is passed from one to the next and holds the digests of their contents.
    """
    found: list[Features] = []
    reasons: list[str | None] = []
    for row in rows:
        features = FEATURES[table](row)
        reason = rejection_reason(table, features, limits)
        key = digest(features["content_key"])
        if reason is None and key in seen:
            reason = "duplicate of an earlier row"
        if reason is None:
            seen.add(key)
        found.append({**features, "content_key": key.hex(), **_text_features(features["text"])})
        reasons.append(reason)
    return found, reasons


def _text_features(text: str) -> Features:
    """Return the scalars that the suites need of a text, so that they do not need the text itself."""
    return {"characters": len(text), "damaged": bool(re.search(DAMAGE_PATTERN, text))}


def digest(text: str) -> bytes:
    """Return the 16-byte BLAKE2b digest of a text, which is kept in its place."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def count_splits(split_keys: Sequence[Iterable[bytes]], splits: Sequence[str]) -> list[int]:
    """Return in how many splits the keys of each row occur (its entity, or its prompt with a response); 1 is right."""
    found: dict[bytes, set[str]] = defaultdict(set)
    for keys, split in zip(split_keys, splits, strict=True):
        for key in keys:
            found[key].add(split)
    return [max((len(found[key]) for key in keys), default=1) for keys in split_keys]
