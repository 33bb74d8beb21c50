"""Classify texts with an exported classifier, without torch, or estimate a number with an exported regressor.

A text becomes token ids exactly as in training: as the user's turn of a conversation in the model's chat template, or,
for a model without one, between its special tokens. Texts run one at a time, so that an answer does not depend on its
neighbours.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from serving import folders, names
from serving.engine import EncoderLogits, Message, read_template
from serving.errors import InputError


class LabelScore(NamedTuple):
    """A label and its probability."""

    label: str
    score: float


class Classified(NamedTuple):
    """The labels of a text, best first; for a regressor none, but a value."""

    labels: list[LabelScore]
    value: float | None = None


class ClassifierEngine:
    """A classifier or a regressor in OpenVINO's format; `labels` is None for a regressor."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.tokenizer = folders.load_tokenizer(folder)
        self.context: int = folders.read_key(folder / "limits.json", "context")  # in tokens
        self.labels: list[str] | None = folders.read_json(folder / folders.LABELS_FILE)
        self.template = read_template(folder)
        special = folders.SPECIAL_TOKENS_FILE
        self.ends: tuple[int, int] = (
            folders.read_key(folder / special, "first"), folders.read_key(folder / special, "last"),
        )  # fmt: skip
        self.logits = EncoderLogits(folder, threads)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; raise InputError if it has a control token or is too long."""
        folders.check_reserved_tokens(self.tokenizer, text)
        ids = self.encode_messages([{"role": "user", "content": text}])
        if len(ids) > self.context:
            raise InputError(
                f"The text is too long: it has {len(ids)} tokens, and {self.context} are allowed. Shorten it.",
                field="input", code="context_length_exceeded",
            )  # fmt: skip
        return ids

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation up to where its label begins, without any check."""
        if self.template:
            ids: list[int] = self.tokenizer.encode(self.template.render(messages), add_special_tokens=False).ids
            return ids
        text = "\n".join(message["content"] for message in messages)
        return [self.ends[0], *self.tokenizer.encode(text, add_special_tokens=False).ids, self.ends[1]]

    def run(self, ids: Sequence[int]) -> names.Floats:
        """Return the outputs of a text as token ids: logits of the labels, or the value."""
        row = np.array([ids], np.int64)
        outputs: names.Floats = self.logits(row, np.ones_like(row))[0]
        return outputs

    def classify(self, text: str, top: int | None = None) -> Classified:
        """Return the `top` likeliest labels of a text, by default all, or its value."""
        return self.classify_ids(self.encode(text), top)

    def classify_ids(self, ids: list[int], top: int | None = None) -> Classified:
        """Return the labels or the value of a text as token ids."""
        outputs = self.run(ids)
        if self.labels is None:
            return Classified([], float(outputs[0]))
        scores = names.probabilities(outputs)
        order = np.argsort(-scores, kind="stable")[:top]
        return Classified([LabelScore(self.labels[index], float(scores[index])) for index in order])
