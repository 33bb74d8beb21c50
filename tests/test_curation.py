"""Curation: what each filter rejects and marks, and what it keeps."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common import tables
from tasks.common.text.words import split_words, words
from tasks.validate import curation, languages, quality
from tasks.validate import stage as validate
from tasks.validate.contamination import Evaluation, HeldoutNgrams
from tasks.validate.languages import Language, find_language, rules_of
from tasks.validate.personal import Personal, mark_text, rejected_kind
from tasks.validate.quality import Quality
from tests.data_fixtures import import_great_expectations, job, validate_config

LANGUAGE = Language(keep=["en"], min_characters=50, min_probability=0.9)
BOUNDS: dict[str, Any] = {
    "min_words": 2, "max_words": 400, "max_words_per_sentence": None, "min_words_for_ratios": 20,
    "min_mean_word_length": 3, "max_mean_word_length": 10,
    "max_symbol_word_ratio": 0.1, "max_bullet_lines_ratio": 0.5, "max_ellipsis_lines_ratio": 0.3,
    "min_alphabetic_words_ratio": 0.8, "min_stop_words": 2, "max_duplicate_lines_ratio": 0.3,
    "max_top_bigram_ratio": 0.2,
}  # fmt: skip
PERSONAL: dict[str, Any] = {
    "email": "mark", "phone": "mark", "iban": "mark", "card": "mark", "ip": "mark", "region": "US"
}  # fmt: skip
ENGLISH = "The committee of the town decided on Monday that the old bridge will be closed to all heavy lorries."
GERMAN = "Der Ausschuss der Stadt hat am Montag beschlossen, dass die alte Brücke für Lastwagen gesperrt wird."
SOUND = (
    "The river rises in the hills to the north of the town, and the mills that once stood on its banks have long been "
    "closed. People of the valley still meet there with their children every spring.\nNobody remembers why."
)


# Words


def test_words_ignore_case_punctuation_and_spaces() -> None:
    assert words("  Hello,\n WORLD! It's 5°C. ") == ["hello", "world", "it", "s", "5", "c"]


def test_characters_of_scripts_without_spaces_are_words() -> None:
    assert words("東京は tokyo") == ["東", "京", "は", "tokyo"]
    assert split_words("東京は Tokyo, iPhone!手机。") == ["東", "京", "は", "Tokyo,", "iPhone!", "手", "机。"]
    assert split_words("ที่นี้ດີက𠮷ﾊ") == ["ที่", "นี้", "ດີ", "က", "𠮷", "ﾊ"]


def test_text_with_spaces_is_split_as_python_splits_it() -> None:
    """All space characters, and many scripts: Latin, Greek, Arabic, Devanagari, Korean, symbols and emoji."""
    spaces = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
    kinds = ["It's", "5°C.", "λόγος,", "سلام", "नमस्ते", "한국어", "…", "👍🏽", "e\u0301", "a_b\u200bc"]
    text = "".join(f"{kinds[number % len(kinds)]}{space}" for number, space in enumerate(spaces * 2))
    assert split_words(text) == text.split()
    assert split_words(" \n ") == split_words("") == []


# Language and quality


def test_languages_are_those_of_the_identifier() -> None:
    assert sorted(map(str, languages.language_identifier().labels)) == sorted(languages.LANGUAGES)


@pytest.mark.parametrize(
    ("text", "expected"), [(ENGLISH, None), (GERMAN, "language: de, not en"), (GERMAN[:49], None), ("Ja.", None)]
)
def test_another_language_is_rejected_where_the_text_is_long_enough(text: str, expected: str | None) -> None:
    assert find_language(text, None, LANGUAGE)[1] == expected


def test_an_unknown_language_is_reported_with_the_known_ones() -> None:
    with pytest.raises(ValidationError, match=r"unknown language english; expected one of ace, af, .* en, "):
        Language(keep=["english"], min_characters=50, min_probability=0.9)


BROKEN: list[tuple[str, str]] = [
    ("word", "fewer than 2 words"),
    ("word " * 401, "more than 400 words"),
    ("a b c " * 10, "the mean word length is not between 3 and 10 characters"),
    (SOUND + " # # # # # # #", "more than 0.1 # or ellipses a word"),
    (SOUND + " 12 345" * 10, "fewer than 80% of the words hold a letter"),
    ("lemon apple cherry mango papaya " + " ".join(f"{a}{b}xx" for a in "bcdfg" for b in "aeiou"), "2 stop words"),
    ("\n".join(f"- {line}" for line in SOUND.split(".")), "more than 50% of the lines start with a bullet"),
    ("\n".join(f"{line}..." for line in (SOUND[:90], SOUND[91:])), "more than 30% of the lines end with an ellipsis"),
    ("\n".join([SOUND.splitlines()[0]] * 3), "more than 30% of the text repeats earlier lines"),
    (SOUND + " tick tock" * 12, "one pair of words makes up more than 20%"),
]


@pytest.mark.parametrize(("text", "expected"), BROKEN)
def test_quality_rules_reject_their_example(text: str, expected: str) -> None:
    bounds = Quality(**BOUNDS)
    assert quality.quality_rejection_reason(SOUND, words(SOUND), bounds, rules_of("en")) is None
    reason = quality.quality_rejection_reason(text, words(text), bounds, rules_of("en"))
    assert reason is not None
    assert expected in reason


def test_ratios_do_not_apply_to_short_documents() -> None:
    short = "# # # # # # one two"
    assert quality.quality_rejection_reason(short, words(short), Quality(**BOUNDS), rules_of("en")) is None


@pytest.mark.parametrize("text", [f"--{SOUND.splitlines()[0]}", SOUND.replace(",", " , ").replace(".", " . ")])
def test_quality_accepts_speech_and_isolated_punctuation(text: str) -> None:
    assert quality.quality_rejection_reason(text, words(text), Quality(**BOUNDS), rules_of("en")) is None


def test_min_words_above_max_words_is_rejected() -> None:
    with pytest.raises(ValidationError, match=r"min_words \(5\) must not exceed max_words \(2\)"):
        Quality(**{**BOUNDS, "min_words": 5, "max_words": 2})


# Personal data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe+x@mail.example.org, please.", "Write to <EMAIL>, please."),
        ("Pay to GB82 WEST 1234 5698 7654 32 now", "Pay to <IBAN> now"),
        ("Pay to DE89370400440532013000.", "Pay to <IBAN>."),
        ("Pay to GB82 WEST 1234 5698 7654 33 now", "Pay to GB82 WEST 1234 5698 7654 33 now"),  # wrong check digits
        ("Card 4111 1111 1111 1111 expires", "Card <CARD> expires"),
        ("Card 4111 1111 1111 1112 expires", "Card 4111 1111 1111 1112 expires"),
        ("Seen from 8.8.8.8 and 2001:4860:4860::8888.", "Seen from <IP> and <IP>."),
        ("Seen from 192.168.0.1 and 300.1.1.1 at 10:20:30", "Seen from 192.168.0.1 and 300.1.1.1 at 10:20:30"),
        ("On 2024-01-15 12 people came.", "On 2024-01-15 12 people came."),  # as digits a number of Washington
        ("Call (212) 566-8082 or +44 20 7946 0958!", "Call <PHONE> or <PHONE>!"),
        ("It was 1,234,567.89 in 1990-1995, or 2125668082.", "It was 1,234,567.89 in 1990-1995, or 2125668082."),
        ("The capital of France is Paris.", "The capital of France is Paris."),
    ],
)
def test_personal_data_is_marked_and_similar_text_is_not(text: str, expected: str) -> None:
    counts: Counter[str] = Counter()
    assert mark_text(text, Personal(**PERSONAL), counts) == expected
    assert counts.total() == sum(expected.count(f"<{kind}>") for kind in ("EMAIL", "IBAN", "CARD", "IP", "PHONE"))


def test_rejected_kinds_are_not_marked() -> None:
    settings = Personal(**{**PERSONAL, "email": "reject", "phone": "keep"})
    text = "Ask a@example.org or (212) 566-8082."
    assert rejected_kind(text, settings) == "email"
    assert rejected_kind("Ask (212) 566-8082.", settings) is None
    assert mark_text(text, settings, Counter()) == text


def test_an_unknown_region_is_reported() -> None:
    with pytest.raises(ValidationError, match="it should be null or one of AC, AD"):
        Personal(**{**PERSONAL, "region": "USA"})


# Wordings of the evaluation


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("He asked: what is the capital of France? Nobody knew.", True),
        ("Quiz. WHAT IS THE CAPITAL OF FRANCE -- Paris it is", True),
        ("The capital of France is Paris.", False),  # a fact, not the wording
        ("What is the capital of Peru?", False),
        ("They said that one two three four five six seven eight nine ten of it", False),
        ("so one two three four five six seven eight nine ten eleven twelve thirteen and", True),
        ("so two three four five six seven eight nine ten eleven twelve thirteen fourteen and", True),
        ("so three four five six seven eight nine ten eleven twelve thirteen fourteen and", False),  # twelve of them
        ("Why? Because.", False),  # too short to be searched for
    ],
)
def test_heldout_wordings_are_found_and_facts_are_not(text: str, quoted: bool) -> None:
    ngrams = HeldoutNgrams(Evaluation(ngram=13, min_words=5))
    ngrams.add("What is the capital of France?", "The capital of France is Paris.")
    ngrams.add("Count!", "One two three four five six seven eight nine ten eleven twelve thirteen fourteen.")
    ngrams.add("Why?", "Because.")
    assert ngrams.occur_in(words(text)) is quoted


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("有人问：法国的首都是哪一座城市？没有人知道。", True),
        ("有人问：法国的首都是哪一座。", False),  # eight characters are not the whole question
        ("他说这本书的作者一九零三年生于伦敦后来搬到了巴黎和罗马居住多年。", True),
        ("他说这本书的作者一九零三年生于伦敦后来搬家。", False),  # 18 characters
    ],
)
def test_heldout_wordings_of_scripts_without_spaces_are_twice_as_long(text: str, quoted: bool) -> None:
    """Thirteen characters are a common phrase; thirteen words have about 26."""
    ngrams = HeldoutNgrams(Evaluation(ngram=13, min_words=5))
    ngrams.add("法国的首都是哪一座城市？", "巴黎。")
    ngrams.add("他是谁？", "这本书的作者一九零三年生于伦敦后来搬到了巴黎和罗马居住多年写了很多小说。")
    assert ngrams.occur_in(words(text)) is quoted


def test_min_words_above_ngram_is_rejected() -> None:
    with pytest.raises(ValidationError, match=r"min_words \(9\) must not exceed ngram \(8\)"):
        Evaluation(ngram=8, min_words=9)


# The stage

CURATE: dict[str, Any] = {
    "code": ["library"],
    "personal": {**PERSONAL, "iban": "reject"},
    "language": LANGUAGE.model_dump(),
    "quality": BOUNDS,
    "evaluation": {"ngram": 13, "min_words": 5},
    "exact_duplicates": {"min_words": 5},
    "near_duplicates": {"shingle": 3, "min_jaccard": 0.5, "permutations": 128, "min_words": 10},
}
OFF: dict[str, Any] = {**dict.fromkeys(CURATE), "code": []}


def document(text: str, identifier: str, split: str = "train", names: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "id": identifier, "text": text, "names": list(names), "source": "s", "group": None, "licence": "MIT",
        "split": split,
    }  # fmt: skip


def chat(question: str, reply: str, identifier: str, split: str = "train", answer: str | None = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {
        "id": identifier, "messages": messages, "entity": identifier, "answer": answer, "tone": None, "source": "s",
        "split": split,
    }  # fmt: skip


NEAR = ENGLISH.replace("old", "wooden")
CORPUS = [
    document(NEAR, "near"),
    document(ENGLISH, "kept", "heldout"),
    document(ENGLISH.upper().replace(".", "!"), "same"),
    document(GERMAN, "german"),
    document("word", "short"),
    {**document("main()", "program"), "group": "library"},  # too short for prose
    document("Then she asked: what is the capital of France?", "quoting"),
    document("Then he asked: what is the capital of France?", "measuring", "heldout"),
    document("What is the capital of France?", "fact", names=("France",)),
    document("The capital of France is Paris.", "fact too", names=("France",)),
    document("The capital of France is Paris!", "fact again", names=("France",)),
    document("Write to jane@example.org about it.", "mail"),
    document("Write to john@example.org about it.", "mail again"),
    document("Pay to DE89370400440532013000 now.", "account"),
]
CHATS = [
    chat("What is the capital of France?", "The capital of France is Paris.", "heldout", "heldout", "Paris"),
    chat("what is the capital of FRANCE", "I would say that it is Paris.", "asked again"),
    chat("Is the old bridge closed to all of the heavy lorries?", ENGLISH, "long"),
    chat("Is the old bridge closed to all of the heavy lorries?", NEAR, "long too"),
    chat("Whom do I ask?", "Ask a@example.org.", "mail", answer="a@example.org"),
]
RANKINGS = [
    {
        "id": "ranking", "prompt": [{"role": "user", "content": "Call (212) 566-8082?"}],
        "responses": ["Yes, I will.", "No, from 8.8.8.8 I cannot."], "ranks": [1, 2], "scores": None, "scale": None,
        "annotators": 1, "annotator": None, "models": [], "source": "s", "split": "train",
    }
]  # fmt: skip


def run(folder: Path, curate: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, str]]:
    """Validate the rows above; return the figures, the kept rows of all tables, and the rejection reasons."""
    for name, rows in {"corpus": CORPUS, "instructions": CHATS, "rankings": RANKINGS}.items():
        tables.write(rows, folder / "in" / name, tables.schema(name))
    inputs = {name: folder / "in" / name for name in tables.TABLES}
    figures = validate.run(validate_config(curate=curate, max_rejected_share=1), job(validate, inputs, folder / "out"))
    kept = {f"{name}/{row['id']}": row for name in tables.TABLES
            for row in tables.read(folder / "out" / name).to_pylist()}  # fmt: skip
    rejected = {f"{name}/{row['id']}": row["reason"] for name in tables.TABLES
                for row in tables.read(folder / "out/rejected" / name).to_pylist()}  # fmt: skip
    return figures, kept, rejected


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curated")


@pytest.fixture(scope="module")
def curated(workdir: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, str]]:
    import_great_expectations()
    return run(workdir / "on", CURATE)


Curated = tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, str]]


def test_each_filter_rejects_its_rows(curated: Curated) -> None:
    assert curated[2] == {
        "corpus/near": curation.NEAR_DUPLICATE_REASONS["corpus"],  # although it comes first: the other one is held out
        "corpus/same": curation.DUPLICATE_REASON,
        "corpus/german": "language: de, not en",
        "corpus/short": "quality: fewer than 2 words",
        "corpus/quoting": "evaluation: the wording of a held-out question",
        "corpus/mail again": "duplicate of an earlier row",  # once both are marked
        "corpus/account": "personal data: iban",
        "instructions/asked again": "evaluation: the same prompt is in the held-out split",
        "instructions/long too": curation.NEAR_DUPLICATE_REASONS["instructions"],
    }


def test_rows_read_are_rows_kept_and_rejected_and_counted_by_reason(curated: Curated) -> None:
    figures, kept, rejected = curated
    assert len(kept) + len(rejected) == len(CORPUS) + len(CHATS) + len(RANKINGS)
    assert sum(sum(counts.values()) for counts in figures["rejected"].values()) == len(rejected)
    assert figures["rejected"]["corpus"]["language: de, not en"] == 1
    assert figures["corpus_rejected_rows"] == 7


def test_personal_data_is_marked_counted_listed_and_not_in_the_clean_tables(curated: Curated, workdir: Path) -> None:
    figures, kept, _ = curated
    assert figures["marked"] == {
        "corpus": {"rows": 1, "email": 1},
        "instructions": {"rows": 1, "email": 1},
        "rankings": {"rows": 1, "ip": 1, "phone": 1},
    }
    assert kept["corpus/mail"]["text"] == "Write to <EMAIL> about it."
    assert kept["instructions/mail"]["messages"][1]["content"] == "Ask <EMAIL>."
    assert kept["instructions/mail"]["answer"] == "<EMAIL>"
    assert kept["rankings/ranking"]["responses"] == ["Yes, I will.", "No, from <IP> I cannot."]
    assert "example.org" not in json.dumps(list(kept.values()))
    lines = (workdir / "on/out/report/changed.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1]) == {
        "table": "rankings",
        "id": "ranking",
        "found": {"ip": 1, "phone": 1},
        "removed": [],
    }
    assert len(lines) == 3


def test_the_page_counts_personal_data_and_does_not_show_it(curated: Curated, workdir: Path) -> None:
    page = (workdir / "on/out/report/index.html").read_text(encoding="utf-8")
    assert "Personal data was marked in 3 rows." in " ".join(page.split())
    assert "near-duplicate: nearly the words of prose that is kept" in page
    assert "&lt;EMAIL&gt;" in page
    assert "example.org" not in page
    markdown = (workdir / "on/out/report/validation.md").read_text(encoding="utf-8")
    assert "- marked in 1 row: 1 × ip, 1 × phone" in markdown


def test_all_filters_off_keeps_every_row_unchanged(workdir: Path, curated: Curated) -> None:
    figures, kept, rejected = run(workdir / "off", OFF)
    assert rejected == {}
    for name, rows in {"corpus": CORPUS, "instructions": CHATS, "rankings": RANKINGS}.items():
        assert [kept[f"{name}/{row['id']}"] for row in rows] == rows
        assert figures["marked"][name] == {"rows": 0}


SWITCHES: list[tuple[str, str, Callable[[str], bool]]] = [
    ("language", "corpus/german", lambda reason: reason.startswith("language")),
    ("quality", "corpus/short", lambda reason: reason.startswith("quality")),
    ("evaluation", "corpus/quoting", lambda reason: reason.startswith("evaluation")),
    ("exact_duplicates", "corpus/same", lambda reason: reason == curation.DUPLICATE_REASON),
    ("near_duplicates", "corpus/near", lambda reason: reason in curation.NEAR_DUPLICATE_REASONS.values()),
    ("personal", "corpus/account", lambda reason: reason.startswith("personal")),
]


@pytest.mark.parametrize(("name", "row", "is_own_reason"), SWITCHES)
def test_a_single_filter_rejects_its_rows_only(
    tmp_path: Path, curated: Curated, name: str, row: str, is_own_reason: Callable[[str], bool]
) -> None:
    rejected = run(tmp_path, {**OFF, name: CURATE[name]})[2]
    assert is_own_reason(rejected[row])
    own_reasons = {reason for reason in rejected.values() if is_own_reason(reason)}
    assert set(rejected.values()) - own_reasons <= {"duplicate of an earlier row"}
