"""Readers of the package archives: facts, prose and ratings from members, with unusable rows rejected."""

import io
import json
import sqlite3
import tarfile
from pathlib import Path

import pytest

from tasks.ingest import readers
from tasks.ingest.reading import Reading, Rejection


def read_members(reader: str, members: dict[str, bytes]) -> Reading:
    reading = Reading("test", "MIT")
    readers.READERS[reader](members, reading)
    return reading


def rejections(reading: Reading) -> list[Rejection]:
    assert isinstance(reading.rejected, list)
    return reading.rejected


def test_countries_use_single_values_and_reject_several() -> None:
    country = {
        "name": "Peru", "capital": "Lima", "region": "Americas", "subregion": "Latin America", "currencies": ["PEN"],
        "demonym": "Peruvian", "tld": [".pe", ".перу"], "callingCodes": ["5-1"], "ISO": {"alpha3": "PER"},
    }  # fmt: skip
    other = {**country, "name": "Chile", "capital": ["Santiago"], "currencies": ["CLF", "CLP"],
             "callingCodes": ["1", "2"],
             "demonym": None, "ISO": {"alpha3": "CHL"}}  # fmt: skip
    reading = read_members("countries", {"a": json.dumps(country).encode(), "b": json.dumps(other).encode()})
    values = {(fact.entity, fact.relation): fact.value for fact in reading.facts}
    assert values["Peru", "continent"] == "South America"
    assert values["Peru", "domain"] == ".pe"
    assert values["Peru", "calling_code"] == "+51"
    assert values["Chile", "currency"] == "CLP"
    assert ("Chile", "demonym") not in values
    assert [rejection.row for rejection in rejections(reading)] == ["Chile, calling_code: +1, +2"]
    assert reading.rows_read == len(reading.facts) + 1


def test_elements_give_facts_and_prose(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "elements.db") as connection:
        connection.execute("create table series (id, name)")
        connection.execute("insert into series values (1, 'Poor metals')")
        connection.execute(
            "create table elements (atomic_number, name, symbol, period, group_id, block, series_id, description, "
            "uses, sources, name_origin)"
        )
        connection.execute(
            "insert into elements values (50, 'Tin', 'Sn', 5, null, 'p', 1, 'A soft metal.', 'Cans.', null, 'English')"
        )
    reading = read_members("elements", {"elements.db": (tmp_path / "elements.db").read_bytes()})
    assert {fact.relation: fact.value for fact in reading.facts} == {
        "symbol": "Sn", "atomic_number": "50", "period": "5", "block": "p", "category": "post-transition metal"
    }  # fmt: skip
    assert {fact.entity for fact in reading.facts} == {"tin"}
    assert reading.prose == ["A soft metal.", "Uses of tin: Cans.", "Origin of the name tin: English"]


def test_speeches_exclude_audience_reactions() -> None:
    paragraphs = [
        "The President. Good evening.",
        "Audience members. Boo!",
        "Rep. Smith. No!",
        "We agreed* on it. [Applause]",
        "[Hm]",
    ]
    reading = read_members("speeches", {"1999.txt": b"Older.", "2001.txt": "\n\n".join(paragraphs).encode()})
    assert reading.prose == ["Good evening.", "We agreed on it.", "Older."]


def test_long_paragraphs_are_cut_at_ends_of_sentences() -> None:
    sentence = "This sentence has forty-one characters ok. "
    pieces = list(readers.split_paragraphs([sentence * 30]))
    assert all(len(piece) <= readers.PARAGRAPH_CHARACTERS and piece.endswith("ok.") for piece in pieces)
    assert " ".join(pieces) == (sentence * 30).strip()


def test_ratings_join_texts_with_their_ratings() -> None:
    files: dict[str, bytes] = {readers.LEXICON_FILE: b"good\t1.9\t0.9\t[2, 1]\r\n:-\xde\t1.0\t0.1\t[1, 1]\r\n"}
    for group in readers.RATED_FILE_PROMPTS:
        texts = "\ufeff1\t0.5\tSo &amp;amp; so.\r\n2\t1.0\tLost.\r\n" if group == "tweets" else ""
        files[f"{group}_GroundTruth.txt"] = texts.encode()
        files[f"{group}_anonDataRatings.txt"] = b"1\t0.5\t0.1\t[0, 1]\n"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"study/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    reading = read_members("ratings", {"study.tar.gz": inner.getvalue()})
    sentence, word = reading.rated
    assert (sentence.text, sentence.scores, sentence.group, sentence.word) == ("So & so.", [0.0, 1.0], "tweets", False)
    assert (word.text, word.scores, word.word) == ("good", [2.0, 1.0], True)
    assert [rejection.row for rejection in rejections(reading)] == [
        "tweets 2: Lost.",
        f"{readers.LEXICON_FILE}: :-\ufffd",
    ]
    assert reading.rows_read == 4


def test_paragraphs_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = [f"Sentence {number} says {'x' * (number % 90)}." for number in range(200)]
    text = "\n".join([" ".join(sentences[:80]), "", " \t", *sentences[80:], "", "", "The end"])
    whole = list(readers.split_paragraphs(text.split("\n")))
    assert " ".join(whole) == " ".join(text.split())
    assert max(map(len, whole)) <= readers.PARAGRAPH_CHARACTERS
    assert whole[-1] == "The end"
    for characters in (1, 100, 700, 5000):
        monkeypatch.setattr(readers, "BLOCK_CHARACTERS", characters)
        assert list(readers.split_paragraphs(text.split("\n"))) == whole


def test_prose_beyond_the_limit_is_ignored() -> None:
    reading = Reading("test", "MIT", max_characters=10)
    for text in ("four", "sixsix", "a", ""):
        reading.add_prose(text)
    assert (reading.prose, reading.rows_read, reading.limit_reached) == (["four", "sixsix"], 2, True)
