"""Exact match: telling the answer that a reply gives, strictly.

The wordings are learnt from the instruction table itself: in every reply whose short answer is known, the entity and
the answer are replaced by slots. A later reply is read against these templates with its own entity filled in. A reply
that fits none, or that gives two different answers, gives none: containing the right word somewhere is not enough.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

ENTITY, ANSWER = "\x00", "\x01"
# What may stand in the answer's slot: no end of sentence, save in abbreviations, initials and names like ".fr".
SLOT = r"(?P<answer>(?:\bSt\.|\b[A-Z]\.|\.(?=\w)|[^.!?])+?)"


@dataclass(frozen=True)
class Extractor:
    """Templates of sentences that name their entity, and of whole replies that do not."""

    sentences: tuple[str, ...]
    replies: tuple[str, ...]

    @classmethod
    def learn(cls, rows: Iterable[Mapping[str, Any]]) -> "Extractor":
        """Return the templates in rows of the instruction table; rows without a short answer teach nothing."""
        sentences, replies = set(), set()
        for row in rows:
            entity, answer = row["entity"], row["answer"]
            if not answer or answer in entity or entity in answer:
                continue
            marked = _slot(row["messages"][-1]["content"].replace(entity, ENTITY), answer)
            for sentence in re.split(r"(?<=[.!?]) ", marked):
                if ANSWER in sentence and ENTITY in sentence:
                    sentences.add(sentence)
                elif ANSWER in sentence:
                    replies.add(marked)
        return cls(*(tuple(sorted(group, key=lambda text: (-len(text), text))) for group in (sentences, replies)))

    def extract(self, reply: str, entity: str) -> str | None:
        """Return the one answer that a reply about an entity gives, or None; the longest template is heard first."""
        marked = reply.strip().replace(entity, ENTITY)
        found: dict[str, str] = {}
        taken: list[tuple[int, int]] = []
        for template in self.sentences:
            for match in _pattern(template, whole=False).finditer(marked):
                if not any(start < match.end() and match.start() < end for start, end in taken):
                    taken.append(match.span())
                    found[normalise(match["answer"])] = match["answer"]
        if not found:
            matches = (_pattern(template, whole=True).fullmatch(marked) for template in self.replies)
            found = {normalise(match["answer"]): match["answer"] for match in list(filter(None, matches))[:1]}
        return next(iter(found.values())).replace(ENTITY, entity).strip() if len(found) == 1 else None


def _slot(text: str, answer: str) -> str:
    return re.sub(rf"(?<!\w){re.escape(answer)}(?!\w)", ANSWER, text)


@cache
def _pattern(template: str, whole: bool) -> re.Pattern[str]:
    before, _, after = template.partition(ANSWER)
    core = f"{re.escape(before)}{SLOT}{re.escape(after).replace(ANSWER, '(?P=answer)')}"
    return re.compile(core if whole else rf"(?:^|(?<=[.!?] )){core}(?=$|(?<=[.!?]) )")


def normalise(answer: str) -> str:
    """Return an answer as it is compared: case, runs of blanks and last full stops aside ("Washington, D.C.")."""
    return " ".join(answer.casefold().split()).rstrip(". ")


def exact_match(given: str | None, wanted: str) -> bool:
    """Return whether the answer that a reply gives is the wanted one."""
    return given is not None and normalise(given) == normalise(wanted)
