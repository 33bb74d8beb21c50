"""Makes sentences from facts: statements for pretraining, questions and replies for fine-tuning.

The wordings are data (`data/sources/wordings.yaml`). This module checks them and makes the rows.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from tasks.common import stable_hash
from tasks.common.harness.job import StageError
from tasks.common.settings import Settings

TONES = ("plain", "warm", "curt")
WORDINGS_PER_TONE = 3


@dataclass(frozen=True)
class Fact:
    """A fact: the `relation` of `entity` is `value`. An empty value removes the fact that an earlier source has."""

    kind: str
    entity: str
    relation: str
    value: str
    source: str
    licence: str
    article: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """The key under which a later source overrides an earlier one."""
        return self.kind, self.entity, self.relation

    def fill(self, template: str) -> str:
        """Fill a wording; the article precedes the entity but is not part of its name."""
        subject = f"{self.article} {self.entity}" if self.article else self.entity
        return template.format(entity=subject, answer=self.value)


def _check_placeholders(wording: str, *names: str) -> None:
    """Raise ValueError if a wording has braces other than these placeholders, which would never be filled."""
    remainder = re.sub(rf"\{{(?:{'|'.join(names)})\}}", " ", wording)
    if "{" in remainder or "}" in remainder:
        known = ", ".join(f"{{{name}}}" for name in names)
        raise ValueError(f"expected no placeholders but {known} in a wording, found {wording!r}")


class Relation(Settings):
    """The wordings of one relation."""

    kind: str = Field(description="Kind of the entities with this relation", min_length=1)
    name: bool = Field(description="Whether the answer is a name, which a masked model may be asked for")
    unique: bool = Field(description="Whether two entities cannot have the same value")
    statements: list[str] = Field(description="Sentences for pretraining", min_length=4)
    replies: list[str] = Field(description="Statements used as replies", min_length=WORDINGS_PER_TONE)
    questions: list[str] = Field(description="Wordings of the question", min_length=4)

    @model_validator(mode="after")
    def _check_wordings(self) -> "Relation":
        for wording in (*self.statements, *self.replies, *self.questions):
            _check_placeholders(wording, "entity", "answer")
        for wording in self.statements:
            if wording.count("{entity}") != 1 or wording.count("{answer}") != 1:
                raise ValueError(f"a statement must contain {{entity}} and {{answer}} once each, found {wording!r}")
        for wording in self.replies:
            if wording not in self.statements or wording.index("{entity}") > wording.index("{answer}"):
                raise ValueError(f"a reply must be a statement with {{entity}} before {{answer}}, found {wording!r}")
        for wording in self.questions:
            if wording.count("{entity}") != 1 or "{answer}" in wording:
                raise ValueError(f"a question must contain {{entity}} once and no {{answer}}, found {wording!r}")
        return self


class Wordings(Settings):
    """The contents of `wordings.yaml`."""

    relations: dict[str, Relation]
    tones: dict[str, list[str]]
    openings: list[str] = Field(description="Friendly first sentences", min_length=12)
    closings: list[str] = Field(description="Friendly last sentences", min_length=12)

    @model_validator(mode="after")
    def _check_wordings(self) -> "Wordings":
        short = [tone for tone in TONES if len(self.tones.get(tone, ())) < WORDINGS_PER_TONE]
        if short or set(self.tones) != set(TONES):
            raise ValueError(f"tones must be {', '.join(TONES)}, each with {WORDINGS_PER_TONE} wordings or more")
        for wording in (wording for wordings in self.tones.values() for wording in wordings):
            _check_placeholders(wording, "statement", "opening", "closing", "entity", "answer")
        invalid = [phrase for phrase in (*self.openings, *self.closings) if "{" in phrase or "}" in phrase]
        if invalid:
            raise ValueError(f"openings and closings must not contain placeholders, found {invalid[0]!r}")
        return self


NO_WORDINGS = Wordings.model_construct(relations={}, tones={}, openings=[], closings=[])  # for a run without facts


def load_wordings(path: Path) -> Wordings:
    """Read and check the wordings; raise StageError with all problems of the file."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        raise StageError(f"{path} is missing; `ingest.wordings` must name the file of wordings.")
    try:
        return Wordings.model_validate(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise StageError(
            f"{path}: expected UTF-8 text, found something else at byte {error.start}; save the file as UTF-8."
        ) from error
    except YAMLError as error:
        raise StageError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        problems = [
            f"  {'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise StageError("\n".join([f"{path} is not valid:", *problems])) from error


def make_corpus_rows(facts: Iterable[Fact], wordings: Wordings, paragraphs: int, salt: str) -> Iterator[dict[str, Any]]:
    """Yield every statement of every fact, and for each entity paragraphs of one statement for each of its facts."""
    for fact in (facts := list(facts)):
        for template in wordings.relations[fact.relation].statements:
            yield _make_document(fact.fill(template), [fact], wordings)
    for entity, entity_facts in group_by_entity(facts).items():
        if len(entity_facts) < 2:
            continue
        for number in range(paragraphs):
            shuffled = stable_hash.shuffled(entity_facts, salt, *entity, str(number))
            statements = [(fact, wordings.relations[fact.relation].statements) for fact in shuffled]
            sentences = (
                fact.fill(stable_hash.pick(choices, salt, *fact.key, str(number))) for fact, choices in statements
            )
            yield _make_document(" ".join(sentences), shuffled, wordings)


def group_by_entity(facts: Iterable[Fact]) -> Mapping[tuple[str, str], list[Fact]]:
    """Group facts by (kind, entity), keeping their order."""
    groups: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in facts:
        groups[fact.kind, fact.entity].append(fact)
    return groups


def _make_document(text: str, facts: list[Fact], wordings: Wordings) -> dict[str, Any]:
    names = [facts[0].entity, *(fact.value for fact in facts if wordings.relations[fact.relation].name)]
    first = facts[0]
    return {
        "id": stable_hash.short_id("corpus", text),
        "text": text,
        "names": list(dict.fromkeys(names)),
        "source": first.source,
        "licence": first.licence,
        "split": "train",
    }


def make_instruction_rows(
    facts: Iterable[Fact], wordings: Wordings, heldout: float, salt: str
) -> Iterator[dict[str, Any]]:
    """Yield the chats about each fact.

    A training entity gets every tone in three wordings, with different questions. A held-out entity gets every wording
    of the question with a plain answer. The split is a hash of the name alone, as for the chats of sources: entities of
    two kinds with the same name are in the same split.
    """
    for fact in facts:
        relation = wordings.relations[fact.relation]
        split = stable_hash.split(heldout, salt, "entity", fact.entity)
        if split == "heldout":
            chats = [(question, "plain", relation.replies[0]) for question in relation.questions]
        else:
            chats = list(_make_training_chats(fact, relation, wordings, salt))
        for question, tone, reply in chats:
            yield make_chat_row(
                fact.fill(question), fact.fill(reply), fact.entity, fact.value, tone, fact.source, split
            )


def _make_training_chats(
    fact: Fact, relation: Relation, wordings: Wordings, salt: str
) -> Iterator[tuple[str, str, str]]:
    """Yield (question, tone, reply) with every tone in WORDINGS_PER_TONE wordings."""
    question = stable_hash.number(salt, "question", *fact.key)
    for tone in TONES:
        templates = wordings.tones[tone]
        start = stable_hash.number(salt, tone, *fact.key) if len(templates) > WORDINGS_PER_TONE else 0
        for number in range(WORDINGS_PER_TONE):
            reply = templates[(start + number) % len(templates)]
            parts = (salt, *fact.key, tone, str(number))
            reply = reply.replace("{statement}", relation.replies[number])
            reply = reply.replace("{opening}", stable_hash.pick(wordings.openings, "opening", *parts))
            reply = reply.replace("{closing}", stable_hash.pick(wordings.closings, "closing", *parts))
            yield relation.questions[question % len(relation.questions)], tone, reply
            question += 1


def make_chat_row(
    question: str, reply: str, entity: str, answer: str | None, tone: str | None, source: str, split: str
) -> dict[str, Any]:
    """Return one row of the instructions table."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {
        "id": stable_hash.short_id("instructions", question, reply),
        "messages": messages,
        "entity": entity,
        "answer": answer,
        "tone": tone,
        "source": source,
        "split": split,
    }
