"""Reads conversations of the instructions table for training, and rejects rows that cannot be used, with a reason.

A conversation longer than the context is rejected (`reject`) or shortened (`truncate`). Shortening drops the earliest
turns up to the next question and keeps the system message. If the last question and answer alone are too long, the
answer is truncated and has no end token. Every row that is rejected or shortened is listed with its reason.
"""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.common.harness.job import StageError
from tasks.common.text import chat
from tasks.common.text.chat import Message
from tasks.finetune.packing import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = Mapping[str, Any]
EncodedConversation = tuple[str, Encoded]  # a row's id, and its token ids with their loss mask
TooLong = Literal["reject", "truncate"]
PREVIEW_CHARACTERS = 80


@dataclass(frozen=True)
class Rejected:
    """A row that is rejected, or used only in part."""

    id: str
    split: str
    reason: str  # too_long | empty_answer | no_answer | control_token | no_number | unseen_label
    used: bool  # true if the row is shortened, false if it is rejected
    detail: str
    source: str
    begins: str  # the beginning of its first question

    @classmethod
    def of(cls, row: Row, reason: str, detail: str, *, used: bool = False) -> "Rejected":
        """Return the record of a row of the instructions table."""
        question = next((turn["content"] for turn in row["messages"] if turn["role"] == "user"), "")
        begins = " ".join(question.split())[:PREVIEW_CHARACTERS]
        return cls(row["id"], row["split"], reason, used, detail, row["source"], begins)


@dataclass(frozen=True)
class Reader:
    """Encodes rows of the instructions table as conversations, and rejects the others."""

    tokenizer: "PreTrainedTokenizerFast"
    max_length: int
    too_long: TooLong
    answers: Literal["all", "last"]

    def read(self, rows: Iterable[Row]) -> tuple[list[EncodedConversation], list[Rejected]]:
        """Return the encoded conversations in the table's order, and the rejected and shortened rows."""
        usable: list[EncodedConversation] = []
        rejected: list[Rejected] = []
        controls = chat.control_tokens(self.tokenizer)
        for row in rows:
            encoded, rejection = None, find_missing_answer(row) or find_control_token(row, controls)
            if not rejection:
                encoded, rejection = fit_to_context(row, row["messages"], self._encode, self.max_length, self.too_long)
            usable += [(row["id"], encoded)] if encoded else []
            rejected += [rejection] if rejection else []
        return usable, rejected

    def _encode(self, messages: Sequence[Message]) -> Encoded:
        ids, answers = chat.encode_chat(self.tokenizer, messages)
        return ids, keep_last_answer(answers) if self.answers == "last" else answers


def fit_to_context(
    row: Row, messages: Sequence[Message], encode: Callable[[Sequence[Message]], Encoded], max_length: int,
    too_long: TooLong,
) -> tuple[Encoded | None, Rejected | None]:  # fmt: skip
    """Return a row's messages encoded within `max_length` tokens, and the record if it was rejected or shortened.

    The encoding is None if the row is rejected; the record is None if the row fits unchanged.
    """
    full = encode(messages)
    tokens = len(full[0])
    if tokens <= max_length:
        return full, None
    if too_long == "reject":
        return None, Rejected.of(row, "too_long", f"{tokens} tokens")
    shorter, dropped = shorten(messages, lambda part: len(encode(part)[0]), max_length)
    ids, loss_mask = encode(shorter)
    detail = f"{tokens} tokens; removed: {dropped} earlier turns, the last {max(0, len(ids) - max_length)} tokens"
    used = any(loss_mask[:max_length])
    if not used:
        detail += ", which leaves nothing of an answer"
    encoded = (ids[:max_length], loss_mask[:max_length]) if used else None
    return encoded, Rejected.of(row, "too_long", detail, used=used)


def find_missing_answer(row: Row) -> Rejected | None:
    """Return the rejection of a row without an answer or with an empty one, else None."""
    replies = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    if not replies:
        return Rejected.of(row, "no_answer", f"{len(row['messages'])} turns")
    empty = [str(number) for number, reply in enumerate(replies, 1) if not reply.strip()]
    if empty:
        return Rejected.of(row, "empty_answer", f"answer {', '.join(empty)} of {len(replies)}")
    return None


def find_control_token(row: Row, controls: Sequence[str]) -> Rejected | None:
    """Return the rejection of a row whose text spells a control token and would be encoded as one, else None."""
    contents = [message["content"] for message in row["messages"]]
    found = [control for control in controls if any(control in content for content in contents)]
    return Rejected.of(row, "control_token", f"spells {', '.join(found)}") if found else None


def keep_last_answer(answers: Sequence[bool]) -> list[bool]:
    """Return the mask with only its last run of true values: a conversation's last answer."""
    end = max((index + 1 for index, flag in enumerate(answers) if flag), default=0)
    start = end
    while start and answers[start - 1]:
        start -= 1
    return [start <= index < end for index in range(len(answers))]


def shorten(
    messages: Sequence[Message], measure: Callable[[Sequence[Message]], int], max_length: int
) -> tuple[list[Message], int]:
    """Return a conversation without the fewest earliest turns such that it fits, and the number of dropped turns.

    The result starts with the system message, if any, and a user turn; it keeps at least the last user turn. It may
    still be too long.
    """
    first = int(messages[0]["role"] == "system")
    starts = [first, *(index for index, turn in enumerate(messages) if index > first and turn["role"] == "user")]

    def from_turn(start: int) -> list[Message]:
        return [*messages[:first], *messages[start:]]

    # Tokens decrease with dropped turns, so a binary search encodes the conversation a few times, not once per turn.
    found = bisect_left(starts, True, key=lambda start: measure(from_turn(start)) <= max_length)
    start = starts[min(found, len(starts) - 1)]
    return from_turn(start), start - first


def no_rows_error(count: int, rejected: Sequence[Rejected], max_length: int) -> StageError:
    """Return the error for a table without a usable row: the number of rows, the reasons, and the first row."""
    reasons = format_counts(count_reasons(rejected)) or "it is empty"
    first = "".join(f" {row.id} ({row.detail})" for row in rejected[:1])
    return StageError(
        f"none of the {count} training conversations can be used ({reasons}).{' The first is' if first else ''}{first}."
        f" The limit is {max_length} tokens (max_tokens, or the model's context). "
        "docs/guides/fine-tuning.md explains the reasons."
    )


def count_reasons(rejected: Iterable[Rejected]) -> dict[str, int]:
    """Return the number of rows per reason; rows that are used in part count as shortened."""
    return dict(sorted(Counter(row.reason if not row.used else "shortened" for row in rejected).items()))


def format_counts(counts: Mapping[str, int]) -> str:
    """Return counts as text: "3 too_long, 1 empty_answer"."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def write_rejected(rejected: Iterable[Rejected], path: Path) -> None:
    """Write the rejected and shortened rows as JSON lines."""

    def lines() -> Iterator[str]:
        for row in rejected:
            yield json.dumps(asdict(row), ensure_ascii=False) + "\n"

    path.write_text("".join(lines()), encoding="utf-8")
