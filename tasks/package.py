"""Collect what is served in one folder: a chat model, an encoder, a classifier or several, with their provenance.

Run as `python -m tasks.package`. It fails if a gate failed. The package is identified by the recipes and content hashes
of its models; a recipe covers the parents. `provenance.json` holds the records of all stages that led to the models and
of their evaluations, and the sources: those of the data, and every folder that the user provided, with file hashes.
`examples.json` holds prompts of the project's own data, which the pages and the command line show and offer.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from tasks.common import identity, tables
from tasks.common.harness import execution
from tasks.common.harness.job import Job, Link, StageError
from tasks.common.harness.lineage import DATA_STAGES, lineage, needed_stages, user_sources
from tasks.common.harness.records import write_json
from tasks.common.settings import PACKAGE_PARTS, Settings

NUMERICS = False  # no model computes here
TABLES = ("corpus", "instructions", "rankings")
INPUTS: dict[str, str] = {}
OUTPUTS = {name: f"data/package/{name}" for name in (*PACKAGE_PARTS, "examples.json", "provenance.json")}
SPACE_MARKS = ("Ġ", "▁")  # that begin a word in a byte-level vocabulary and in SentencePiece's
WORD_PATTERN = re.compile(r"[^\W\d_]+")
MAX_PROMPTS = 500  # to rank
MAX_SAMPLES = 3
SHORT_CHARACTERS = 200  # a sample is one line on a page
MASK = "[MASK]"
MAX_TEXTS = 5_000  # of a split, searched for one to mask
MAX_WORDS = 5_000  # candidates for the encoder if the corpus has no names
NO_SCORECARD: dict[str, Any] = {"models": [], "gates": [], "evaluations": {}, "toxicity": None}  # of a mere export


Messages = list[dict[str, str]]


class Config(Settings):
    """Settings of the package: its models, and whether a failed gate stops it."""

    chat: str | None = Field(default=None, description="Folder of the chat model: data/quantize/ENTRY/model")
    encoder: str | None = Field(default=None, description="Folder of the encoder: data/quantize/ENTRY/model")
    classifier: str | None = Field(
        default=None, description="Folder of the classifier or regressor: data/quantize/ENTRY/model"
    )
    refuse_failed_gates: bool = Field(default=True, description="Whether a failed gate stops the run here")

    @model_validator(mode="after")
    def _validate_contents(self) -> "Config":
        if not self.contents:
            raise ValueError("nothing would be served: set chat, encoder or classifier to a folder of quantize")
        return self

    @property
    def contents(self) -> dict[str, str]:
        """The model folders by their names in the package."""
        return {part: path for part in PACKAGE_PARTS if (path := getattr(self, part)) is not None}


def graph_inputs(config: Config, links: Sequence[Link]) -> dict[str, str]:
    """Return the models, the data, and the records of all stages that led to them and of the evaluations of these."""
    ancestors = lineage(links, config.contents.values())
    ancestor_folders = {link.folder for link in links if link.name in ancestors}
    ancestor_inputs = {path for link in links if link.name in ancestors for path in link.reads}
    evaluations = [
        link for link in links if link.stage == "evaluate" and link.reads[0] in ancestor_folders | ancestor_inputs
    ]
    rewards = [link.folder for link in links if link.stage == "reward"] if evaluations else []
    names = [*dict.fromkeys([*ancestors, *lineage(links, rewards), *(link.name for link in evaluations)])]
    needed = needed_stages(links)
    data = {table: f"data/validate/{table}" for table in TABLES} if "validate" in needed else {}
    data |= {"sources": "data/ingest/sources.json"} if "ingest" in needed else {}
    names = [*(name for name in (*DATA_STAGES, "compare") if name in needed), *names]
    records = {f"record of {name}": f"data/{name.replace('@', '/')}/record.json" for name in names}
    return config.contents | data | records


def run(config: Config, job: Job) -> dict[str, Any]:
    """Write the package and return its metrics; raise StageError if a gate failed."""
    records = {
        name.removeprefix("record of "): json.loads(path.read_text(encoding="utf-8"))
        for name, path in job.inputs.items()
        if name.startswith("record of ")
    }
    evaluation = records["compare"]["metrics"] if "compare" in records else NO_SCORECARD
    failed = [gate for gate in evaluation["gates"] if not gate["passed"]]
    if failed and config.refuse_failed_gates:
        raise StageError(
            f"{len(failed)} of {len(evaluation['gates'])} gates failed, so nothing was packaged: "
            f"{'; '.join(map(describe_gate, failed))}. See metrics/evaluate.json; train longer, or change "
            "compare.gates in params.yaml if the limit is wrong."
        )
    served = [records["@".join(Path(path).parts[1:3])] for path in config.contents.values()]
    recipe, content = (identity.hash_json([record[part] for record in served]) for part in ("recipe", "content"))
    tag = identity.tag(recipe, content)
    for part in PACKAGE_PARTS:
        if part in config.contents:
            shutil.copytree(job.inputs[part], job.outputs[part])
        else:
            job.outputs[part].mkdir()  # DVC requires every output to exist
    names = fill_candidates(job.inputs.get("corpus"), job.inputs["encoder"]) if config.encoder else []
    if config.encoder:
        write_json(job.outputs["encoder"] / "names.json", names)
    write_json(job.outputs["examples.json"], make_examples(config, job.inputs, records))
    stages = order_records(records)
    sources = json.loads(job.inputs["sources"].read_text(encoding="utf-8")) if "sources" in job.inputs else []
    write_json(job.outputs["provenance.json"], {
        "model": tag, "recipe": recipe, "content": content, "contents": config.contents, "stages": stages,
        "sources": [*sources, *user_sources(stages)], "evaluation": evaluation,
    })  # fmt: skip
    size = sum(path.stat().st_size for part in PACKAGE_PARTS for path in job.outputs[part].iterdir())
    return {"model": tag, "bytes": size, "names": len(names), "gates_failed": len(failed)}


def describe_gate(gate: dict[str, Any]) -> str:
    """Describe a failed gate: `exact_match_heldout of pruned against tuned: -0.05, but at least -0.03`."""
    models = gate["model"] + (
        f" {'relative to' if gate.get('relative') else 'against'} {gate['against']}" if "against" in gate else ""
    )
    limits = [f"{word} {gate[key]:g}" for key, word in (("min", "at least"), ("max", "at most")) if key in gate]
    value = "no value" if gate["value"] is None else f"{gate['value']:g}"
    return f"{gate['metric']} of {models}: {value}, but {' and '.join(limits)}"


def order_records(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records: those of the data stages first, that of `compare` last."""
    first, last = ([name for name in names if name in records] for names in (DATA_STAGES, ("compare",)))
    order = dict.fromkeys([*first, *(name for name in records if name not in last), *last])
    return [records[name] for name in order]


def make_examples(
    config: Config, inputs: Mapping[str, Path], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return prompts to rank, a few of them as samples for people, a text with a mask and one to classify.

    They are empty or null without data, and for a part that is not packaged.
    """
    prompts, texts = (
        find_prompts(inputs, trained_sources(part, records)) if part else []
        for part in (config.chat, config.classifier)
    )
    return {
        "prompts": prompts,
        "samples": choose_samples(prompts),
        "masked": find_masked_text(inputs["corpus"]) if config.encoder and "corpus" in inputs else None,
        "classified": next(iter(choose_samples(texts)), None),
    }


def trained_sources(folder: Any, records: Mapping[str, Mapping[str, Any]]) -> Sequence[str] | None:
    """Return the sources whose conversations a model was last trained on, by its records; None: all of them."""
    record = records.get("@".join(Path(str(folder)).parts[1:3]))
    if record is None or "settings" not in record:
        return None
    found: Sequence[str] | None = record["settings"].get("sources")
    return found or trained_sources(record["settings"].get("model"), records)


def find_prompts(inputs: Mapping[str, Path], sources: Sequence[str] | None = None) -> list[Messages]:
    """Return prompts that nothing was trained on, without duplicates, one about each entity before the next one.

    They are those of the held-out conversations. Without any, they are those of the other conversations, and in a
    project without conversations those of the rankings. `sources` are the sources of the conversations; None: all.
    """
    for table in ("instructions", "rankings") if "instructions" in inputs else ():
        for split in ("heldout", "train"):
            chosen = sources if table == "instructions" else None
            rows = sorted(tables.read(inputs[table], split, chosen).to_pylist(), key=lambda row: str(row["id"]))
            prompts = list(islice(_distinct(_alternate(rows)), MAX_PROMPTS))
            if prompts:
                return prompts
    return []


def _alternate(rows: Iterable[dict[str, Any]]) -> Iterator[Messages]:
    """Yield the first prompt about every entity, then every second one, and so on."""
    seen: Counter[str] = Counter()
    rounds: list[tuple[int, Messages]] = []
    for row in rows:
        prompt = row["prompt"] if "prompt" in row else row["messages"][:-1]
        entity = row.get("entity") or row["id"]
        if prompt and prompt[-1]["role"] == "user":
            rounds.append((seen[entity], prompt))
            seen[entity] += 1
    yield from (prompt for _, prompt in sorted(rounds, key=lambda item: item[0]))


def _distinct(prompts: Iterable[Messages]) -> Iterator[Messages]:
    seen: set[str] = set()
    for prompt in prompts:
        key = json.dumps(prompt)
        if key not in seen:
            seen.add(key)
            yield prompt


def choose_samples(prompts: Sequence[Messages]) -> list[str]:
    """Return a few first questions of a conversation, those without a system message and short ones first."""
    questions = [
        (len(prompt) > 1, len(prompt[-1]["content"]) > SHORT_CHARACTERS, prompt[-1]["content"])
        for prompt in prompts
        if [turn["role"] for turn in prompt].count("user") == 1
    ]
    ordered = sorted(questions, key=lambda item: item[:2])
    return list(dict.fromkeys(question for *_, question in ordered))[:MAX_SAMPLES]


def find_masked_text(corpus: Path) -> str | None:
    """Return a short text of the corpus, held out if possible, with a mask for a name or else for its last word."""
    columns = ("names", "text")
    rows = [
        row
        for split in ("heldout", "train")
        for row in tables.read(corpus, split).slice(0, MAX_TEXTS).select(columns).to_pylist()
        if len(row["text"]) <= SHORT_CHARACTERS and MASK not in row["text"]
    ]
    for row in sorted(rows, key=lambda row: not row["names"]):
        hidden = row["names"] or WORD_PATTERN.findall(row["text"])[1:][-1:]
        found = re.search(rf"(?<!\w){re.escape(hidden[0])}(?!\w)", row["text"]) if hidden else None
        if found:
            return f"{row['text'][: found.start()]}{MASK}{row['text'][found.end() :]}"
    return None


def fill_candidates(corpus: Path | None, encoder: Path) -> list[str]:
    """Return the candidates for a mask: the names in the corpus, or else its most frequent words.

    In a project without a corpus they are whole words of the encoder's vocabulary.
    """
    rows = tables.read(corpus, "train").select(["names", "text"]).to_pylist() if corpus else []
    names = sorted({name for row in rows for name in row["names"]})
    if names:
        return names
    words = Counter(word for row in rows for word in WORD_PATTERN.findall(row["text"]))
    found = sorted(words, key=lambda word: (-words[word], word)) or vocabulary_words(encoder)
    if not found:
        raise StageError(
            "neither the corpus nor the encoder's vocabulary contains words, so there are no candidates for a [MASK]; "
            "add a text source to `ingest.sources`, or set package.encoder to null."
        )
    return sorted(found[:MAX_WORDS])


def vocabulary_words(encoder: Path) -> list[str]:
    """Return the whole words of a tokenizer's vocabulary, in the order of their ids, which is often by frequency.

    They begin with a mark of a space (Ġ, ▁), or do not continue a word (##). Single characters are words only where
    most words have one, as in Chinese.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    special = tokenizer.get_added_tokens_decoder()
    ids = {
        token: index for token, index in tokenizer.get_vocab(with_added_tokens=False).items() if index not in special
    }
    pieces = any(token.startswith("##") for token in ids)
    whole = [token for token in ids if (not token.startswith("##") if pieces else token[:1] in SPACE_MARKS)]
    decoded = (tokenizer.decode([ids[token]]).strip() for token in sorted(whole, key=ids.__getitem__))
    words = [word for word in dict.fromkeys(decoded) if word.isalpha()]
    longer = [word for word in words if len(word) > 1]
    return longer if 2 * len(longer) >= len(words) else words


if __name__ == "__main__":
    execution.main("tasks.package")
