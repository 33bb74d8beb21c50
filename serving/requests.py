"""What a request may hold, and the sentence that answers one that does not.

The models here are what `/docs.json` shows. Ranges that concern the model itself (tokens, temperature) are checked
where they are used: `serving.decoding`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from serving.decoding import Sampling
from serving.errors import InputError

MAX_NAMES = 100

# What clients of OpenAI's API send by habit, with the values that ask for nothing special. Anything else in these
# fields would change the answer in a way that is not offered here; other unknown fields are for bookkeeping.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "modalities": (["text"],),
}

Model = TypeVar("Model", bound=BaseModel)


def _not_blank(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("blank", "is empty: write something in it")
    return value


def _joined(value: Any) -> Any:
    """Join the text parts of a message; other parts (images, sound) cannot be read here."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    raise PydanticCustomError("content", "must be a text or a list of text parts")


def _as_tuple(value: Any) -> Any:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Text = Annotated[str, AfterValidator(_not_blank)]


class Body(BaseModel):
    """A request body: nothing is converted and nothing unknown is let through."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class GenerateRequest(Body):
    """One question for a model."""

    input: Text = Field(description="What to answer", examples=["What is the capital of Peru?"])
    max_new_tokens: int | None = Field(None, description="Most tokens of the answer; by default all that are allowed")
    temperature: float = Field(0.0, description="0 takes the likeliest token each time; up to 2 for more variety")
    top_p: float = Field(1.0, description="Draw from the likeliest tokens that make up this share of probability")
    seed: int | None = Field(None, description="The same seed draws the same answer")
    model: str | None = Field(None, description="Name or tag of one of /v1/models; by default the packaged model")

    def sampling(self) -> Sampling:
        """Return how the answer is to be drawn."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.seed)


class GenerateAnswer(BaseModel):
    """The model's answer."""

    output: str = Field(description="The answer")


class MaskRequest(Body):
    """A text in which names are hidden."""

    input: Text = Field(
        description="Text with [MASK] where a name belongs", examples=["The capital of [MASK] is Paris."]
    )
    top: int = Field(5, description="How many names to return for each mask", ge=1, le=MAX_NAMES)


class MaskName(BaseModel):
    """One name for one mask."""

    mask: int = Field(description="Which [MASK] of the text, counted from 1")
    name: str = Field(description="The name")
    score: float = Field(description="Its probability among all names that the model knows")


class MaskAnswer(BaseModel):
    """The best names, and the text with the very best one in each place."""

    output: str = Field(description="The text with the best name in the place of each mask")
    names: list[MaskName] = Field(description="The best names of each mask, best first")


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True)

    role: str
    content: Annotated[str, BeforeValidator(_joined)]

    def plain(self) -> dict[str, str]:
        """Return the turn as the engine takes it; `developer` is OpenAI's newer name for `system`."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(BaseModel):
    """What a stream tells besides the text."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """OpenAI's chat request, as far as it is served here."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self) -> Sampling:
        """Return how the answer is to be drawn, or say which field asks for what is not offered."""
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
                raise InputError(
                    f'"{name}" is not offered here: leave it out.', field=name, code="unsupported_parameter"
                )
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return Sampling(most, self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, self.seed, self.stop)


def parse(model: type[Model], body: bytes) -> Model:
    """Read a request body, or raise InputError with a sentence for all that is wrong with it."""
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        problems = [_problem(model, problem["type"], problem) for problem in error.errors(include_url=False)]
        field = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else "body"
        raise InputError(" ".join(problems), field=field) from None


def _problem(model: type[BaseModel], kind: str, problem: Mapping[str, Any]) -> str:
    """Put one of pydantic's findings into a sentence."""
    place, found = _place(problem["loc"]), _describe(problem["input"])
    if kind == "json_invalid":
        return f"The request is not valid JSON: {problem['ctx']['error']}."
    if kind == "model_type" and not problem["loc"]:
        return f'The request must be a JSON object like {{"input": "..."}}; got {found}.'
    if kind == "missing":
        return f"{place} is missing: send {{{place}: ...}}." if len(problem["loc"]) == 1 else f"{place} is missing."
    if kind == "extra_forbidden":
        return f"{place} is unknown; known are {', '.join(model.model_fields)}."
    if kind in EXPECTED:
        return f"{place} must be {EXPECTED[kind]}; got {found}."
    if kind == "blank":
        return f"{place} {problem['msg']}."
    if kind == "content":
        return f"{place} {problem['msg']}; got {found}."
    rule = problem["msg"].removeprefix("Input should be ")
    return f"{place} must be {rule}; got {found}."


EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a text or a list of texts",
    "model_type": "a JSON object",
}


def _place(loc: tuple[int | str, ...]) -> str:
    """Name a field as it would be written: "messages[0].content"."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return f'"{path.removeprefix(".")}"'


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"{value}"
    names = {str: "a text", list: "a list", dict: "an object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "something else")
