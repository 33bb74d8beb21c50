"""The model under test with the data and replies that several evaluations share; each part is made when first used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from tasks.common import tables
from tasks.common.evaluation import scorecard
from tasks.common.evaluation.results import ResultStore
from tasks.common.harness.job import Job
from tasks.common.modelling import models, torch_setup
from tasks.common.random_streams import Stream, derive_seed
from tasks.common.settings import Settings
from tasks.common.text import chat
from tasks.evaluate.classifiers_under_test import Classifier, open_classifier
from tasks.evaluate.encoders_under_test import Encoder, open_encoder
from tasks.evaluate.evaluation import Row, Rows
from tasks.evaluate.models_under_test import Decoder, Prompt, open_decoder
from tasks.evaluate.seen_text import classify

if TYPE_CHECKING:
    from tasks.common.reward.scoring import Scorer

DEFAULT_NEW_TOKENS = 128


class Config(Settings):
    """The model to evaluate, and how it replies in all evaluations that need replies."""

    model: str = Field(description="Folder of the model to evaluate: an entry's, or your own", min_length=1)
    chat_template: chat.TemplateName = None
    sources: tables.SourceNames = None
    questions: int = Field(
        default=500, description="Maximum number of questions about seen entities, and about held-out entities", ge=1
    )
    samples: int = Field(default=500, description="Number of sampled replies for reward, judge and diversity", ge=2)
    max_new_tokens: int | None = Field(
        default=None,
        description=f"Maximum length of a reply, in tokens; null: {DEFAULT_NEW_TOKENS}, an export's own limit if that "
        "is smaller, and at most half of the model's context",
        ge=1,
    )
    temperature: float = Field(default=1.0, description="Temperature of the sampled replies", gt=0)


class Sampled(NamedTuple):
    """Sampled replies and the rows of the instructions table that they reply to."""

    rows: Rows
    texts: list[str]

    @property
    def exchanges(self) -> list[tuple[Any, str]]:
        """The conversations without their last turn, each with its sampled reply."""
        return [(row["messages"][:-1], text) for row, text in zip(self.rows, self.texts, strict=True)]


@dataclass
class ReplyRoomFilter:
    """Selects the questions that leave room for a reply, by the model's own tokenizer and chat template."""

    decoder: Decoder
    max_new_tokens: int
    too_long: set[str] = field(default_factory=set)

    def __call__(self, row: Row) -> bool:
        room = self.decoder.max_reply_tokens(row["messages"][:-1])
        if room is not None and room < self.max_new_tokens:
            self.too_long.add(row["id"])
        return room is not None and room >= self.max_new_tokens

    def report_skipped(self, name: str) -> None:
        """Print how many questions are skipped because they are too long."""
        if self.too_long:
            reply = f"a reply of {self.max_new_tokens} tokens"
            print(f"{name}: {len(self.too_long)} questions are skipped: no room for {reply}")


@dataclass
class Subject:
    """One model under test."""

    config: Config
    job: Job
    store: ResultStore

    @property
    def path(self) -> Path:
        """The model's folder."""
        return self.job.inputs["model"]

    @cached_property
    def kind(self) -> str | None:
        """causal, masked or classifier; None for another model."""
        return models.model_kind(self.path)

    @cached_property
    def _torch(self) -> None:
        """Set torch up before the first model is loaded; it takes seconds, which stored results save."""
        torch_setup.prepare_torch(self.job.numerics, self.job.seed)

    @cached_property
    def decoder(self) -> Decoder:
        """The causal model."""
        self._torch  # noqa: B018 - once
        return open_decoder(self.path, self.job.numerics, self.config.chat_template)

    @cached_property
    def encoder(self) -> Encoder:
        """The masked model."""
        self._torch  # noqa: B018 - once
        return open_encoder(self.path, self.job.numerics)

    @cached_property
    def classifier(self) -> Classifier:
        """The classifier, or another model with a head."""
        self._torch  # noqa: B018 - once
        return open_classifier(self.path, self.job.numerics, self.config.chat_template)

    def scorer(self, role: str) -> "Scorer":
        """Return the reward model of a role, which must be among the inputs."""
        from tasks.common.reward.scoring import Scorer

        self._torch  # noqa: B018 - once
        return Scorer.load(self.job.inputs[role], self.job.numerics)

    @property
    def size(self) -> Row:
        """The number of parameters and the size of the weights in bytes."""

        def measure() -> Row:
            opened: dict[str | None, Callable[[], Decoder | Encoder | Classifier]] = {
                "causal": lambda: self.decoder, "masked": lambda: self.encoder, "classifier": lambda: self.classifier,
            }  # fmt: skip
            model = opened[self.kind]()
            return {"parameters": model.parameters, "bytes": model.bytes}

        size: Row = self.store.get("size", ["model"], measure)
        return size

    @cached_property
    def max_new_tokens(self) -> int:
        """The maximum length of a reply, in tokens."""
        limit = min(DEFAULT_NEW_TOKENS, self.decoder.longest_reply, self.decoder.context // 2)
        return self.config.max_new_tokens or max(limit, 1)

    @cached_property
    def table(self) -> Rows:
        """The rows of the instructions table, without those that spell a special token of the model.

        Training and the endpoint reject them too.
        """
        rows: Rows = tables.read(self.job.inputs["instructions"], sources=self.config.sources).to_pylist()
        model = self.classifier if self.kind == "classifier" else self.decoder
        controls = model.special_tokens
        plain = [row for row in rows if not chat.spells_control_token(controls, row["messages"])]
        if len(plain) < len(rows):
            print(f"{self.job.name}: {len(rows) - len(plain)} conversations spell special tokens and are rejected")
        return plain

    @cached_property
    def questions(self) -> Rows:
        """The questions that have a short answer and leave room for a reply, about seen entities first."""
        has_room = ReplyRoomFilter(self.decoder, self.max_new_tokens)
        chosen = [
            scorecard.choose_questions(self.table, split, self.config.questions, has_room)
            for split in ("train", "heldout")
        ]
        has_room.report_skipped(self.job.name)
        return [*chosen[0], *chosen[1]]

    @cached_property
    def samples(self) -> Sampled:
        """The sampled replies: to the questions with short answers or, without any, to every conversation."""
        settings = self.config.model_dump(mode="json", exclude={"model"})
        return Sampled(*self.store.get({"samples": settings}, ["model", "instructions"], self._sample))

    def _sample(self) -> Sampled:
        rows = self.questions
        if not rows:
            has_room = ReplyRoomFilter(self.decoder, self.max_new_tokens)
            rows = scorecard.choose_any_questions(self.table, self.config.samples, has_room)
            has_room.report_skipped(self.job.name)
        chosen = scorecard.evenly_spaced(rows, self.config.samples) if rows else []
        prompts = [row["messages"][:-1] for row in chosen]
        texts = self.replies(prompts, self.max_new_tokens, self.config.temperature, Stream.SAMPLES, "samples")
        return Sampled(chosen, texts)

    def mark_seen_text(
        self, rows: Rows, items: Sequence[Sequence[chat.Message]], trained: Sequence[str] = ("instructions",)
    ) -> None:
        """Write into answer rows whether the prompts of their items occur in training rows of the tables `trained`."""
        prompts = [[dict(turn) for turn in item] for item in items]
        folders = [self.job.inputs[table] for table in trained]
        groups = self.store.get({"seen_text": prompts}, trained, lambda: classify(prompts, *folders))
        for row, group in zip(rows, groups, strict=True):
            row["seen_text"] = group

    def replies(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float, stream: Stream, what: str
    ) -> list[str]:
        """Return the model's replies to prompts, stored ones if there are any; `what` is in the progress bar's title.

        Evaluations that ask the same share the replies.
        """
        if not prompts:
            return []

        def generate() -> list[str]:
            seed = derive_seed(self.job.seed, stream)
            return self.decoder.reply(prompts, max_new_tokens, temperature, seed, f"{self.job.name} {what}")

        asked = [prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt] for prompt in prompts]
        settings = {
            "prompts": asked,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "stream": stream.name,
        }
        replies: list[str] = self.store.get({"replies": settings}, ["model"], generate)
        return replies
