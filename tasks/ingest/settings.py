"""Settings of the stage `ingest`."""

from collections import Counter
from typing import Any

from pydantic import Field, field_validator, model_validator

from tasks.common.settings import Settings
from tasks.common.source_names import fill_names
from tasks.ingest.archived_model import Checkpoint
from tasks.ingest.source_settings import Source, SourcePath


class Heldout(Settings):
    """Shares held out of training, chosen by hash."""

    entities: float = Field(
        default=0.1, description="Share of entities that no question in training asks about", ge=0, le=0.9
    )
    prose: float = Field(default=0.02, description="Share of prose held out for perplexity", ge=0, le=0.5)
    rankings: float = Field(
        default=0.1, description="Share of rankings held out to evaluate reward models", ge=0, le=0.5
    )


class Ratings(Settings):
    """How rated sentences become rankings."""

    group: int = Field(default=4, description="Sentences per ranking", ge=2, le=16)
    scale: list[float] = Field(
        default=[1.0, 5.0], description="The two ends of the raters' scale", min_length=2, max_length=2
    )
    in_corpus: float = Field(
        default=0.0, description="Share of the training rankings whose sentences are prose as well", ge=0, le=1
    )


class Config(Settings):
    """Settings of `ingest`."""

    salt: str = Field(
        default="bessemer", description="Salt of every hash; another one gives other splits", min_length=1
    )
    wordings: SourcePath | None = Field(
        default=None, description="File of wordings under data/sources/, which turn facts into sentences"
    )
    names: SourcePath | None = Field(default=None, description="File of entity names under data/sources/")
    relations: list[str] = Field(default=[], description="Relations to use, all of them in the wordings")
    paragraphs: int = Field(default=2, description="Paragraphs about each entity that join its statements", ge=0, le=16)
    heldout: Heldout = Heldout()
    ratings: Ratings = Ratings()
    checkpoint: Checkpoint | None = Field(
        default=None, description="A model that comes with the data, left in data/ingest/checkpoint; null for none"
    )
    sources: list[Source] = Field(description="Where data comes from; later facts override earlier ones")

    @field_validator("sources", mode="before")
    @classmethod
    def _name_sources(cls, sources: Any) -> Any:
        """Give each source without a name one from its path."""
        return fill_names(sources) if isinstance(sources, list) else sources

    @model_validator(mode="after")
    def _check_settings(self) -> "Config":
        twice = [name for name, count in Counter(source.name for source in self.sources).items() if count > 1]
        if twice:
            raise ValueError(f"source names must be unique; found {', '.join(twice)} more than once")
        both = sorted({source.name for source in self.sources} & {str(source.group) for source in self.sources})
        if both:
            raise ValueError(
                f"{', '.join(both)} is the name of both a source and a group, which a mixture cannot distinguish: "
                "rename one of them"
            )
        if self.ratings.scale[0] >= self.ratings.scale[1]:
            raise ValueError(f"ratings.scale must be [low, high], found {self.ratings.scale}")
        return self
