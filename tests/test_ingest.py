"""`ingest`: rows read = rows used + rows rejected, deterministic bytes, disjoint splits."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tasks.common import tables
from tasks.common.harness.job import StageError
from tasks.common.identity import tree_hash
from tasks.ingest import readers, sorting, table_rows
from tasks.ingest import stage as ingest
from tasks.ingest.corpus import Corpus, ProseSink
from tasks.ingest.reading import Reading
from tests.data_fixtures import (
    CHAT,
    FACTS,
    PEOPLE,
    PROSE,
    RANKING,
    RATINGS,
    copy_sources,
    ingest_config,
    ingest_into,
    job,
    manifest,
    rejections,
    table,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Path:
    return ingest_into(tmp_path_factory.mktemp("made") / "out", sources)


def hashes(folder: Path) -> dict[str, str]:
    return {name: tree_hash(folder / name) for name in tables.TABLES}


# The tables


def test_tables_have_their_schema_and_are_sorted_by_id(ingested: Path) -> None:
    for name in tables.TABLES:
        content = tables.read(ingested / name)
        assert content.schema.equals(tables.schema(name))
        ids = content["id"].to_pylist()
        assert ids == sorted(set(ids))
        assert set(content["split"].to_pylist()) == {"train", "heldout"}


def test_the_same_sources_give_the_same_bytes(ingested: Path, sources: Path, tmp_path: Path) -> None:
    assert tree_hash(ingest_into(tmp_path / "again", sources)) == tree_hash(ingested)


def test_rows_read_are_rows_used_and_rows_rejected(sources: Path, tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "extra.jsonl").write_text(
        "\n".join([json.dumps({"messages": CHAT}), "no json", json.dumps({"text": "no messages"}), ""]),
        encoding="utf-8",
    )
    with (copied / "smoke/prose.txt").open("a", encoding="utf-8") as file:
        file.write("\nThe same paragraph.\n\nThe same paragraph.\n")
    extra = {**FACTS, "name": "extra", "path": "extra.jsonl", "format": "jsonl", "table": "instructions"}
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, PROSE, RATINGS, PEOPLE, extra])
    entries, rejected = manifest(folder), Counter(row["source"] for row in rejections(folder))
    assert rejected == {"extra": 2, "stories": 1}
    for name, entry in entries.items():
        assert entry["read"] == entry["used"] + entry["rejected"]
        assert entry["rejected"] == rejected[name]
    assert (entries["extra"]["read"], entries["facts"]["read"]) == (3, 96)
    assert entries["stories"]["used"] == entries["stories"]["rows"]["corpus"]
    responses = sum(len(row["responses"]) for row in table(folder, "rankings"))
    assert entries["ratings"]["used"] == responses
    reasons = [row["reason"] for row in rejections(folder) if row["source"] == "extra"]
    assert reasons[0].startswith("extra.jsonl, line 2: not JSON")
    assert reasons[1] == "extra.jsonl, line 3: messages missing; expected messages"


def test_rated_sentences_are_grouped_and_in_one_split(ingested: Path) -> None:
    rows = table(ingested, "rankings")
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        assert len(row["responses"]) == len(row["scores"]) >= 2
        assert row["scale"] == [-4, 4]
        for response in row["responses"]:
            splits[response].add(row["split"])
    assert all(len(groups) == 1 for groups in splits.values())
    heldout = {response for row in rows if row["split"] == "heldout" for response in row["responses"]}
    trained = {response for row in rows if row["split"] == "train" for response in row["responses"]}
    documents = {row["text"] for row in table(ingested, "corpus")}
    assert heldout
    assert not heldout & documents
    assert trained <= documents


def test_a_single_last_sentence_joins_the_previous_group(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    lines = (copied / "smoke/ratings.csv").read_text(encoding="utf-8").splitlines()[:10]
    (copied / "smoke/ratings.csv").write_text("\n".join(lines), encoding="utf-8")
    rows = table(ingest_into(tmp_path / "out", copied), "rankings")
    assert sorted(len(row["responses"]) for row in rows) == [4, 5]


def test_a_stated_split_applies_to_all_chats_with_the_same_prompt(tmp_path: Path) -> None:
    """Other chats have the prompt of a chat whose stated split is train."""
    copied = copy_sources(tmp_path)
    chats = [
        {"conversations": [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": f"Hi, number {number}."}]}
        for number in range(30)
    ]
    (copied / "chats.json").write_text(json.dumps(chats), encoding="utf-8")
    imported = {**FACTS, "name": "chats", "path": "chats.json", "format": "sharegpt", "table": "instructions"}
    own = [{"messages": CHAT, "split": "train"}]
    (copied / "own.jsonl").write_text("\n".join(map(json.dumps, own)), encoding="utf-8")
    own_source = {**FACTS, "name": "own", "path": "own.jsonl", "format": "jsonl", "table": "instructions"}
    for salt in ("a", "b", "c", "d", "e", "f"):  # with some of them the prompt would be held out
        folder = ingest_into(tmp_path / salt, copied, salt=salt, sources=[FACTS, RATINGS, imported, own_source])
        assert {row["split"] for row in table(folder, "instructions") if row["source"] in ("chats", "own")} == {"train"}


def test_rankings_contain_sentences_of_one_prompt(tmp_path: Path) -> None:
    """Reviews of a soup and of a book are not compared."""
    copied = copy_sources(tmp_path)
    sentences = [("Review a soup.", f"It is {word}.") for word in ("hot", "good", "bad")]
    sentences += [("Review a book.", f"It is {word}.") for word in ("long", "dull", "new", "good")]
    lines = [
        "text,ratings,prompt",
        *(f"{text},{number} 1,{prompt}" for number, (prompt, text) in enumerate(sentences, -3)),
    ]
    (copied / "smoke/ratings.csv").write_text("\n".join(lines), encoding="utf-8")
    folder = ingest_into(tmp_path / "out", copied)
    rows = [row for row in table(folder, "rankings") if row["source"] == "ratings"]
    responses_by_prompt = {row["prompt"][0]["content"]: sorted(row["responses"]) for row in rows}
    assert responses_by_prompt == {
        "Review a soup.": ["It is bad.", "It is good.", "It is hot."],
        "Review a book.": ["It is dull.", "It is long.", "It is new."],
    }
    assert "duplicate of an earlier row" in str(rejections(folder))


def test_a_lone_surrogate_is_rejected_and_escaped(tmp_path: Path) -> None:
    """A JSON array may contain one, but a table or a UTF-8 file cannot."""
    copied = copy_sources(tmp_path)
    rows = [{"instruction": "Hi", "output": "Hello!"}, {"instruction": "Bye \ud800", "output": "Farewell!"}]
    (copied / "chats.json").write_text(json.dumps(rows), encoding="utf-8")
    chats = {**FACTS, "name": "chats", "path": "chats.json", "format": "alpaca", "table": "instructions"}
    folder = ingest_into(tmp_path / "out", copied, sources=[FACTS, RATINGS, chats])
    [rejected] = [line for line in rejections(folder) if line["source"] == "chats"]
    assert "half a character" in rejected["reason"]
    assert "\\ud800" in rejected["row"]


def test_stated_splits_are_kept(ingested: Path) -> None:
    chats = table(ingested, "instructions")
    assert {row["split"] for row in chats if row["source"] == "smalltalk"} == {"train"}
    assert {row["entity"] for row in chats if row["source"] == "smalltalk"} >= {"Hello!", "Thank you!"}


def test_a_chat_of_a_source_has_the_split_of_its_entity(ingested: Path, tmp_path: Path) -> None:
    splits = {row["entity"]: row["split"] for row in table(ingested, "instructions") if row["source"] == "facts"}
    assert set(splits.values()) == {"train", "heldout"}
    copied = copy_sources(tmp_path)
    chats = [{"messages": [{"role": "user", "content": f"{name}?"}, CHAT[1]], "entity": name} for name in splits]
    (copied / "mine.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    mine = {**FACTS, "name": "mine", "path": "mine.jsonl", "format": "jsonl", "table": "instructions"}
    rows = table(ingest_into(tmp_path / "out", copied, sources=[FACTS, RATINGS, mine]), "instructions")
    assert {row["entity"]: row["split"] for row in rows if row["source"] == "mine"} == splits


def test_tables_are_the_same_if_the_corpus_does_not_fit_into_memory(
    ingested: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "SPILL_BYTES", 20_000)
    monkeypatch.setattr(sorting, "BUCKET_BYTES", 4000)
    assert tree_hash(ingest_into(tmp_path / "spilled", sources)) == tree_hash(ingested)
    assert {path.name for path in (tmp_path / "spilled").iterdir()} == {path.name for path in ingested.iterdir()}


def test_documents_have_the_group_of_their_source(ingested: Path) -> None:
    assert {(row["source"], row["group"]) for row in table(ingested, "corpus")} == {
        ("facts", None), ("stories", "fiction"), ("ratings", None)
    }  # fmt: skip


# Effects of a change


def test_one_edited_fact_changes_only_corpus_and_instructions(ingested: Path, tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    path = copied / "smoke/facts.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("capital,Paris", "capital,Lyon"), encoding="utf-8")
    before, after = hashes(ingested), hashes(ingest_into(tmp_path / "out", copied))
    assert after["rankings"] == before["rankings"]
    assert after["corpus"] != before["corpus"]
    assert after["instructions"] != before["instructions"]
    texts = {row["text"] for row in table(tmp_path / "out", "corpus")}
    assert "The capital of France is Lyon." in texts
    assert not any("Paris" in text for text in texts)


def test_one_new_ranking_changes_only_rankings(ingested: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    copied = copy_sources(tmp_path)
    row = {**RANKING, "prompt": [{"role": "user", "content": "Say hello."}], "id": "x", "scores": None, "scale": None,
           "annotators": 3, "models": ["a", "b"], "source": "people", "split": None}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row], tables.schema("rankings")), copied / "rankings/0001.parquet")
    folder = ingest_into(tmp_path / "out", copied)
    before, after = hashes(ingested), hashes(folder)
    assert {name for name in before if before[name] != after[name]} == {"rankings"}
    people_rows = [row for row in table(folder, "rankings") if row["source"] == "people"]
    assert [(item["ranks"], item["scores"], item["annotators"]) for item in people_rows] == [([1, 2], None, 3)]
    assert manifest(folder)["people"]["rows"] == {"corpus": 0, "instructions": 0, "rankings": 1}


# Facts


def test_later_sources_override_and_empty_values_drop_facts(tmp_path: Path) -> None:
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
    reasons = {(row["source"], row["row"]): row["reason"] for row in rejections(folder)}
    assert reasons["facts", "country, France, capital, Paris"] == "overridden by source mine: Lyon"
    assert reasons["facts", "country, Peru, capital, Lima"] == "overridden by source mine: left out"
    assert reasons["mine", "country, Peru, capital, "] == "empty value: leaves the fact out"


def test_capital_shared_by_two_countries_is_dropped(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    with (copied / "smoke/facts.csv").open("a", encoding="utf-8") as file:
        file.write("country,Atlantis,capital,Paris\ncountry,Atlantis,continent,Europe\n")
    folder = ingest_into(tmp_path / "out", copied)
    assert not any("Paris" in row["text"] for row in table(folder, "corpus"))
    assert any("Atlantis" in row["text"] and "Europe" in row["text"] for row in table(folder, "corpus"))
    assert Counter(row["reason"] for row in rejections(folder)) == {"France, Atlantis share the capital Paris": 2}


def test_entities_are_renamed_or_dropped(tmp_path: Path) -> None:
    copied = copy_sources(tmp_path)
    (copied / "mine.csv").write_text(
        "kind,entity,relation,value\ncountry,Swaziland,capital,Mbabane\ncountry,The Bahamas,capital,Nassau\n"
        "country,Antarctica,continent,Antarctica\ncountry,France,anthem,La Marseillaise\nelement,gold,capital,Au\n",
        encoding="utf-8",
    )
    folder = ingest_into(tmp_path / "out", copied, sources=[RATINGS, {**FACTS, "name": "mine", "path": "mine.csv"}])
    texts = {row["text"] for row in table(folder, "corpus")}
    assert {"The capital of Eswatini is Mbabane.", "The capital of the Bahamas is Nassau."} <= texts
    assert [row["reason"] for row in rejections(folder)] == [
        "the table of names leaves this entity out: no state",
        "no wordings for the relation anthem",
        "capital is a relation of kind country, not of kind element",
    ]


def test_a_relation_without_wordings_is_reported(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"ingest\.relations names anthem, but wordings\.yaml has no wordings for it"):
        ingest_into(tmp_path / "out", sources, relations=["capital", "anthem"])


def test_rated_words_are_in_the_train_split_and_not_in_the_corpus(tmp_path: Path) -> None:
    config = ingest_config()
    reading = Reading("study", "MIT", "0" * 64)
    for word in ("good", "bad", "fine", "poor"):
        reading.add_rated_text(word, [1.0, 2.0], "Write a word.", readers.LEXICON_FILE, word=True)
    groups = table_rows.group_rated([reading], config)
    assert [row["split"] for row in table_rows.make_rankings(config, groups)] == ["train"]
    corpus = Corpus(tmp_path / "spilled", config.salt, config.heldout.prose)
    table_rows.add_rated(corpus, config, groups, {"study": ProseSink(corpus, "study", None, "MIT")})
    assert not corpus.write(tmp_path / "corpus", reading.reject)


def test_figures_are_the_rows_of_the_tables(sources: Path, tmp_path: Path) -> None:
    figures = ingest.run(ingest_config(), job(ingest, {"sources": sources}, tmp_path / "out"))
    for name in tables.TABLES:
        rows = table(tmp_path / "out", name)
        assert figures[f"{name}_train_rows"] + figures[f"{name}_heldout_rows"] == len(rows)
