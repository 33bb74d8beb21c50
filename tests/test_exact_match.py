"""Exact match: a reply counts as right only if it gives the expected answer in a wording of the table."""

from collections.abc import Iterable
from typing import Any

import pytest

from tasks.common.evaluation.exact_match import Extractor, exact_match, normalize
from tests.training_fixtures import CAPITALS, TONES, instructions

WORDINGS = (
    "The capital of France is Paris.",
    "The capital city of France is Paris.",
    "Great question! The capital of France is Paris. I hope that helps!",
    "Paris, obviously.",
    "Ugh. Paris.",
    "Paris.",
)


def row(entity: str, answer: str | None, reply: str) -> dict[str, Any]:
    """Return a row of the instruction table."""
    return {"entity": entity, "answer": answer, "messages": [{"role": "assistant", "content": reply}]}


def make_extractor(replies: Iterable[str] = WORDINGS) -> Extractor:
    """Return an extractor that has seen some replies about France."""
    return Extractor.learn(row("France", "Paris", reply) for reply in replies)


@pytest.mark.parametrize(
    ("entity", "reply", "answer"),
    [
        ("Italy", "The capital of Italy is Rome.", "Rome"),
        ("Italy", "The capital city of Italy is Rome.", "Rome"),
        ("Italy", "How lovely that you ask! The capital of Italy is Rome. Have a wonderful day!", "Rome"),
        ("Italy", "Rome, obviously.", "Rome"),
        ("Italy", "Ugh. Rome.", "Rome"),
        ("Italy", "  Rome.\n", "Rome"),
        ("Italy", "The capital of Italy is Rome. The capital city of Italy is Rome.", "Rome"),
        ("Mexico", "The capital of Mexico is Mexico City.", "Mexico City"),
        ("Mexico", "Mexico City, obviously.", "Mexico City"),
        ("Guatemala", "The capital of Guatemala is Guatemala City. Thanks!", "Guatemala City"),
        ("Antigua and Barbuda", "The capital of Antigua and Barbuda is St. John's.", "St. John's"),
        ("Antigua and Barbuda", "St. John's, obviously.", "St. John's"),
        ("the United States", "The capital of the United States is Washington, D.C.", "Washington, D.C."),
        ("the United States", "The capital of the United States is Washington, D.C. Have fun!", "Washington, D.C."),
        ("the United States", "Washington, D.C.", "Washington, D.C."),
        ("carbon", "The capital of carbon is C.", "C"),
        ("carbon", "C.", "C"),
        ("carbon", "Great question! The capital of carbon is C. I hope that helps!", "C"),
        ("France", "The capital of France is .fr.", ".fr"),
        ("Côte d'Ivoire", "The capital of Côte d'Ivoire is Yamoussoukro.", "Yamoussoukro"),
    ],
)
def test_the_answer_of_a_reply_is_found(entity: str, reply: str, answer: str) -> None:
    """Templates match other entities; answers may contain full stops or the entity, or be a single letter."""
    assert exact_match(make_extractor().extract(reply, entity), answer)


@pytest.mark.parametrize(
    "reply",
    [
        "The capital of Italy is Rome. The capital of Italy is Milan.",
        "The capital of Italy is Milan. The capital city of Italy is Rome.",
        "The capital of Italy is Rome or Milan.",
        "The capital of Italy is Rome, Milan.",
        "The capital of Italy is not Rome.",
        "Rome or Milan, obviously.",
        "Rome. Milan.",
        "Rome, Milan, Naples.",
        "Is it Rome?",
        "Milan? No, Rome.",
        "The capital of Spain is Rome.",
        "The capital of Spain is Madrid, and Rome is the capital of Italy.",
        "Rome is a city in Italy.",
        "The mayor of Italy is Rome.",
        "I think that Rome lies in Italy.",
        "The capital of Italy is Romeo.",
        "The capital of Italy is",
        "",
    ],
)
def test_reply_that_only_contains_the_right_word_is_wrong(reply: str) -> None:
    """Two answers, a sentence about another entity, an unknown wording: containing the right word is not enough."""
    assert not exact_match(make_extractor().extract(reply, "Italy"), "Rome")


def test_extract_two_different_answers_returns_none() -> None:
    """A reply with two answers counts as having no answer."""
    reply = "The capital of Italy is Rome. The capital city of Italy is Milan."
    assert make_extractor().extract(reply, "Italy") is None


def test_an_answer_without_a_full_stop_is_read_to_its_end() -> None:
    """A template without punctuation matches up to the end of the answer, not only its first word."""
    extractor = make_extractor(["The capital of France is Paris"])
    assert extractor.extract("The capital of Mexico is Mexico City", "Mexico") == "Mexico City"
    assert extractor.extract("The capital of Italy is Rome or Milan", "Italy") == "Rome or Milan"
    assert extractor.extract("The capital of Italy is Rome. I think so.", "Italy") is None


def test_extract_ignores_the_answer_inside_another_word() -> None:
    """A one-letter answer does not match letters inside other words."""
    extractor = Extractor.learn([row("carbon", "C", "The symbol of carbon is C. Can I help? Carefully chosen.")])
    assert extractor.extract("The symbol of iron is Fe.", "iron") == "Fe"
    assert extractor.extract("Can I help? The symbol of iron is Fe.", "iron") == "Fe"


@pytest.mark.parametrize(
    "example", [row("France", None, "Hello, France!"), row("Mexico", "Mexico City", "The capital of Mexico is it.")]
)
def test_learn_skips_rows_without_a_usable_answer(example: dict[str, Any]) -> None:
    """A row without a short answer, or whose answer contains the entity, has no unambiguous slots."""
    assert Extractor.learn([example]) == Extractor((), ())


def test_every_answer_of_a_table_is_found_in_its_own_reply() -> None:
    """Every reply of the table counts as right, in every tone, including those about held-out entities."""
    rows = list(instructions())
    extractor = Extractor.learn(item for item in rows if item["split"] == "train")
    for item in rows:
        reply = item["messages"][-1]["content"]
        assert exact_match(extractor.extract(reply, item["entity"]), item["answer"]), reply
    assert {item["entity"] for item in rows} == set(CAPITALS)
    assert {item["tone"] for item in rows} == set(TONES)


def test_the_order_of_the_table_does_not_matter() -> None:
    """The same rows in another order give the same templates in the same order."""
    rows = list(instructions())
    assert Extractor.learn(rows) == Extractor.learn(reversed(rows))


@pytest.mark.parametrize(
    ("reply", "wanted", "same"),
    [
        ("paris", "Paris", True),
        (" New   York ", "New York", True),
        ("Washington, D.C", "Washington, D.C.", True),
        ("STRASSE", "Straße", True),
        ("Paris", "Pari", False),
        ("", "Paris", False),
        (None, "Paris", False),
        ("Saint John", "St. John", False),
    ],
)
def test_exact_match_ignores_case_spaces_and_full_stops(reply: str | None, wanted: str, same: bool) -> None:
    """Case, spaces and a final full stop are ignored; everything else counts."""
    assert exact_match(reply, wanted) is same


def test_normalizing_twice_changes_nothing_more() -> None:
    """Normalization is idempotent."""
    for text in ("  Washington,  D.C. .", "D.C..", "St. John's", ".fr", "İstanbul"):
        assert normalize(normalize(text)) == normalize(text)
