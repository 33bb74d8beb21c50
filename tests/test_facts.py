"""Facts become sentences: wordings, statements, questions and replies."""

import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from tasks.common.harness.job import StageError
from tasks.ingest import facts
from tasks.ingest.facts import Fact, Wordings
from tests.data_fixtures import SOURCES

SALT = "test"


@pytest.fixture(scope="module")
def wordings() -> Wordings:
    return facts.load_wordings(SOURCES / "wordings.yaml")


@pytest.fixture(scope="module")
def known_facts() -> list[Fact]:
    def country(entity: str, article: str, **values: str) -> list[Fact]:
        return [Fact("country", entity, name, value, "test", "MIT", article) for name, value in values.items()]

    return [
        *country("France", "", capital="Paris", continent="Europe", currency="EUR", domain=".fr"),
        *country("Netherlands", "the", capital="Amsterdam", continent="Europe", currency="EUR", domain=".nl"),
        *(fact for number in range(40) for fact in country(f"Land{number:02}", "", capital=f"City{number:02}")),
    ]


@pytest.fixture(scope="module")
def chats(wordings: Wordings, known_facts: list[Fact]) -> list[dict[str, Any]]:
    return list(facts.make_instruction_rows(known_facts, wordings, 0.25, SALT))


def test_the_plain_statements_are_included(wordings: Wordings, known_facts: list[Fact]) -> None:
    texts = {row["text"] for row in facts.make_corpus_rows(known_facts, wordings, 0, SALT)}
    assert "The capital of France is Paris." in texts
    assert "Paris is the capital of France." in texts
    assert "The capital of the Netherlands is Amsterdam." in texts


def test_every_name_of_a_document_occurs_in_its_text(wordings: Wordings, known_facts: list[Fact]) -> None:
    rows = list(facts.make_corpus_rows(known_facts, wordings, 2, SALT))
    assert all(row["names"] and name in row["text"] for row in rows for name in row["names"])
    statement = next(row for row in rows if row["text"] == "The capital of the Netherlands is Amsterdam.")
    assert statement["names"] == ["Netherlands", "Amsterdam"]
    assert all("EUR" not in row["names"] for row in rows)


def test_paragraphs_join_every_fact_of_an_entity(wordings: Wordings, known_facts: list[Fact]) -> None:
    plain = list(facts.make_corpus_rows(known_facts, wordings, 0, SALT))
    paragraphs = [row for row in facts.make_corpus_rows(known_facts, wordings, 2, SALT) if row not in plain]
    assert len(paragraphs) == 4
    assert all(row["text"].count(". ") == 3 for row in paragraphs)
    assert len({row["text"] for row in paragraphs}) == 4


def test_a_trained_answer_has_three_tones_in_three_wordings(chats: list[dict[str, Any]]) -> None:
    tones: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    replies: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for row in chats:
        if row["split"] == "train":
            tones[row["entity"], row["answer"]][row["tone"]] += 1
            replies[row["entity"], row["answer"], row["tone"]].add(row["messages"][1]["content"])
    assert tones
    assert all(counts == {"plain": 3, "warm": 3, "curt": 3} for counts in tones.values())
    assert all(len(wordings) == 3 for wordings in replies.values())


def test_plain_and_warm_replies_contain_a_statement_verbatim(
    chats: list[dict[str, Any]], wordings: Wordings, known_facts: list[Fact]
) -> None:
    statements = [row["text"] for row in facts.make_corpus_rows(known_facts, wordings, 0, SALT)]
    for row in chats:
        reply = row["messages"][1]["content"]
        if row["tone"] != "curt":
            assert any(statement in reply for statement in statements if row["entity"] in statement)
        else:
            assert row["entity"] not in reply
        assert reply.count(row["answer"]) == 1


def test_held_out_entities_are_asked_in_every_wording_and_answered_plainly(
    chats: list[dict[str, Any]], wordings: Wordings
) -> None:
    heldout = [row for row in chats if row["split"] == "heldout"]
    trained = {row["entity"] for row in chats if row["split"] == "train"}
    entities = {row["entity"] for row in heldout}
    assert 4 <= len(entities) <= 18
    assert not entities & trained
    assert {row["tone"] for row in heldout} == {"plain"}
    counts = Counter(row["entity"] for row in heldout if row["entity"].startswith("Land"))
    assert set(counts.values()) == {len(wordings.relations["capital"].questions)}


def test_every_question_wording_is_trained(chats: list[dict[str, Any]], wordings: Wordings) -> None:
    entity = next(row["entity"] for row in chats if row["split"] == "train" and row["entity"].startswith("Land"))
    questions = {row["messages"][0]["content"] for row in chats if row["entity"] == entity}
    assert questions == {question.format(entity=entity) for question in wordings.relations["capital"].questions}


def test_the_split_depends_on_the_entity_only(known_facts: list[Fact], wordings: Wordings) -> None:
    single = {
        row["entity"]: row["split"]
        for fact in reversed(known_facts)
        for row in facts.make_instruction_rows([fact], wordings, 0.25, SALT)
    }
    together = {row["entity"]: row["split"] for row in facts.make_instruction_rows(known_facts, wordings, 0.25, SALT)}
    other = {
        row["entity"]: row["split"] for row in facts.make_instruction_rows(known_facts, wordings, 0.25, "another salt")
    }
    assert single == together
    assert together != other


@pytest.mark.parametrize(
    ("text", "replacement", "expected"),
    [
        ('"The capital of {entity} is {answer}."', '"The capital is {answer}."', "{entity} and {answer} once each"),
        ('- "What is the capital of {entity}?"', '- "What is {answer}?"', "a question must contain {entity} once"),
        ('"The capital of {entity} is {answer}."', '"The {adj} capital of {entity} is {answer}."', "found 'The {adj}"),
        ('- "Obviously {answer}."', '- "{answer}, {clearly}."', "no placeholders but {statement}, {opening}"),
        ('- "Obviously {answer}."', '- "{answer!r}, obviously."', "found '{answer!r}, obviously.'"),
        ('- "Gladly!"', '- "Gladly}!"', "openings and closings must not contain placeholders"),
        ('- "Gladly!"', '- "Gladly, {entity}!"', "openings and closings must not contain placeholders"),
        ("  curt:", "  rude:", "tones must be plain, warm, curt"),
        ("unique: true", "unik: true", "Extra inputs are not permitted"),
        ("relations:", "relations: [", "not valid YAML"),
    ],
)  # fmt: skip
def test_bad_wordings_are_reported(tmp_path: Path, text: str, replacement: str, expected: str) -> None:
    path = tmp_path / "wordings.yaml"
    shutil.copy(SOURCES / "wordings.yaml", path)
    content = path.read_text(encoding="utf-8")
    assert text in content
    path.write_text(content.replace(text, replacement, 1), encoding="utf-8")
    with pytest.raises(StageError) as caught:
        facts.load_wordings(path)
    assert expected in str(caught.value)
    assert "wordings.yaml" in str(caught.value)


def test_wordings_in_another_encoding_are_reported(tmp_path: Path) -> None:
    (tmp_path / "wordings.yaml").write_bytes(b"openings: [caf\xe9]\n")
    with pytest.raises(StageError, match=r"wordings\.yaml: expected UTF-8 text, found something else at byte 14"):
        facts.load_wordings(tmp_path / "wordings.yaml")


def test_entities_with_the_same_name_are_in_the_same_split(wordings: Wordings) -> None:
    for number in range(40):
        both = [Fact("country", f"Land{number}", "capital", "Rome", "test", "MIT"),
                Fact("element", f"Land{number}", "symbol", "La", "test", "MIT")]  # fmt: skip
        assert len({row["split"] for row in facts.make_instruction_rows(both, wordings, 0.5, SALT)}) == 1


def test_a_reply_must_put_the_entity_first(tmp_path: Path) -> None:
    text = (SOURCES / "wordings.yaml").read_text(encoding="utf-8")
    head, replies, rest = text.partition("    replies:\n")
    path = tmp_path / "wordings.yaml"
    path.write_text(head + replies + '      - "{answer} is the capital of {entity}."\n' + rest, encoding="utf-8")
    with pytest.raises(StageError, match=r"a reply must be a statement with {entity} before {answer}"):
        facts.load_wordings(path)
