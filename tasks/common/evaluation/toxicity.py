"""Toxicity: prompts that draw toxic continuations, and the classifier, trained here on labelled texts, that judges it.

After Gehman et al. 2020, "RealToxicityPrompts": what is scored is the continuation, without its prompt. Nothing is
downloaded; both kinds of files are brought by whoever measures (docs/toxicity.md). They are read when the settings are
checked, so that what is wrong with them is told before anything runs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from tasks.common import draw, identity
from tasks.common.evaluation.candidates import encode
from tasks.common.evaluation.sheet import TOXIC
from tasks.common.modelling import models
from tasks.common.modelling.classifier import Classifier, auc
from tasks.common.settings import Settings
from tasks.common.stage import StageError
from tasks.common.text import chat

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerFast

FOLDER = Path("data/sources/toxicity")
KINDS = (".csv", ".jsonl", ".parquet")
SHOWN = 5  # values that are named in an error
Texts = Sequence[str]


class Toxicity(Settings):
    """Which prompts are continued how often, and which labelled texts teach what is toxic."""

    prompts: str = Field(description="Folder in data/sources/toxicity: a .txt file a category, a prompt a line")
    text: str = Field(description="Column of the labelled texts", min_length=1)
    label: str = Field(description="Column of their labels", min_length=1)
    toxic: list[str] = Field(description="The labels that mean toxic; all others mean that a text is not", min_length=1)
    heldout: float = Field(description="Share of the labelled texts that only measure the classifier", gt=0, lt=1)
    labelled: str = Field(description="File in data/sources/toxicity: .csv, .jsonl or .parquet, a labelled text a row")
    ask: Literal["text", "chat"] = Field(
        description="text: a prompt's words are gone on with; chat: they are a user's message, and replied to"
    )
    continuations: int = Field(description="Sampled continuations a prompt", ge=1)
    max_new_tokens: int = Field(description="Longest continuation, in tokens", ge=1)

    @field_validator("prompts", "labelled")
    @classmethod
    def _can_be_read(cls, path: str, info: ValidationInfo) -> str:
        """Refuse what a stage would only miss when all models are made."""
        if not path or Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"the path must lie under {FOLDER}/, or its changes go unnoticed")
        if info.field_name == "prompts":
            prompts_of(FOLDER, path)
        elif {
            "text",
            "label",
            "toxic",
            "heldout",
        } <= info.data.keys():  # what is wrong with one of them is told by itself
            labelled_of(FOLDER, cls.model_construct(**info.data, labelled=path))
        return path


@dataclass(frozen=True)
class Prompt:
    """A prompt and its category."""

    category: str
    text: str

    @property
    def id(self) -> str:
        """The head of the hash of both."""
        return draw.short_id("toxicity", self.category, self.text)


@dataclass(frozen=True)
class Labelled:
    """Different labelled texts, and what of the file was left out."""

    texts: list[str]
    toxic: list[bool]
    rows: int
    duplicates: int
    empty: int

    def side(self, heldout: float, *, held: bool) -> tuple[list[str], list[bool]]:
        """Return the texts of one side; which side a text is on is decided by its words."""
        chosen = [
            place for place, text in enumerate(self.texts) if (draw.share("toxicity", _plain(text)) < heldout) == held
        ]
        return [self.texts[place] for place in chosen], [self.toxic[place] for place in chosen]


@dataclass(frozen=True)
class Judge:
    """The classifier, and what is told of it: what it was trained on, and how well it does on what it was not."""

    classifier: Classifier
    figures: dict[str, Any]

    def score(self, texts: Texts) -> list[float]:
        """Return how likely each text is toxic, between 0 and 1."""
        return [round(float(value), 5) for value in self.classifier.probability(texts)]


def prompts_of(folder: Path, name: str) -> list[Prompt]:
    """Return the prompts, category by category, each once; raise ValueError where there are none."""
    path = folder / name
    files = sorted(path.glob("*.txt"))
    found = [Prompt(file.stem, line) for file in files for line in dict.fromkeys(_lines(file)) if line]
    if not found:
        there = f"{len(files)} empty .txt files" if files else "no .txt file" if path.is_dir() else "no such folder"
        raise ValueError(
            f"{path} should hold a .txt file a category with a prompt a line, and there is {there} "
            "(docs/toxicity.md says where prompts are to be had)"
        )
    return found


def labelled_of(folder: Path, config: Toxicity) -> Labelled:
    """Return the labelled texts; raise ValueError for a file that is missing, is another kind, or has one class."""
    path = folder / config.labelled
    frame = _frame(path, config)
    labels = [_written(value) for value in frame[config.label]]
    unique: dict[str, tuple[str, bool]] = {}
    empty = 0
    for value, label in zip(frame[config.text], labels, strict=True):
        text = value.strip() if isinstance(value, str) else ""
        if text and label:
            unique.setdefault(_plain(text), (text, label in config.toxic))
        else:
            empty += 1
    toxic = [is_toxic for _, is_toxic in unique.values()]
    told = Labelled([text for text, _ in unique.values()], toxic, len(labels), len(labels) - empty - len(unique), empty)
    for held in (False, True):
        if len(set(told.side(config.heldout, held=held)[1])) < 2:
            usual = ", ".join(f"{label!r} ({count})" for label, count in Counter(labels).most_common(SHOWN)) or "none"
            raise ValueError(
                f"{path} should teach two classes, both also among the texts that are held out, and {sum(toxic)} "
                f"of its {len(toxic)} different texts are labelled {' or '.join(map(repr, config.toxic))}; the labels "
                f"in its column {config.label!r} are {usual}"
            )
    return told


def learn(folder: Path, config: Toxicity, references: Texts) -> Judge:
    """Train the classifier and measure it on the held-out texts.

    `references` are replies that people would have the models give. What it makes of them is told beside its accuracy:
    labelled texts are seldom of the kind that a model writes.
    """
    import numpy as np

    labelled = labelled_of(folder, config)
    texts, toxic = labelled.side(config.heldout, held=False)
    classifier = Classifier.fit(texts, toxic)
    held, right = labelled.side(config.heldout, held=True)
    found, truth = classifier.probability(held), np.array(right)
    hits = (found > TOXIC) == truth
    by_class = {"toxic": hits[truth].mean(), "not_toxic": hits[~truth].mean()}
    clean = classifier.probability(references)
    return Judge(classifier, {
        "file": config.labelled,
        "sha256": identity.file_hash(folder / config.labelled),
        "rows": labelled.rows,
        "duplicates": labelled.duplicates,
        "empty": labelled.empty,
        "toxic": sum(labelled.toxic),
        "not_toxic": len(labelled.toxic) - sum(labelled.toxic),
        "trained_on": len(texts),
        "words": len(classifier.columns),
        "heldout": len(held),
        "accuracy": round(float(hits.mean()), 4),
        "accuracy_of_the_usual_class": round(float(max(truth.mean(), 1 - truth.mean())), 4),
        "accuracy_by_class": {name: round(float(value), 4) for name, value in by_class.items()},
        "auc": round(auc(found, truth), 4),
        "references": len(references),
        "references_mean": round(float(clean.mean()), 4),
        "references_toxic": round(float((clean > TOXIC).mean()), 4),
    })  # fmt: skip


def told(figures: Mapping[str, Any]) -> str:
    """Return what is said of the classifier where it is used."""
    by_class = figures["accuracy_by_class"]
    return (
        f"toxicity is judged by the words of {figures['trained_on']} texts of {figures['file']} (sha256 "
        f"{figures['sha256'][:12]}; {figures['toxic']} toxic, {figures['not_toxic']} not): right on "
        f"{figures['accuracy']:.1%} of {figures['heldout']} held-out texts ({by_class['toxic']:.1%} of the toxic, "
        f"{by_class['not_toxic']:.1%} of the others; the usual class {figures['accuracy_of_the_usual_class']:.1%}; "
        f"AUC {figures['auc']:.3f}); of {figures['references']} reference replies it calls "
        f"{figures['references_toxic']:.1%} toxic"
    )


def asked(prompt: Prompt, config: Toxicity) -> "str | list[chat.Message]":
    """Return a prompt as a model is given it."""
    return prompt.text if config.ask == "text" else [{"role": "user", "content": prompt.text}]


def must_fit(prompts: Sequence[Prompt], config: Toxicity, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Raise StageError for a prompt that leaves no room for a continuation, and for one that spells a special token."""
    for prompt in prompts:
        named = f"the prompt {prompt.text[:40]!r}... of {config.prompts}/{prompt.category}.txt"
        with models.quiet("transformers"):  # it warns of the first text that is too long
            ids = encode(tokenizer, asked(prompt, config))
        if len(ids) + config.max_new_tokens > tokenizer.model_max_length:
            raise StageError(
                f"{named} has {len(ids)} tokens, which with evaluate.toxicity.max_new_tokens "
                f"({config.max_new_tokens}) are more than the context of {tokenizer.model_max_length}: shorten it, or "
                "ask for fewer tokens."
            )
        reserved = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = next((token for token in reserved if token in prompt.text), None)
        if special:
            raise StageError(f"{named} spells {special}, which is reserved for the model itself: leave it out.")


def _frame(path: Path, config: Toxicity) -> "pd.DataFrame":
    import pandas as pd

    if path.suffix not in KINDS:
        raise ValueError(f"{path} should end in {', '.join(KINDS)}, whose kinds of files are read")
    if not path.is_file():
        raise ValueError(f"{path} is not there (docs/toxicity.md says where labelled texts are to be had)")
    try:
        if path.suffix == ".csv":
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        elif path.suffix == ".jsonl":
            frame = pd.read_json(path, lines=True, dtype=False, encoding="utf-8")
        else:
            frame = pd.read_parquet(path)
    except (ValueError, OSError) as error:  # pandas' and Arrow's errors of form are ValueErrors
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]} in UTF-8: {error}") from error
    missing = [column for column in (config.text, config.label) if column not in frame.columns]
    if missing:
        columns = ", ".join(map(str, frame.columns)) or "none"
        raise ValueError(
            f"{path} has no column {' and no column '.join(map(repr, missing))}; its columns are {columns}"
        )
    return frame


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} should be text in UTF-8 ({error})") from error


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _written(value: Any) -> str:
    """Return a label as it would stand in a CSV; empty where there is none."""
    import pandas as pd

    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None or pd.isna(value) else str(value).strip()
