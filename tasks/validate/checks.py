"""Checks of single rows: each is rejected with a reason, or kept. The suites (`suites.py`) validate the kept rows.

Each row is reduced to the few scalars that the checks and the suites need (its features). Nested columns never reach
Great Expectations, because it hashes the whole frame on every validation.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import Field

from tasks.common.reward.ratings import mean_score
from tasks.common.settings import Settings

Row = Mapping[str, Any]
Features = dict[str, Any]

SPLITS = ("train", "heldout")
ROLES = ("system", "user", "assistant")
TURNS_PATTERN = r"^(?:system )?(?:user assistant )*user assistant$"
# U+FFFD, control characters (page breaks are none), and UTF-8 that was read as Latin-1 or Windows-1252 ("Ã©", "â€™").
# U+FEFF is a zero-width space within a text, and pages have it. Capitals may be before a no-break space ("XÃ HỘI").
DAMAGE_PATTERN = "[\ufffd\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]|(?<![A-ZÀ-Þ])[ÂÃ][\u00a0-\u00bf]|â€|ï»¿"
CHARACTERS_PER_DAMAGE = 1000  # a text with more damage is rejected; one broken sign does not cost a book
DUPLICATE_ROW_REASON = "duplicate of an earlier row"


class MinRows(Settings):
    """Minimum number of rows that each table must keep."""

    corpus: int = Field(default=0, description="Minimum number of documents that must be kept", ge=0)
    instructions: int = Field(default=0, description="Minimum number of chats that must be kept", ge=0)
    rankings: int = Field(default=0, description="Minimum number of rankings that must be kept", ge=0)


class Limits(Settings):
    """Limits on rows and tables."""

    max_text_characters: int | None = Field(
        default=None, description="Maximum characters of a document; null sets no limit", ge=1
    )
    max_message_characters: int | None = Field(
        default=None,
        description="Maximum characters of a message or response; null sets none: the stages that encode a "
        "conversation apply their model's context",
        ge=1,
    )
    max_rejected_share: float = Field(
        default=0.2,
        description="Maximum share of a table's rows that may be invalid; what curation rejects does not count",
        ge=0,
        le=1,
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
    opening = next((message.get("content") for message in messages if message.get("role") == "user"), None)
    return {
        **{column: row[column] for column in ("id", "source", "entity", "split")},
        "text": "\n".join(contents),
        "turns": " ".join(str(message.get("role")) for message in messages),
        "shortest": min(map(len, map(str.strip, contents)), default=0),
        "longest": max(map(len, contents), default=0),
        "answer_given": row["answer"] is None or (bool(row["answer"]) and row["answer"] in reply),
        "heldout_question": contents[-2] if row["split"] == "heldout" and len(contents) > 1 else None,
        "content_key": "\n".join(" ".join(text.split()) for text in contents),
        # Without an entity of its own a row has its opening ("Hello!"), which may begin conversations of both splits.
        "split_keys": () if row["entity"] == opening else (digest(row["entity"] or ""),),
    }


def rankings_features(row: Row) -> Features:
    """Return the features of a ranking."""
    prompt = [message or {} for message in row["prompt"] or []]
    responses = [response or "" for response in row["responses"] or []]
    normalized = [" ".join(response.split()) for response in responses]
    turns = [message.get("content") or "" for message in prompt]
    prompt_text = "\n".join(turns)
    judged = zip(normalized, _canonical_judgements(row), strict=False)
    fit = check_judgements(row, len(responses))
    return {
        **{column: row[column] for column in ("id", "source", "split")},
        "text": "\n".join([prompt_text, *responses]),
        "turns": " ".join([*(str(message.get("role")) for message in prompt), "assistant"]),
        "responses": len(responses),
        "repeated": len(normalized) - len(set(normalized)),
        "shortest": min((len(text.strip()) for text in turns), default=0),
        "longest": max(map(len, (*responses, *turns)), default=0),
        "fit": fit,
        "best_empty": fit == "fits" and is_best_empty(row, normalized),
        # The same judgement of one person twice is a duplicate; one of another person, or another one, is not.
        "content_key": "\n".join([row.get("annotator") or "", prompt_text, *sorted(map(repr, judged))]),
        # A prompt may be in both splits with different responses ("Write a sentence."), as may a response.
        "split_keys": tuple(digest(f"{prompt_text}\x00{response}") for response in normalized),
    }


def is_best_empty(row: Row, responses: Sequence[str]) -> bool:
    """Return whether an empty response is best, alone or with others; a worse one may be empty."""
    if row["ranks"] is not None:
        utilities = [-float(rank) for rank in row["ranks"]]
    else:
        utilities = [mean_score(ratings) for ratings in row["scores"]]
    best = max(utilities)
    return any(utility == best and not text for utility, text in zip(utilities, responses, strict=True))


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
    fault = None if table == "corpus" else find_turn_fault(table, features["turns"].split())
    if fault:
        return fault
    empty = [column for column in REQUIRED_COLUMNS[table] if not (features[column] or "").strip()]
    if empty:
        return f"{empty[0]} is empty"
    if features["split"] not in SPLITS:
        return "the split is neither train nor heldout"
    if is_damaged(features["text"]):
        return "damaged encoding"
    table_reason = {
        "corpus": _corpus_rejection_reason,
        "instructions": _chat_rejection_reason,
        "rankings": _ranking_rejection_reason,
    }
    return table_reason[table](features, limits)


def is_damaged(text: str) -> bool:
    """Return whether a text has more than one damaged place in `CHARACTERS_PER_DAMAGE` characters."""
    return len(re.findall(DAMAGE_PATTERN, text)) * CHARACTERS_PER_DAMAGE > len(text)


def find_turn_fault(table: str, roles: Sequence[str]) -> str | None:
    """Return what is wrong with the order of a conversation's roles, or None.

    Expected: a system message (if any), then user and assistant in turn, the assistant last. A ranking's responses
    stand for the last message.
    """
    whole = "the conversation" if table == "instructions" else "the prompt"
    other = next((role for role in roles if role not in ROLES), None)
    if other is not None:
        return f"a message of the role {other}; expected {', '.join(ROLES)}"
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "system" in turns:
        return "a system message that is not the first message"
    if "user" not in turns:
        return f"{whole} has no message of the user"
    if turns[0] == "assistant":
        return f"{whole} begins with a message of the assistant; expected the user's"
    if table == "rankings" and turns[-2:-1] == ["assistant"]:
        return "the prompt ends with a message of the assistant; expected the user's"
    twice = next((role for role, following in pairwise(turns) if role == following), None)
    if twice:
        return f"two messages of the {twice} in a row; expected user and assistant in turn"
    return "the conversation has no answer" if turns[-1] == "user" else None


def _corpus_rejection_reason(features: Features, limits: Limits) -> str | None:
    if _exceeds(len(features["text"]), limits.max_text_characters):
        return f"longer than {limits.max_text_characters} characters"
    if not any(character.isalnum() for character in features["text"]):
        return "no letter and no digit in the text"
    return "a name that is not in the text" if features["absent_names"] else None


def _chat_rejection_reason(features: Features, limits: Limits) -> str | None:
    if not features["shortest"]:
        return "an empty message"
    if _exceeds(features["longest"], limits.max_message_characters):
        return f"a message longer than {limits.max_message_characters} characters"
    return None if features["answer_given"] else "the reply does not hold the answer"


def _ranking_rejection_reason(features: Features, limits: Limits) -> str | None:
    if features["responses"] - features["repeated"] < 2:
        return "fewer than two distinct responses"
    if features["repeated"]:
        return "two of the responses are the same text"
    if not features["shortest"]:
        return "an empty message in the prompt"
    if _exceeds(features["longest"], limits.max_message_characters):
        return f"a message or a response longer than {limits.max_message_characters} characters"
    if features["fit"] != "fits":
        return str(features["fit"])
    return "an empty response is ranked best" if features["best_empty"] else None


def _exceeds(characters: int, limit: int | None) -> bool:
    return limit is not None and characters > limit


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
            reason = DUPLICATE_ROW_REASON
        if reason is None:
            seen.add(key)
        found.append({**features, "content_key": key.hex(), **_text_features(features["text"])})
        reasons.append(reason)
    return found, reasons


def _text_features(text: str) -> Features:
    """Return the scalars that the suites need of a text, so that they do not need the text itself."""
    return {"characters": len(text), "damaged": is_damaged(text)}


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
