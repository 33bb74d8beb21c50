"""Exact match: extract the short answer of a reply by templates, strictly.

The templates come from the instruction table: in every reply whose short answer is known, the entity and the answer are
replaced by slots. A model's reply is matched against the templates with its entity filled in. A reply that matches no
template, or that gives two different answers, has no answer: containing the right word somewhere is not enough.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

ENTITY_SLOT, ANSWER_SLOT = "\x00", "\x01"
# What matches the answer's slot: no end of sentence, except in abbreviations, initials and names like ".fr".
ANSWER_PATTERN = r"(?P<answer>(?:\bSt\.|\b[A-Z]\.|\.(?=\w)|[^.!?])+?)"


@dataclass(frozen=True)
class Extractor:
    """Templates of sentences that contain their entity, and of whole replies that do not."""

    sentences: tuple[str, ...]
    replies: tuple[str, ...]

    @classmethod
    def learn(cls, rows: Iterable[Mapping[str, Any]]) -> "Extractor":
        """Collect the templates of rows of the instruction table; rows without a short answer are skipped."""
        sentences, replies = set(), set()
        for row in rows:
            entity, answer = row["entity"], row["answer"]
            if not answer or answer in entity or entity in answer:
                continue
            marked = _insert_slot(row["messages"][-1]["content"].replace(entity, ENTITY_SLOT), answer)
            for sentence in re.split(r"(?<=[.!?]) ", marked):
                if ANSWER_SLOT in sentence and ENTITY_SLOT in sentence:
                    sentences.add(sentence)
                elif ANSWER_SLOT in sentence:
                    replies.add(marked)
        return cls(*(tuple(sorted(group, key=lambda text: (-len(text), text))) for group in (sentences, replies)))

    def extract(self, reply: str, entity: str) -> str | None:
        """Return the only answer in a reply about an entity, else None; longer templates take precedence."""
        marked = reply.strip().replace(entity, ENTITY_SLOT)
        found: dict[str, str] = {}
        taken: list[tuple[int, int]] = []
        for template in self.sentences:
            for match in _pattern(template, whole=False).finditer(marked):
                if not any(start < match.end() and match.start() < end for start, end in taken):
                    taken.append(match.span())
                    found[normalize(match["answer"])] = match["answer"]
        if not found:
            matches = (_pattern(template, whole=True).fullmatch(marked) for template in self.replies)
            found = {normalize(match["answer"]): match["answer"] for match in list(filter(None, matches))[:1]}
        return next(iter(found.values())).replace(ENTITY_SLOT, entity).strip() if len(found) == 1 else None


def _insert_slot(text: str, answer: str) -> str:
    return re.sub(rf"(?<!\w){re.escape(answer)}(?!\w)", ANSWER_SLOT, text)


@cache
def _pattern(template: str, whole: bool) -> re.Pattern[str]:
    before, _, after = template.partition(ANSWER_SLOT)
    core = f"{re.escape(before)}{ANSWER_PATTERN}{re.escape(after).replace(ANSWER_SLOT, '(?P=answer)')}"
    return re.compile(core if whole else rf"(?:^|(?<=[.!?] )){core}(?=$|(?<=[.!?]) )")


def normalize(answer: str) -> str:
    """Return an answer without case, repeated spaces and final full stops ("Washington, D.C."), for comparison."""
    return " ".join(answer.casefold().split()).rstrip(". ")


def exact_match(answer: str | None, expected: str) -> bool:
    """Return whether an extracted answer equals the expected one after normalization."""
    return answer is not None and normalize(answer) == normalize(expected)
