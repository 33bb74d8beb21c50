"""Examples of the project's own data, packaged with the model: prompts to rank, sample questions, other texts.

`tasks.package` writes them to `examples.json`. A package without the file, or without data, has neutral examples.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serving import folders
from serving.decoding import Sampling
from serving.errors import InputError

if TYPE_CHECKING:
    from serving.package import Package

FILE = "examples.json"
NEUTRAL_QUESTION = "Hello! What can you do?"
NEUTRAL_MASKED = "A [MASK] is missing here."
NEUTRAL_CLASSIFIED = "I like this very much."
SHORT_CHARACTERS = 200  # of a question in the example of a request

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Examples:
    """The examples of a package; each part may be empty."""

    prompts: tuple[Messages, ...] = ()
    samples: tuple[str, ...] = ()
    masked: str | None = None
    classified: str | None = None

    @property
    def question(self) -> str:
        """A question for the example of a request."""
        return next((text for text in self.samples if len(text) <= SHORT_CHARACTERS), NEUTRAL_QUESTION)

    @property
    def masked_text(self) -> str:
        """A text with a mask for the example of a request."""
        return self.masked or NEUTRAL_MASKED

    @property
    def classified_text(self) -> str:
        """A text to classify for the example of a request."""
        return self.classified or NEUTRAL_CLASSIFIED


def read_examples(folder: Path) -> Examples:
    """Return the examples of a package's folder; empty ones if it has none."""
    path = folder / FILE
    if not path.is_file():
        return Examples()
    keys = ("prompts", "samples", "masked", "classified")
    prompts, samples, masked, classified = (folders.read_key(path, key) for key in keys)
    return Examples(tuple(prompts), tuple(samples), masked, classified)


def prompts_to_rank(package: "Package") -> list[Messages]:
    """Return the prompts that the packaged model can answer: those that fit its context, with room for an answer."""
    return [prompt for prompt in package.examples.prompts if package.has_chat and can_answer(package, prompt)]


def can_answer(package: "Package", prompt: Messages) -> bool:
    """Return whether the chat model's template takes a prompt, and whether it leaves room for an answer."""
    from jinja2 import TemplateError

    try:
        package.text.prepare(prompt, Sampling())
    except (InputError, TemplateError):  # a template that fails must not keep the service from starting
        return False
    return True
