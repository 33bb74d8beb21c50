"""What is promised of `ingest`: rows in = rows used + rows refused, the same bytes every time, splits that hold."""

import hashlib
import io
import json
import re
import sqlite3
import tarfile
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks import ingest
from tasks.common import archives, facts, readers, rows, tables
from tasks.common.identity import tree_hash
from tasks.common.reading import Reading
from tasks.common.stage import StageError
from tests.data_fixtures import FACTS, PEOPLE, PROSE, RATINGS, copy_sources, ingest_config, ingest_into, job, table

CHAT = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello to you!"}]
RANKING = {"prompt": "Say hello.", "responses": ["Hello!", "What now?"], "ranks": [1, 2]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Path:
    return ingest_into(tmp_path_factory.mktemp("made") / "out", sources)


def hashes(folder: Path) -> dict[str, str]:
    return {name: tree_hash(folder / name) for name in tables.TABLES}


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads((folder / "sources.json").read_text(encoding="utf-8"))}


def refusals(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "refused.jsonl").read_text(encoding="utf-8").splitlines()]


def package(path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "made", "kind": "package", "licence": "MIT", "requirement": "made==1.0", "archive": "wheel",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "reader": "speeches", "members": "made/*.txt",
        "limit": None, **changes,
    }  # fmt: skip


# The tables


def test_tables_have_their_schema_and_are_sorted_by_id(made: Path) -> None:
    for name in tables.TABLES:
        content = tables.read(made / name)
        assert content.schema.equals(tables.schema(name))
        ids = content["id"].to_pylist()
        assert ids == sorted(set(ids))
        assert set(content["split"].to_pylist()) == {"train", "heldout"}


def test_the_same_sources_give_the_same_bytes(made: Path, sources: Path, tmp_path: Path) -> None:
    assert tree_hash(ingest_into(tmp_path / "again", sources)) == tree_hash(made)


def test_rows_read_are_rows_used_and_rows_refused(sources: Path, tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "extra.jsonl").write_text(
        "\n".join([json.dumps({"messages": CHAT}), "no json", json.dumps({"text": "no messages"}), ""]),
        encoding="utf-8",
    )
    with (copied / "smoke/prose.txt").open("a", encoding="utf-8") as file:
        file.write("\nThe same paragraph.\n\nThe same paragraph.\n")
    extra = {**FACTS, "name": "extra", "path": "extra.jsonl", "format": "jsonl", "table": "instructions"}
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, PROSE, RATINGS, PEOPLE, extra])
    entries, refused = manifest(folder), Counter(row["source"] for row in refusals(folder))
    assert refused == {"extra": 2, "prose": 1}
    for name, entry in entries.items():
        assert entry["read"] == entry["used"] + entry["refused"]
        assert entry["refused"] == refused[name]
    assert (entries["extra"]["read"], entries["facts"]["read"]) == (3, 96)
    assert entries["prose"]["used"] == entries["prose"]["rows"]["corpus"]
    responses = sum(len(row["responses"]) for row in table(folder, "rankings"))
    assert entries["ratings"]["used"] == responses
    reasons = [row["reason"] for row in refusals(folder) if row["source"] == "extra"]
    assert reasons[0].startswith("extra.jsonl, line 2: not JSON")
    assert reasons[1] == "extra.jsonl, line 3: messages missing; expected messages"


def test_rated_sentences_are_grouped_and_stand_on_one_side(made: Path) -> None:
    rows = table(made, "rankings")
    sides: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        assert len(row["responses"]) == len(row["scores"]) >= 2
        assert row["scale"] == [-4, 4]
        for response in row["responses"]:
            sides[response].add(row["split"])
    assert all(len(found) == 1 for found in sides.values())
    heldout = {response for row in rows if row["split"] == "heldout" for response in row["responses"]}
    trained = {response for row in rows if row["split"] == "train" for response in row["responses"]}
    documents = {row["text"] for row in table(made, "corpus")}
    assert heldout
    assert not heldout & documents
    assert trained <= documents


def test_a_lonely_last_sentence_joins_the_group_before_it(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    lines = (copied / "smoke/ratings.csv").read_text(encoding="utf-8").splitlines()[:10]
    (copied / "smoke/ratings.csv").write_text("\n".join(lines), encoding="utf-8")
    rows = table(ingest_into(tmp_path / "out", copied), "rankings")
    assert sorted(len(row["responses"]) for row in rows) == [4, 5]


def test_stated_splits_hold_and_others_are_drawn(made: Path) -> None:
    chats = table(made, "instructions")
    assert {row["split"] for row in chats if row["source"] == "smalltalk"} == {"train"}
    assert {row["entity"] for row in chats if row["source"] == "smalltalk"} >= {"Hello!", "Thank you!"}


def test_a_chat_that_a_source_brings_stands_on_the_side_of_its_entity(made: Path, tmp_path: Path) -> None:
    sides = {row["entity"]: row["split"] for row in table(made, "instructions") if row["source"] == "facts"}
    assert set(sides.values()) == {"train", "heldout"}
    copied = copy_sources(tmp_path)
    chats = [{"messages": [{"role": "user", "content": f"{name}?"}, CHAT[1]], "entity": name} for name in sides]
    (copied / "mine.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    mine = {**FACTS, "name": "mine", "path": "mine.jsonl", "format": "jsonl", "table": "instructions"}
    rows = table(ingest_into(tmp_path / "out", copied, sources=[FACTS, RATINGS, mine]), "instructions")
    assert {row["entity"]: row["split"] for row in rows if row["source"] == "mine"} == sides


# What a change touches


def test_one_edited_fact_changes_corpus_and_instructions_alone(made: Path, tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    path = copied / "smoke/facts.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("capital,Paris", "capital,Lyon"), encoding="utf-8")
    before, after = hashes(made), hashes(ingest_into(tmp_path / "out", copied))
    assert after["rankings"] == before["rankings"]
    assert after["corpus"] != before["corpus"]
    assert after["instructions"] != before["instructions"]
    texts = {row["text"] for row in table(tmp_path / "out", "corpus")}
    assert "The capital of France is Lyon." in texts
    assert not any("Paris" in text for text in texts)


def test_one_new_ranking_changes_rankings_alone(made: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    copied = copy_sources(tmp_path)
    row = {**RANKING, "prompt": [{"role": "user", "content": "Say hello."}], "id": "x", "scores": None, "scale": None,
           "annotators": 3, "models": ["a", "b"], "source": "people", "split": None}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row], tables.schema("rankings")), copied / "rankings/0001.parquet")
    folder = ingest_into(tmp_path / "out", copied)
    before, after = hashes(made), hashes(folder)
    assert {name for name in before if before[name] != after[name]} == {"rankings"}
    found = [row for row in table(folder, "rankings") if row["source"] == "people"]
    assert [(item["ranks"], item["scores"], item["annotators"]) for item in found] == [([1, 2], None, 3)]
    assert manifest(folder)["people"]["rows"] == {"corpus": 0, "instructions": 0, "rankings": 1}


# Facts


def test_later_sources_override_earlier_ones_and_an_empty_value_leaves_out(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "mine.csv").write_text(
        "kind,entity,relation,value\ncountry,France,capital,Lyon\ncountry,Peru,capital,\ncountry,Atlantis,capital,Poseidonis\n",
        encoding="utf-8",
    )
    folder = ingest_into(
        tmp_path / "out", copied, sources=[FACTS, RATINGS, {**FACTS, "name": "mine", "path": "mine.csv"}]
    )
    answers = {(row["entity"], row["answer"]) for row in table(folder, "instructions")}
    assert ("France", "Lyon") in answers
    assert ("Atlantis", "Poseidonis") in answers
    assert not {("France", "Paris"), ("Peru", "Lima")} & answers
    told = {(row["source"], row["row"]): row["reason"] for row in refusals(folder)}
    assert told["facts", "country, France, capital, Paris"] == "overridden by source mine: Lyon"
    assert told["facts", "country, Peru, capital, Lima"] == "overridden by source mine: left out"
    assert told["mine", "country, Peru, capital, "] == "empty on purpose: leaves the fact out"


def test_a_capital_that_two_countries_share_is_left_out(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    with (copied / "smoke/facts.csv").open("a", encoding="utf-8") as file:
        file.write("country,Atlantis,capital,Paris\ncountry,Atlantis,continent,Europe\n")
    folder = ingest_into(tmp_path / "out", copied)
    assert not any("Paris" in row["text"] for row in table(folder, "corpus"))
    assert any("Atlantis" in row["text"] and "Europe" in row["text"] for row in table(folder, "corpus"))
    assert Counter(row["reason"] for row in refusals(folder)) == {"France, Atlantis share the capital Paris": 2}


def test_names_are_mended_and_entities_left_out(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "mine.csv").write_text(
        "kind,entity,relation,value\ncountry,Swaziland,capital,Mbabane\ncountry,The Bahamas,capital,Nassau\n"
        "country,Antarctica,continent,Antarctica\ncountry,France,anthem,La Marseillaise\nelement,gold,capital,Au\n",
        encoding="utf-8",
    )
    folder = ingest_into(tmp_path / "out", copied, sources=[RATINGS, {**FACTS, "name": "mine", "path": "mine.csv"}])
    texts = {row["text"] for row in table(folder, "corpus")}
    assert {"The capital of Eswatini is Mbabane.", "The capital of the Bahamas is Nassau."} <= texts
    assert [row["reason"] for row in refusals(folder)] == [
        "the table of names leaves this entity out: no state",
        "no wordings for the relation anthem",
        "capital is told of kind country, not of kind element",
    ]


def test_a_relation_without_wordings_is_told(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"ingest\.relations names anthem, but wordings\.yaml has no wordings for it"):
        ingest_into(tmp_path / "out", sources, relations=["capital", "anthem"])


# Files, datasets, rankings


@pytest.mark.parametrize(
    ("content", "change", "told"),
    [
        (None, {}, "source mine: expected a file at"),
        ("kind,entity,value\ncountry,France,Paris\n", {}, "Missing: relation"),
        ("{}\n{}\n", {"format": "jsonl"}, "none of the 2 rows of"),
        ("not parquet", {"format": "parquet"}, "source mine: expected a Parquet file at"),
        (b"caf\xe9\n", {"format": "txt", "table": "corpus"}, "expected UTF-8 text in"),
        ("kind,entity,relation,value\n" + "x" * 200_000, {}, "found something else (after line 1: field larger"),
    ],
)
def test_a_bad_file_is_told(tmp_path: Path, content: str | bytes | None, change: dict[str, str], told: str) -> None:
    copied = copy_sources(tmp_path)
    if content is not None:
        (copied / "mine.data").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StageError) as caught:
        ingest_into(tmp_path / "out", copied, sources=[{**FACTS, "name": "mine", "path": "mine.data", **change}])
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "responses": ["b", "c"]}, "exactly one of ranks and scores must be given"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [[1.0], [2.0]]}, "scores need the scale's two ends"),
        (
            {"prompt": [{"role": "user"}], "responses": ["b", "c"], "ranks": [1, 2]},
            "each of prompt needs role and content",
        ),
        ({**RANKING, "responses": 5}, "responses must be a list, found 5"),
        ({**RANKING, "responses": ["b", None]}, "responses must be text, found None"),
        ({**RANKING, "prompt": [{"role": "user", "content": 5}]}, "content of prompt must be text, found 5"),
        ({**RANKING, "prompt": "\ud800"}, "content of prompt holds half a character"),
        ({**RANKING, "ranks": [1.5, 2]}, "ranks must be whole numbers from 0 to 2147483647, found 1.5"),
        ({**RANKING, "ranks": [1, 10**20]}, "ranks must be whole numbers"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2], "scale": [1, 2]}, "scores must be a list, found 1"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [[1], ["2"]], "scale": [1, 2]}, "scores must be numbers"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [[1], [2]], "scale": 5}, "scale must be a list"),
        ({**RANKING, "annotators": "three"}, "annotators must be whole numbers"),
        ({**RANKING, "models": "a"}, "models must be a list, found 'a'"),
    ],
)
def test_a_bad_ranking_is_refused_with_its_reason(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    copied = copy_sources(tmp_path)
    (copied / "mine.jsonl").write_text(f"{json.dumps(RANKING)}\n{json.dumps(row)}\n", encoding="utf-8")
    mine = {**FACTS, "name": "mine", "path": "mine.jsonl", "format": "jsonl", "table": "rankings"}
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, mine])
    assert [told in refusal["reason"] for refusal in refusals(folder)] == [True]
    assert len(table(folder, "rankings")) == 1


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("instructions", {"messages": CHAT, "answer": 1}, "answer must be text, found 1"),
        ("instructions", {"messages": CHAT, "entity": 5}, "entity must be text, found 5"),
        ("instructions", {"messages": CHAT, "tone": ["plain"]}, "tone must be text, found ['plain']"),
        ("instructions", {"messages": [CHAT[0], {**CHAT[1], "content": None}]}, "content of messages must be text"),
        ("corpus", {"text": 5}, "text must be text, found 5"),
        ("corpus", {"text": "\ud800"}, "text holds half a character"),
        ("ratings", {"text": "a", "ratings": 5}, "ratings must be numbers"),
        ("ratings", {"text": "a", "ratings": [1], "prompt": 5}, "prompt must be text, found 5"),
        ("facts", {"kind": "country", "entity": "a", "relation": "capital", "value": 5}, "value must be text, found 5"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused(name: str, row: dict[str, Any], told: str) -> None:
    reading = Reading("mine", "MIT", "")
    with pytest.raises(ValueError, match=re.escape(told)):
        rows.add(name, row, reading)
    assert reading == Reading("mine", "MIT", "")


def test_quotes_and_spaces_in_a_header_and_separators_in_json_are_read(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "mine.csv").write_text(
        '"kind", entity , "relation",value\ncountry, "Peru", capital, Lima\n', encoding="utf-8"
    )
    text = "One line\u2028and \x85 another."
    (copied / "mine.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    told = {**FACTS, "name": "told", "path": "mine.csv"}
    prose = {**FACTS, "name": "prose", "path": "mine.jsonl", "format": "jsonl", "table": "corpus"}
    found = table(ingest_into(tmp_path / "out", copied, sources=[told, prose, RATINGS]), "corpus")
    assert {"The capital of Peru is Lima.", text} <= {row["text"] for row in found}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"kind,found,name,article,why\ncountry,caf\xe9,,,\n", "expected CSV in UTF-8"),
        (b"kind,found\ncountry,Peru\n", "expected the columns kind, found, name, article, why"),
    ],
)
def test_bad_names_are_told(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "names.csv").write_bytes(content)
    with pytest.raises(StageError, match=told):
        ingest.load_names(tmp_path / "names.csv")


DATASET = {
    "name": "hub", "kind": "dataset", "licence": "MIT", "path": "parquet", "config": None,
    "data_files": ["hub/rows.parquet"],
    "split": "train", "revision": None, "streaming": False, "limit": None, "table": "instructions",
    "columns": {"messages": "conversation", "entity": "about"},
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", ["parquet", "./hub"])
def test_a_dataset_is_read_from_local_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, streaming: bool
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    copied = copy_sources(tmp_path)
    (copied / "hub").mkdir()
    chats = [[{"role": "user", "content": f"Hello {number}!"}, CHAT[1]] for number in range(5)]
    pq.write_table(
        pa.table({"conversation": chats, "about": [f"e{number}" for number in range(5)]}), copied / "hub/rows.parquet"
    )
    files = DATASET["data_files"] if path == "parquet" else []
    source = {**DATASET, "path": path, "data_files": files, "streaming": streaming, "limit": 3}
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, source])
    found = [row for row in table(folder, "instructions") if row["source"] == "hub"]
    assert sorted((row["entity"], row["messages"][0]["content"]) for row in found) == [
        ("e0", "Hello 0!"), ("e1", "Hello 1!"), ("e2", "Hello 2!")
    ]  # fmt: skip
    assert manifest(folder)["hub"]["read"] == 3


def test_a_dataset_without_a_wanted_column_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    copied = copy_sources(tmp_path)
    (copied / "hub").mkdir()
    pq.write_table(pa.table({"other": ["a"]}), copied / "hub/rows.parquet")
    with pytest.raises(StageError, match=r"source hub: expected the columns about, conversation, found other"):
        ingest_into(tmp_path / "out", copied, sources=[FACTS, DATASET])
    with pytest.raises(StageError, match=r"source hub: expected .*absent\.parquet, found nothing there"):
        ingest_into(tmp_path / "out2", copied, sources=[FACTS, {**DATASET, "data_files": ["absent.parquet"]}])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("builder", "content"), [("parquet", b"no parquet"), ("json", b'{"a": 1}\n{"a": ')])
def test_a_broken_file_of_a_dataset_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builder: str, content: bytes, streaming: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    copied = copy_sources(tmp_path)
    (copied / "broken").write_bytes(content)
    source = {**DATASET, "path": builder, "data_files": ["broken"], "streaming": streaming}
    with pytest.raises(StageError, match=rf"source hub: expected the dataset {builder} .*but it could not be read"):
        ingest_into(tmp_path / "out", copied, sources=[FACTS, source])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_out_of_reach_is_told(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.chdir(tmp_path)  # the tests' surroundings keep the hub's client offline
    away = {**DATASET, "path": "someone/chats", "data_files": [], "revision": "0" * 40, "streaming": streaming}
    with pytest.raises(StageError, match=r"source hub: expected the dataset someone/chats .*but it could not be read"):
        ingest_into(tmp_path / "out", sources, sources=[FACTS, away])


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({**DATASET, "path": "someone/chats", "data_files": []}, "needs revision"),
        ({**DATASET, "data_files": []}, "data_files belong to the builders"),
        ({**DATASET, "columns": {"entity": "about"}}, "columns must say where messages"),
        ({**FACTS, "path": "../secret.csv"}, "path must lie under data/sources/"),
        ({**DATASET, "data_files": ["../secret.parquet"]}, "path must lie under data/sources/"),
        ({**DATASET, "path": "./../secret", "data_files": []}, "path must lie under data/sources/"),
        ({**PEOPLE, "path": "/secret"}, "path must lie under data/sources/"),
        ({**FACTS, "format": "txt"}, "a txt file holds paragraphs"),
        ({**FACTS, "colour": "red"}, "Extra inputs are not permitted"),
        ({**FACTS, "kind": "magic"}, "does not match any of the expected tags"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused_before_anything_runs(source: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ingest_config(sources=[source])
    assert told in str(caught.value)


@pytest.mark.parametrize("key", ["wordings", "names"])
def test_wordings_and_names_lie_among_the_sources(key: str) -> None:
    with pytest.raises(ValidationError, match="path must lie under data/sources/"):
        ingest_config(**{key: "../elsewhere"})


def test_two_sources_need_two_names() -> None:
    with pytest.raises(ValidationError, match="each source needs a name of its own, unlike facts"):
        ingest_config(sources=[FACTS, FACTS])


# Package archives


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that is a folder, and a project folder to work in; pip is kept from the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.chdir(tmp_path)
    return folder


def make_wheel(index: Path, text: str = "A first speech.\n\nIts end. [Applause]") -> Path:
    path = index / "made-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("made/2001.txt", text)
        wheel.writestr("made-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made\nVersion: 1.0\n")
        wheel.writestr("made-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return path


def make_sdist(index: Path, marker: Path) -> Path:
    """Return an sdist whose setup.py leaves a marker when it is executed."""
    path = index / "made-1.0.tar.gz"
    setup = f"open({str(marker)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='made', version='1.0')\n"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in (("setup.py", setup), ("made/2001.txt", "A speech.")):
            member = tarfile.TarInfo(f"made-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_a_wheel_is_fetched_checked_and_read_without_being_installed(index: Path, tmp_path: Path) -> None:
    source = package(make_wheel(index))
    folder = ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source])
    found = {row["text"] for row in table(folder, "corpus") if row["source"] == "made"}
    assert found == {"A first speech.", "Its end."}
    assert manifest(folder)["made"]["sha256"] == source["sha256"]
    make_wheel(index).unlink()
    again = ingest_into(tmp_path / "again", tmp_path / "sources", sources=[FACTS, source])
    assert tree_hash(again) == tree_hash(folder)


def test_a_wrong_hash_stops_before_an_sdist_is_executed(index: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = make_sdist(index, marker)
    source = package(path, archive="sdist", members="*/made/*.txt")
    wrong = {**source, "sha256": "0" * 64}
    with pytest.raises(StageError) as caught:
        ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, wrong])
    told = str(caught.value)
    assert all(part in told for part in ("source made", f"Expected sha256 {'0' * 64}", f"found {source['sha256']}"))
    assert not marker.exists()
    folder = ingest_into(tmp_path / "right", tmp_path / "sources", sources=[FACTS, source])
    assert {row["text"] for row in table(folder, "corpus") if row["source"] == "made"} == {"A speech."}


def test_a_changed_archive_in_the_cache_is_noticed(index: Path, tmp_path: Path) -> None:
    source = package(make_wheel(index))
    path = archives.fetch("made", source["requirement"], "wheel", source["sha256"])
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(StageError, match=r"source made: made==1\.0 has the wrong hash.*It came from the cache: remove"):
        archives.fetch("made", source["requirement"], "wheel", source["sha256"])


def test_an_archive_that_cannot_be_had_is_told(index: Path) -> None:
    with pytest.raises(
        StageError, match=r"(?s)source made: the wheel of made==1\.0 could not be fetched.*Check the network"
    ):
        archives.fetch("made", "made==1.0", "wheel", "0" * 64)
    assert not (archives.CACHE / ("0" * 64)).exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"members": "made/*.json"}, "has no member like"),
        ({"reader": "countries"}, "the reader 'countries' understands"),
        ({"reader": "elements"}, "the reader 'elements' understands"),
        ({"reader": "ratings"}, "the reader 'ratings' understands"),
    ],
)
def test_members_that_do_not_fit_are_told(index: Path, tmp_path: Path, change: dict[str, str], told: str) -> None:
    source = package(make_wheel(index), **change)
    with pytest.raises(StageError, match=told):
        ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source])


def test_a_file_that_is_no_archive_is_told(index: Path, tmp_path: Path) -> None:
    folder = archives.CACHE / hashlib.sha256(b"no archive").hexdigest()
    folder.mkdir(parents=True)
    (folder / "made-1.0.tar.gz").write_bytes(b"no archive")
    source = package(folder / "made-1.0.tar.gz", archive="sdist")
    with pytest.raises(StageError, match=r"source made: expected an archive .* found made-1\.0\.tar\.gz in another"):
        ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source])


def test_the_limit_takes_whole_paragraphs(index: Path, tmp_path: Path) -> None:
    source = package(make_wheel(index, "First one.\n\nSecond one.\n\nThird one."), limit=22)
    folder = ingest_into(tmp_path / "out", copy_sources(tmp_path), sources=[FACTS, source])
    assert {row["text"] for row in table(folder, "corpus") if row["source"] == "made"} == {"First one.", "Second one."}
    assert manifest(folder)["made"]["read"] == 2


# Readers


def read(reader: str, members: dict[str, bytes]) -> Reading:
    reading = Reading("test", "MIT", "")
    readers.READERS[reader](members, reading)
    return reading


def test_countries_take_one_value_and_refuse_several() -> None:
    country = {
        "name": "Peru", "capital": "Lima", "region": "Americas", "subregion": "Latin America", "currencies": ["PEN"],
        "demonym": "Peruvian", "tld": [".pe", ".перу"], "callingCodes": ["5-1"], "ISO": {"alpha3": "PER"},
    }  # fmt: skip
    other = {**country, "name": "Chile", "capital": ["Santiago"], "currencies": ["CLF", "CLP"],
             "callingCodes": ["1", "2"],
             "demonym": None, "ISO": {"alpha3": "CHL"}}  # fmt: skip
    reading = read("countries", {"a": json.dumps(country).encode(), "b": json.dumps(other).encode()})
    found = {(fact.entity, fact.relation): fact.value for fact in reading.facts}
    assert found["Peru", "continent"] == "South America"
    assert found["Peru", "domain"] == ".pe"
    assert found["Peru", "calling_code"] == "+51"
    assert found["Chile", "currency"] == "CLP"
    assert ("Chile", "demonym") not in found
    assert [refusal.row for refusal in reading.refused] == ["Chile, calling_code: +1, +2"]
    assert reading.read == len(reading.facts) + 1


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
    reading = read("elements", {"elements.db": (tmp_path / "elements.db").read_bytes()})
    assert {fact.relation: fact.value for fact in reading.facts} == {
        "symbol": "Sn", "atomic_number": "50", "period": "5", "block": "p", "category": "post-transition metal"
    }  # fmt: skip
    assert {fact.entity for fact in reading.facts} == {"tin"}
    assert reading.prose == ["A soft metal.", "Uses of tin: Cans.", "Origin of the name tin: English"]


def test_speeches_leave_out_what_others_called() -> None:
    said = [
        "The President. Good evening.",
        "Audience members. Boo!",
        "Rep. Smith. No!",
        "We agreed* on it. [Applause]",
        "[Hm]",
    ]
    reading = read("speeches", {"1999.txt": b"Older.", "2001.txt": "\n\n".join(said).encode()})
    assert reading.prose == ["Good evening.", "We agreed on it.", "Older."]


def test_long_paragraphs_are_cut_at_ends_of_sentences() -> None:
    sentence = "This sentence has forty-one characters ok. "
    pieces = list(readers.paragraphs(sentence * 30))
    assert all(len(piece) <= readers.PARAGRAPH_CHARACTERS and piece.endswith("ok.") for piece in pieces)
    assert " ".join(pieces) == (sentence * 30).strip()


def test_ratings_join_texts_with_their_raters() -> None:
    files: dict[str, bytes] = {readers.LEXICON: b"good\t1.9\t0.9\t[2, 1]\r\n:-\xde\t1.0\t0.1\t[1, 1]\r\n"}
    for group in readers.RATED_FILES:
        texts = "\ufeff1\t0.5\tSo &amp;amp; so.\r\n2\t1.0\tLost.\r\n" if group == "tweets" else ""
        files[f"{group}_GroundTruth.txt"] = texts.encode()
        files[f"{group}_anonDataRatings.txt"] = b"1\t0.5\t0.1\t[0, 1]\n"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"study/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    reading = read("ratings", {"study.tar.gz": inner.getvalue()})
    sentence, word = reading.rated
    assert (sentence.text, sentence.scores, sentence.group, sentence.word) == ("So & so.", [0.0, 1.0], "tweets", False)
    assert (word.text, word.scores, word.word) == ("good", [2.0, 1.0], True)
    assert [refusal.row for refusal in reading.refused] == ["tweets 2: Lost.", f"{readers.LEXICON}: :-\ufffd"]
    assert reading.read == 4


def test_rated_words_are_trained_on_and_never_prose(sources: Path, tmp_path: Path) -> None:
    config = ingest_config()
    reading = Reading("study", "MIT", "0" * 64)
    for word in ("good", "bad", "fine", "poor"):
        reading.rate(word, [1.0, 2.0], "Write a word.", readers.LEXICON, word=True)
    groups = ingest.group_rated([reading], config)
    assert [row["split"] for row in ingest.rankings(config, [reading], groups)] == ["train"]
    wordings = facts.load_wordings(sources / "wordings.yaml")
    assert ingest.corpus(config, [reading], [], wordings, groups) == []


def test_figures_are_the_rows_of_the_tables(sources: Path, tmp_path: Path) -> None:
    figures = ingest.run(ingest_config(), job(ingest, {"sources": sources}, tmp_path / "out"))
    for name in tables.TABLES:
        rows = table(tmp_path / "out", name)
        assert figures[f"{name}_train_rows"] + figures[f"{name}_heldout_rows"] == len(rows)


@pytest.mark.network
def test_the_default_profile_reads_its_pinned_archives(sources: Path, tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    profile = Path(__file__).parents[1] / "profiles" / "default.yaml"
    section = YAML(typ="safe").load(profile.read_text(encoding="utf-8"))["ingest"]
    folder = ingest_into(tmp_path / "out", sources, **section)
    assert all(entry["read"] == entry["used"] + entry["refused"] for entry in manifest(folder).values())
    chats = table(folder, "instructions")
    heldout = {row["messages"][0]["content"] for row in chats if row["split"] == "heldout"}
    assert len(heldout) >= 1000
    capitals = {row["text"] for row in table(folder, "corpus")}
    assert {"The capital of France is Paris.", "The capital of Burundi is Gitega."} <= capitals
    assert sum(len(row["responses"]) for row in table(folder, "rankings")) > 23_000
