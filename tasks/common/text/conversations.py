"""Conversations of the instructions table, as a stage of training reads them: what fits, and what is kept aside.

A conversation longer than the context is left out (`refuse`) or shortened (`truncate`). It is shortened from the
front, whole turns at a time up to the next question, the system's words kept; where its last question and answer are
still too long, the answer loses its end, and with it the token that says that it ends there. Whatever does not go
into training as it stands in the table is listed with its reason.
"""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.common.stage import StageError
from tasks.common.text import chat
from tasks.common.text.chat import Message
from tasks.common.text.packing import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = Mapping[str, Any]
Named = tuple[str, Encoded]  # a row's id, and its tokens
TooLong = Literal["refuse", "truncate"]
BEGINS = 80  # characters


@dataclass(frozen=True)
class Aside:
    """A row that is not used as it stands."""

    id: str
    split: str
    reason: str  # too_long | empty_answer | no_answer | control_token | no_number | unseen_label
    used: bool  # whether what is left of it is used
    detail: str
    source: str
    begins: str  # the first words of its first question

    @classmethod
    def of(cls, row: Row, reason: str, detail: str, *, used: bool = False) -> "Aside":
        """Keep a row of the instructions table aside."""
        asked = next((turn["content"] for turn in row["messages"] if turn["role"] == "user"), "")
        begins = " ".join(asked.split())[:BEGINS]
        return cls(row["id"], row["split"], reason, used, detail, row["source"], begins)


@dataclass(frozen=True)
class Reader:
    """Reads rows of the instructions table as conversations to be learnt, and keeps the others aside."""

    tokenizer: "PreTrainedTokenizerFast"
    longest: int
    too_long: TooLong
    answers: Literal["all", "last"]

    def read(self, rows: Iterable[Row]) -> tuple[list[Named], list[Aside]]:
        """Return the conversations that can be learnt from, in the table's order, and what was kept aside."""
        kept: list[Named] = []
        aside: list[Aside] = []
        controls = controls_of(self.tokenizer)
        for row in rows:
            encoded, found = None, unanswered(row) or controlling(row, controls)
            if not found:
                encoded, found = fit(row, row["messages"], self._encode, self.longest, self.too_long)
            kept += [(row["id"], encoded)] if encoded else []
            aside += [found] if found else []
        return kept, aside

    def _encode(self, messages: Sequence[Message]) -> Encoded:
        ids, answers = chat.encode_chat(self.tokenizer, messages)
        return ids, last_only(answers) if self.answers == "last" else answers


def fit(
    row: Row, messages: Sequence[Message], encode: Callable[[Sequence[Message]], Encoded], longest: int,
    too_long: TooLong,
) -> tuple[Encoded | None, Aside | None]:  # fmt: skip
    """Return a row's messages, encoded, within `longest` tokens, and what had to be done for it.

    Of the two, None stands for a row that is not used and for one that is used as it stands.
    """
    whole = encode(messages)
    tokens = len(whole[0])
    if tokens <= longest:
        return whole, None
    if too_long == "refuse":
        return None, Aside.of(row, "too_long", f"{tokens} tokens")
    shorter, dropped = shorten(messages, lambda part: len(encode(part)[0]), longest)
    ids, asked = encode(shorter)
    detail = f"{tokens} tokens; cut: {dropped} earlier turns, the last {max(0, len(ids) - longest)} tokens"
    used = any(asked[:longest])
    if not used:
        detail += ", which leaves nothing of an answer"
    encoded = (ids[:longest], asked[:longest]) if used else None
    return encoded, Aside.of(row, "too_long", detail, used=used)


def unanswered(row: Row) -> Aside | None:
    """Return why nothing can be learnt from a row at all, or None."""
    replies = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    if not replies:
        return Aside.of(row, "no_answer", f"{len(row['messages'])} turns")
    empty = [str(place) for place, reply in enumerate(replies, 1) if not reply.strip()]
    if empty:
        return Aside.of(row, "empty_answer", f"answer {', '.join(empty)} of {len(replies)}")
    return None


def controls_of(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Return how a tokenizer's control tokens are spelt."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def controlling(row: Row, controls: Sequence[str]) -> Aside | None:
    """Return why a row would say more than its words: one spells a token that opens or closes turns; or None.

    `validate` refuses those of the chain's own template; a given model's tokenizer has others.
    """
    said = [message["content"] for message in row["messages"]]
    spelt = [control for control in controls if any(control in content for content in said)]
    return Aside.of(row, "control_token", f"spells {', '.join(spelt)}") if spelt else None


def last_only(answers: Sequence[bool]) -> list[bool]:
    """Return the mask with only its last run of true kept: of a conversation's answers the last."""
    end = max((place + 1 for place, asked in enumerate(answers) if asked), default=0)
    start = end
    while start and answers[start - 1]:
        start -= 1
    return [start <= place < end for place in range(len(answers))]


def shorten(
    messages: Sequence[Message], measure: Callable[[Sequence[Message]], int], longest: int
) -> tuple[list[Message], int]:
    """Return a conversation without as many of its earliest turns as is needed, and how many those are.

    What is left begins with the system's words, if any, and a question; at least the last question is left.
    """
    first = int(messages[0]["role"] == "system")
    starts = [first, *(place for place, turn in enumerate(messages) if place > first and turn["role"] == "user")]

    def from_turn(start: int) -> list[Message]:
        return [*messages[:first], *messages[start:]]

    # Fewer turns are fewer tokens, so the place is found by halves: a talk is encoded a few times, not once a turn.
    found = bisect_left(starts, True, key=lambda start: measure(from_turn(start)) <= longest)
    start = starts[min(found, len(starts) - 1)]
    return from_turn(start), start - first


def nothing_left(count: int, aside: Sequence[Aside], longest: int) -> StageError:
    """Return the error for a table of which no row can be learnt from: how many, why, and the first of them."""
    reasons = told(tally(aside)) or "it is empty"
    first = "".join(f" {row.id} ({row.detail})" for row in aside[:1])
    return StageError(
        f"none of the {count} conversations to train on is left ({reasons}).{' The first is' if first else ''}{first}. "
        f"No more than {longest} tokens are read (tokenize.context); docs/finetune.md says what each reason means."
    )


def tally(aside: Iterable[Aside]) -> dict[str, int]:
    """Return how many rows were kept aside for each reason; those that are still used in part count as shortened."""
    return dict(sorted(Counter(row.reason if not row.used else "shortened" for row in aside).items()))


def told(counts: Mapping[str, int]) -> str:
    """Return a tally in words: "3 too_long, 1 empty_answer"."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def write_aside(aside: Iterable[Aside], path: Path) -> None:
    """Write the rows kept aside as JSON lines."""

    def lines() -> Iterator[str]:
        for row in aside:
            yield json.dumps(asdict(row), ensure_ascii=False) + "\n"

    path.write_text("".join(lines()), encoding="utf-8")
