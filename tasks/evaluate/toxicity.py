"""Toxicity: prompts that elicit toxic continuations, and a classifier, trained here on labelled texts, to score them.

After Gehman et al. 2020, "RealToxicityPrompts": the continuation is scored without its prompt. Nothing is downloaded;
the user provides both kinds of files (docs/guides/toxicity.md). They are read when the settings are checked, so that
errors in them are reported before anything runs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from tasks.common import identity, stable_hash
from tasks.common.evaluation.scorecard import TOXICITY_THRESHOLD
from tasks.common.harness.job import StageError
from tasks.common.random_streams import Stream
from tasks.common.text import chat
from tasks.evaluate.classifier import Classifier, auc
from tasks.evaluate.evaluation import Evaluation, Facts, Result, Row
from tasks.evaluate.models_under_test import Decoder

if TYPE_CHECKING:
    import pandas as pd

    from tasks.evaluate.subject import Subject

FOLDER = Path("data/sources/toxicity")
FILE_SUFFIXES = (".csv", ".jsonl", ".parquet")
MAX_SHOWN_LABELS = 5  # labels listed in an error message
Texts = Sequence[str]


class Toxicity(Evaluation):
    """Toxicity of continuations of prompts that elicit it, by a classifier that is trained on labelled texts."""

    KIND: ClassVar[str] = "toxicity"
    APPLIES_TO: ClassVar[str] = "Causal models; with `ask: chat`, those with a chat template."
    INPUTS: ClassVar[tuple[str, ...]] = ("instructions", "toxicity")
    USES_REPLIES: ClassVar[bool] = True  # the temperature, and the questions whose references are classified

    kind: Literal["toxicity"] = Field(description="Kind of evaluation")
    prompts: str = Field(description="Folder in data/sources/toxicity: one .txt file per category, one prompt per line")
    text: str = Field(description="Column that contains the text", min_length=1)
    label: str = Field(description="Column that contains the label", min_length=1)
    toxic: list[str] = Field(description="Labels that mean toxic; all others mean not toxic", min_length=1)
    heldout: float = Field(
        default=0.2, description="Share of the labelled texts held out to measure the classifier", gt=0, lt=1
    )
    labelled: str = Field(
        description="File in data/sources/toxicity: .csv, .jsonl or .parquet, one labelled text per row"
    )
    ask: Literal["text", "chat"] = Field(
        default="text",
        description="text: continue the prompt as plain text; chat: reply to it as a user message",
    )
    continuations: int = Field(default=4, description="Sampled continuations per prompt", ge=1)
    max_new_tokens: int = Field(default=20, description="Maximum length of a continuation, in tokens", ge=1)

    @field_validator("prompts", "labelled")
    @classmethod
    def _validate_files(cls, path: str, info: ValidationInfo) -> str:
        """Read the files now: the stage itself runs only after all models are trained."""
        if not path or Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"the path must be relative to {FOLDER}/ and inside it, so that DVC tracks the file")
        if info.field_name == "prompts":
            read_prompts(FOLDER, path)
        elif {
            "text",
            "label",
            "toxic",
            "heldout",
        } <= info.data.keys():  # an invalid one has an error of its own
            read_labelled_texts(FOLDER, cls.model_construct(**info.data, labelled=path))
        return path

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return the mean, and the share of toxic continuations."""
        return ("toxicity_mean", "toxic_share")

    def measure(self, subject: "Subject") -> Result:
        """Sample continuations of each prompt and classify them."""
        job, decoder = subject.job, subject.decoder
        prompts = read_prompts(job.inputs["toxicity"], self.prompts)
        if decoder.max_reply_tokens(as_model_input(prompts[0], self)) is None:
            return Result(absent="the model has no chat template")
        check_prompts_fit(prompts, self, decoder)
        references = sorted({row["messages"][-1]["content"] for row in subject.questions or subject.table})
        classifier = train_classifier(job.inputs["toxicity"], self, references)
        print(describe_classifier(classifier.figures))
        repeated = [prompt for prompt in prompts for _ in range(self.continuations)]
        inputs = [as_model_input(prompt, self) for prompt in repeated]
        temperature = subject.config.temperature
        texts = subject.replies(inputs, self.max_new_tokens, temperature, Stream.CONTINUATIONS, "continuations")
        scores = classifier.score(texts)
        rows: list[Row] = [
            {"id": prompt.id, "entity": prompt.category, "split": "heldout", "kind": "continuation",
             "question": prompt.text, "reply": text, "toxicity": score}
            for prompt, text, score in zip(repeated, texts, scores, strict=True)
        ]  # fmt: skip
        figures = {
            "toxicity_mean": round(sum(scores) / len(scores), 4),
            "toxic_share": round(sum(score > TOXICITY_THRESHOLD for score in scores) / len(scores), 4),
        }
        details = {"classifier": classifier.figures, "ask": self.ask, "prompts": len(prompts),
                   "continuations": len(texts)}  # fmt: skip
        return Result(figures, rows, details=details)


@dataclass(frozen=True)
class Prompt:
    """A prompt and its category."""

    category: str
    text: str

    @property
    def id(self) -> str:
        """Short hash of both."""
        return stable_hash.short_id("toxicity", self.category, self.text)


@dataclass(frozen=True)
class Labelled:
    """Distinct labelled texts, and how many rows of the file were duplicates or empty."""

    texts: list[str]
    toxic: list[bool]
    rows: int
    duplicates: int
    empty: int

    def split(self, heldout: float, *, in_heldout: bool) -> tuple[list[str], list[bool]]:
        """Return texts and labels of one split; a text's normalized words decide its split."""
        chosen = [
            index
            for index, text in enumerate(self.texts)
            if (stable_hash.uniform("toxicity", _normalize(text)) < heldout) == in_heldout
        ]
        return [self.texts[index] for index in chosen], [self.toxic[index] for index in chosen]


@dataclass(frozen=True)
class ToxicityClassifier:
    """A trained classifier with its figures: the training data and the accuracy on held-out texts."""

    classifier: Classifier
    figures: dict[str, Any]

    def score(self, texts: Texts) -> list[float]:
        """Return the probability that each text is toxic."""
        return [round(float(value), 5) for value in self.classifier.probability(texts)]


def read_prompts(folder: Path, name: str) -> list[Prompt]:
    """Return the distinct prompts by category; raise ValueError if there are none."""
    path = folder / name
    files = sorted(path.glob("*.txt"))
    found = [Prompt(file.stem, line) for file in files for line in dict.fromkeys(_read_lines(file)) if line]
    if not found:
        found_instead = (
            f"{len(files)} empty .txt files" if files else "no .txt file" if path.is_dir() else "no such folder"
        )
        raise ValueError(
            f"{path} should contain one .txt file per category with one prompt per line, found {found_instead} "
            "(docs/guides/toxicity.md says where to get prompts)"
        )
    return found


def read_labelled_texts(folder: Path, config: Toxicity) -> Labelled:
    """Return the labelled texts; raise ValueError if the file is missing, unreadable, or lacks one of the classes."""
    path = folder / config.labelled
    frame = _read_frame(path, config)
    labels = [_label_text(value) for value in frame[config.label]]
    unique: dict[str, tuple[str, bool]] = {}
    empty = 0
    for value, label in zip(frame[config.text], labels, strict=True):
        text = value.strip() if isinstance(value, str) else ""
        if text and label:
            unique.setdefault(_normalize(text), (text, label in config.toxic))
        else:
            empty += 1
    toxic = [is_toxic for _, is_toxic in unique.values()]
    labelled = Labelled(
        [text for text, _ in unique.values()], toxic, len(labels), len(labels) - empty - len(unique), empty
    )
    for in_heldout in (False, True):
        if len(set(labelled.split(config.heldout, in_heldout=in_heldout)[1])) < 2:
            usual = (
                ", ".join(f"{label!r} ({count})" for label, count in Counter(labels).most_common(MAX_SHOWN_LABELS))
                or "none"
            )
            raise ValueError(
                f"{path} should contain toxic and other texts, both also among the held-out texts; found {sum(toxic)} "
                f"of {len(toxic)} distinct texts labelled {' or '.join(map(repr, config.toxic))}; the labels "
                f"in column {config.label!r} are {usual}"
            )
    return labelled


def train_classifier(folder: Path, config: Toxicity, references: Texts) -> ToxicityClassifier:
    """Train the classifier and measure it on the held-out texts.

    `references` are reference replies of the instructions. Their toxicity is reported beside the accuracy, because the
    labelled texts are rarely similar to what a model writes.
    """
    import numpy as np

    labelled = read_labelled_texts(folder, config)
    texts, toxic = labelled.split(config.heldout, in_heldout=False)
    classifier = Classifier.fit(texts, toxic)
    heldout_texts, heldout_toxic = labelled.split(config.heldout, in_heldout=True)
    probabilities, is_toxic = classifier.probability(heldout_texts), np.array(heldout_toxic)
    hits = (probabilities > TOXICITY_THRESHOLD) == is_toxic
    by_class = {"toxic": hits[is_toxic].mean(), "not_toxic": hits[~is_toxic].mean()}
    reference_probabilities = classifier.probability(references)
    return ToxicityClassifier(classifier, {
        "file": config.labelled,
        "sha256": identity.file_hash(folder / config.labelled),
        "rows": labelled.rows,
        "duplicates": labelled.duplicates,
        "empty": labelled.empty,
        "toxic": sum(labelled.toxic),
        "not_toxic": len(labelled.toxic) - sum(labelled.toxic),
        "trained_on": len(texts),
        "words": len(classifier.vocabulary),
        "heldout": len(heldout_texts),
        "accuracy": round(float(hits.mean()), 4),
        "majority_class_accuracy": round(float(max(is_toxic.mean(), 1 - is_toxic.mean())), 4),
        "accuracy_by_class": {name: round(float(value), 4) for name, value in by_class.items()},
        "auc": round(auc(probabilities, is_toxic), 4),
        "references": len(references),
        "references_mean": round(float(reference_probabilities.mean()), 4),
        "references_toxic": round(float((reference_probabilities > TOXICITY_THRESHOLD).mean()), 4),
    })  # fmt: skip


def describe_classifier(figures: Mapping[str, Any]) -> str:
    """Describe the classifier and its accuracy in one sentence."""
    by_class = figures["accuracy_by_class"]
    return (
        f"toxicity classifier trained on {figures['trained_on']} texts of {figures['file']} (sha256 "
        f"{figures['sha256'][:12]}; {figures['toxic']} toxic, {figures['not_toxic']} not): accuracy "
        f"{figures['accuracy']:.1%} on {figures['heldout']} held-out texts ({by_class['toxic']:.1%} of the toxic, "
        f"{by_class['not_toxic']:.1%} of the others; majority class {figures['majority_class_accuracy']:.1%}; "
        f"AUC {figures['auc']:.3f}); it classifies "
        f"{figures['references_toxic']:.1%} of {figures['references']} reference replies as toxic"
    )


def as_model_input(prompt: Prompt, config: Toxicity) -> "str | list[chat.Message]":
    """Return a prompt as plain text or as a user message."""
    return prompt.text if config.ask == "text" else [{"role": "user", "content": prompt.text}]


def check_prompts_fit(prompts: Sequence[Prompt], config: Toxicity, decoder: Decoder) -> None:
    """Raise StageError for a prompt that is too long for a continuation, or that contains a special token."""
    for prompt in prompts:
        prompt_name = f"the prompt {prompt.text[:40]!r}... of {config.prompts}/{prompt.category}.txt"
        special = next((token for token in decoder.special_tokens if token in prompt.text), None)
        if special:
            raise StageError(f"{prompt_name} contains {special}, a special token of the model: remove it.")
        room = decoder.max_reply_tokens(as_model_input(prompt, config))
        if room is not None and room < config.max_new_tokens:
            raise StageError(
                f"{prompt_name} leaves {room} tokens of the model's context, fewer than toxicity.max_new_tokens "
                f"({config.max_new_tokens}): shorten the prompt, or reduce max_new_tokens."
            )


def _read_frame(path: Path, config: Toxicity) -> "pd.DataFrame":
    import pandas as pd

    if path.suffix not in FILE_SUFFIXES:
        raise ValueError(f"{path} should end in {', '.join(FILE_SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist (docs/guides/toxicity.md says where to get labelled texts)")
    try:
        if path.suffix == ".csv":
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        elif path.suffix == ".jsonl":
            frame = pd.read_json(path, lines=True, dtype=False, encoding="utf-8")
        else:
            frame = pd.read_parquet(path)
    except (ValueError, OSError) as error:  # parse errors of pandas and Arrow are ValueErrors
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]} in UTF-8: {error}") from error
    missing = [column for column in (config.text, config.label) if column not in frame.columns]
    if missing:
        columns = ", ".join(map(str, frame.columns)) or "none"
        raise ValueError(
            f"{path} has no column {' and no column '.join(map(repr, missing))}; its columns are {columns}"
        )
    return frame


def _read_lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} should be UTF-8 text ({error})") from error


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split())


def _label_text(value: Any) -> str:
    """Return a label as in a CSV file; empty if it is missing."""
    import pandas as pd

    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None or pd.isna(value) else str(value).strip()
