"""Facts become sentences: statements for pretraining, questions and replies for fine-tuning.

The wordings are data (`data/sources/wordings.yaml`), so that a person can change one. This module checks them and
writes the rows. It reads no other file and is used by `tasks/ingest.py` alone.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from tasks.common import draw
from tasks.common.settings import Settings
from tasks.common.stage import StageError

TONES = ("plain", "warm", "curt")
WORDINGS_PER_TONE = 3


@dataclass(frozen=True)
class Fact:
    """One thing that is known: the `relation` of `entity` is `value`. An empty value means: leave this fact out."""

    kind: str
    entity: str
    relation: str
    value: str
    source: str
    licence: str
    article: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What a later source overrides."""
        return self.kind, self.entity, self.relation

    def say(self, template: str) -> str:
        """Fill a wording; the article stands before the entity and is no part of its name."""
        subject = f"{self.article} {self.entity}" if self.article else self.entity
        return template.format(entity=subject, answer=self.value)


def _fillable(wording: str, *names: str) -> None:
    """Raise ValueError where a wording has braces that are none of these placeholders: nothing would fill them."""
    left = re.sub(rf"\{{(?:{'|'.join(names)})\}}", " ", wording)
    if "{" in left or "}" in left:
        known = ", ".join(f"{{{name}}}" for name in names)
        raise ValueError(f"a wording's braces hold one of {known} and nothing else, unlike {wording!r}")


class Relation(Settings):
    """The wordings of one relation."""

    kind: str = Field(description="Kind of entity that has it", min_length=1)
    name: bool = Field(description="Whether a masked model may be asked for the answer as a name")
    unique: bool = Field(description="Whether two entities cannot share a value")
    statements: list[str] = Field(description="Sentences for pretraining", min_length=4)
    replies: list[str] = Field(description="Statements used as replies", min_length=WORDINGS_PER_TONE)
    questions: list[str] = Field(description="Ways to ask", min_length=4)

    @model_validator(mode="after")
    def _fits(self) -> "Relation":
        for wording in (*self.statements, *self.replies, *self.questions):
            _fillable(wording, "entity", "answer")
        for wording in self.statements:
            if wording.count("{entity}") != 1 or wording.count("{answer}") != 1:
                raise ValueError(f"a statement holds {{entity}} and {{answer}} once each, unlike {wording!r}")
        for wording in self.replies:
            if wording not in self.statements or wording.index("{entity}") > wording.index("{answer}"):
                raise ValueError(f"a reply is a statement with {{entity}} before {{answer}}, unlike {wording!r}")
        for wording in self.questions:
            if wording.count("{entity}") != 1 or "{answer}" in wording:
                raise ValueError(f"a question holds {{entity}} once and never {{answer}}, unlike {wording!r}")
        return self


class Wordings(Settings):
    """Everything in `wordings.yaml`."""

    relations: dict[str, Relation]
    tones: dict[str, list[str]]
    openings: list[str] = Field(description="Friendly first sentences", min_length=12)
    closings: list[str] = Field(description="Friendly last sentences", min_length=12)

    @model_validator(mode="after")
    def _fits(self) -> "Wordings":
        short = [tone for tone in TONES if len(self.tones.get(tone, ())) < WORDINGS_PER_TONE]
        if short or set(self.tones) != set(TONES):
            raise ValueError(f"tones must be {', '.join(TONES)}, each with {WORDINGS_PER_TONE} wordings or more")
        for wording in (wording for wordings in self.tones.values() for wording in wordings):
            _fillable(wording, "statement", "opening", "closing", "entity", "answer")
        held = [phrase for phrase in (*self.openings, *self.closings) if "{" in phrase or "}" in phrase]
        if held:
            raise ValueError(f"openings and closings never hold the entity or the answer, unlike {held[0]!r}")
        return self


def load_wordings(path: Path) -> Wordings:
    """Read and check the wordings; raise StageError that names every problem in the file."""
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
        told = [(".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")) for item in error.errors()]
        raise StageError(
            "\n".join([f"{path} does not fit:", *(f"  {where}: {what}" for where, what in told)])
        ) from error


def corpus_rows(facts: Iterable[Fact], wordings: Wordings, paragraphs: int, salt: str) -> Iterator[dict[str, Any]]:
    """Yield every statement of every fact, and for each entity some paragraphs that join one statement of each fact."""
    for fact in (facts := list(facts)):
        for template in wordings.relations[fact.relation].statements:
            yield _document(fact.say(template), [fact], wordings)
    for entity, known in by_entity(facts).items():
        if len(known) < 2:
            continue
        for turn in range(paragraphs):
            told = draw.shuffled(known, salt, *entity, str(turn))
            said = [(fact, wordings.relations[fact.relation].statements) for fact in told]
            sentences = (fact.say(draw.pick(choices, salt, *fact.key, str(turn))) for fact, choices in said)
            yield _document(" ".join(sentences), told, wordings)


def by_entity(facts: Iterable[Fact]) -> Mapping[tuple[str, str], list[Fact]]:
    """Group facts by (kind, entity), each group in the order given."""
    groups: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in facts:
        groups[fact.kind, fact.entity].append(fact)
    return groups


def _document(text: str, facts: list[Fact], wordings: Wordings) -> dict[str, Any]:
    names = [facts[0].entity, *(fact.value for fact in facts if wordings.relations[fact.relation].name)]
    first = facts[0]
    return {
        "id": draw.short_id("corpus", text),
        "text": text,
        "names": list(dict.fromkeys(names)),
        "source": first.source,
        "licence": first.licence,
        "split": "train",
    }


def instruction_rows(facts: Iterable[Fact], wordings: Wordings, heldout: float, salt: str) -> Iterator[dict[str, Any]]:
    """Yield the chats about each fact.

    An entity in the training split gets every tone in three wordings, the questions varied; a held-out entity is asked
    in every wording of the question and answered plainly. The split is drawn from the name alone, as that of chats
    which sources bring: things of two kinds that share a name stand on one side.
    """
    for fact in facts:
        relation = wordings.relations[fact.relation]
        where = draw.split(heldout, salt, "entity", fact.entity)
        if where == "heldout":
            chats = [(question, "plain", relation.replies[0]) for question in relation.questions]
        else:
            chats = list(_training_chats(fact, relation, wordings, salt))
        for question, tone, reply in chats:
            yield chat_row(fact.say(question), fact.say(reply), fact.entity, fact.value, tone, fact.source, where)


def _training_chats(fact: Fact, relation: Relation, wordings: Wordings, salt: str) -> Iterator[tuple[str, str, str]]:
    first = draw.number(salt, "question", *fact.key)
    for tone in TONES:
        templates = wordings.tones[tone]
        start = draw.number(salt, tone, *fact.key) if len(templates) > WORDINGS_PER_TONE else 0
        for turn in range(WORDINGS_PER_TONE):
            reply = templates[(start + turn) % len(templates)]
            parts = (salt, *fact.key, tone, str(turn))
            reply = reply.replace("{statement}", relation.replies[turn])
            reply = reply.replace("{opening}", draw.pick(wordings.openings, "opening", *parts))
            reply = reply.replace("{closing}", draw.pick(wordings.closings, "closing", *parts))
            yield relation.questions[first % len(relation.questions)], tone, reply
            first += 1


def chat_row(
    question: str, reply: str, entity: str, answer: str | None, tone: str | None, source: str, where: str
) -> dict[str, Any]:
    """Return one row of the instructions table."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {
        "id": draw.short_id("instructions", question, reply),
        "messages": messages,
        "entity": entity,
        "answer": answer,
        "tone": tone,
        "source": source,
        "split": where,
    }
