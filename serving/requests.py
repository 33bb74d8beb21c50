"""Request schemas and their error messages.

`/docs.json` is generated from these models. Ranges of sampling settings (tokens, temperature) are checked in
`serving.decoding`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from serving.decoding import Sampling
from serving.errors import InputError

MAX_NAMES = 100
MAX_TEXTS = 256  # to classify in one request

# OpenAI parameters that are not supported, with the values that have no effect. Other values are rejected, because they
# would change the answer. Unknown fields that are not listed here are ignored.
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "modalities": (["text"],),
}

Model = TypeVar("Model", bound=BaseModel)


def _not_blank(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("blank", "is empty: add some text")
    return value


def _join_text_parts(value: Any) -> Any:
    """Join the text parts of a message; reject other parts (images, audio) by their type."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    others = [part.get("type") for part in value if not isinstance(part.get("text"), str)]
    if others:
        raise PydanticCustomError(
            "part",
            "has a part of type {kind}; the model reads only text parts: remove it",
            {"kind": str(others[0])},
        )
    return "".join(part["text"] for part in value)


def _no_tool_calls(value: Any) -> Any:
    if value:
        raise PydanticCustomError("part", "is not supported: the model calls no tools. Send the text of the turn alone")
    return None


def _is_no_tool(value: str) -> str:
    if value in ("tool", "function"):
        raise PydanticCustomError(
            "part", "is {role}: tool turns are not supported. Send the tool's result in a user message", {"role": value}
        )
    return value


def _as_tuple(value: Any) -> Any:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Text = Annotated[str, AfterValidator(_not_blank)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple), Field(min_length=1, max_length=MAX_TEXTS)]


class Body(BaseModel):
    """Base of request bodies: no type coercion, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def _with_example(part: str) -> ConfigDict:
    """Return the settings that add an example of the project's own data to a schema, whenever one is made."""

    def add(schema: dict[str, Any]) -> None:
        from serving.examples import read_examples
        from serving.package import package_folder

        schema["properties"]["input"]["examples"] = [getattr(read_examples(package_folder()), part)]

    return ConfigDict(json_schema_extra=add)


class GenerateRequest(Body):
    """One question."""

    model_config = _with_example("question")
    input: Text = Field(description="The question")
    max_new_tokens: int | None = Field(None, description="Maximum number of new tokens; default: the model's limit")
    temperature: float = Field(0.0, description="Sampling temperature from 0 (greedy) to 2")
    top_p: float = Field(1.0, description="Nucleus sampling: cumulative probability of the tokens to sample from")
    seed: int | None = Field(None, description="The same seed gives the same answer")
    model: str | None = Field(None, description="Name or tag of one of /v1/models; default: the packaged model")

    def sampling(self) -> Sampling:
        """Return the sampling settings."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.seed)


class GenerateAnswer(BaseModel):
    """The model's answer."""

    output: str = Field(description="The answer")


class MaskRequest(Body):
    """A text with masked names."""

    model_config = _with_example("masked_text")
    input: Text = Field(description="Text with [MASK] where a name belongs")
    top: int = Field(5, description="How many names to return for each mask", ge=1, le=MAX_NAMES)


class MaskName(BaseModel):
    """One name for one mask."""

    mask: int = Field(description="Number of the [MASK] in the text, from 1")
    name: str = Field(description="The name")
    score: float = Field(description="Its probability among all candidate names")


class MaskAnswer(BaseModel):
    """The best names of each mask, and the text filled with the best one."""

    output: str = Field(description="The text with each mask replaced by its best name")
    names: list[MaskName] = Field(description="The best names of each mask, best first")


class ClassifyRequest(Body):
    """Texts to classify."""

    model_config = _with_example("classified_text")
    input: Texts = Field(
        description="A text, or a list of texts",
        json_schema_extra={"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    )
    top: int | None = Field(None, description="How many labels to return for each text; default: all", ge=1)


class LabelScore(BaseModel):
    """One label of a text."""

    label: str = Field(description="The label")
    score: float = Field(description="Its probability")


class ClassifyResult(BaseModel):
    """What the model says of one text."""

    labels: list[LabelScore] = Field(description="Labels, likeliest first; none from a regression model")
    value: float | None = Field(description="The number that a regression model gives; null from a classifier")


class ClassifyAnswer(BaseModel):
    """The results of all texts, in their order."""

    results: list[ClassifyResult] = Field(description="One result for each text")


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True)

    role: Annotated[str, AfterValidator(_is_no_tool)]
    tool_calls: Annotated[None, BeforeValidator(_no_tool_calls)] = None
    function_call: Annotated[None, BeforeValidator(_no_tool_calls)] = None
    content: Annotated[str, BeforeValidator(_join_text_parts)]

    def to_dict(self) -> dict[str, str]:
        """Return the turn as a dict; `developer`, OpenAI's newer name, becomes `system`."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    include_usage: bool | None = False


class OpenAIRequest(BaseModel):
    """What OpenAI's two kinds of completion requests share, with the supported parameters."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def longest(self) -> int | None:
        """The requested maximum number of new tokens."""
        return self.max_tokens

    def sampling(self) -> Sampling:
        """Return the sampling settings; raise InputError for an unsupported parameter."""
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL_VALUES and value is not None and value not in NEUTRAL_VALUES[name]:
                raise InputError(
                    f'"{name}" is not supported here: remove it.', field=name, code="unsupported_parameter"
                )
        return Sampling(
            self.longest, self.temperature or 0.0, 1.0 if self.top_p is None else self.top_p, self.seed, self.stop
        )


class ChatRequest(OpenAIRequest):
    """OpenAI's chat completion request."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None

    @property
    def longest(self) -> int | None:
        """The requested maximum number of new tokens; `max_completion_tokens` is OpenAI's newer name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _one_prompt(value: Any) -> Any:
    """Return the text of a list of one; other lists are token ids or several prompts, which are not supported."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], str):
            raise PydanticCustomError("part", "must be one text: token ids and several prompts are not supported")
        return value[0]
    return value


class CompletionRequest(OpenAIRequest):
    """OpenAI's completion request: a text to continue."""

    prompt: Annotated[Text, BeforeValidator(_one_prompt)]


def parse(model: type[Model], body: bytes) -> Model:
    """Parse a request body; raise InputError with one sentence per validation error."""
    if body[:3] == b"\xef\xbb\xbf" or body[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in body[:4]:
        found = "begins with a byte order mark" if body[:3] == b"\xef\xbb\xbf" else "is UTF-16 or UTF-32"
        raise InputError(f"The request {found}: send it as plain UTF-8.", field="body")
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        problems = [_describe_error(model, problem["type"], problem) for problem in error.errors(include_url=False)]
        field = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else "body"
        raise InputError(" ".join(problems), field=field) from None


def _describe_error(model: type[BaseModel], kind: str, problem: Mapping[str, Any]) -> str:
    """Return the sentence for one of pydantic's errors."""
    field, found = _field_path(problem["loc"]), _describe_value(problem["input"])
    if kind == "json_invalid":
        return f"The request is not valid JSON: {problem['ctx']['error']}."
    if kind == "model_type" and not problem["loc"]:
        return f'The request must be a JSON object like {{"input": "..."}}; got {found}.'
    if kind == "missing":
        return f"{field} is missing: send {{{field}: ...}}." if len(problem["loc"]) == 1 else f"{field} is missing."
    if kind == "extra_forbidden":
        return f"{field} is unknown; known are {', '.join(model.model_fields)}."
    if kind in ("too_short", "too_long"):
        context = problem["ctx"]
        limit = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"{field} has {context['actual_length']} entries; expected {limit}."
    if kind in EXPECTED_TYPES:
        return f"{field} must be {EXPECTED_TYPES[kind]}; got {found}."
    if kind in ("blank", "part"):
        return f"{field} {problem['msg']}."
    if kind == "content":
        return f"{field} {problem['msg']}; got {found}."
    rule = problem["msg"].removeprefix("Input should be ")
    return f"{field} must be {rule}; got {found}."


EXPECTED_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a string or a list of strings",
    "model_type": "a JSON object",
}


def _field_path(loc: tuple[int | str, ...]) -> str:
    """Return a field's path in quotes, as in "messages[0].content"."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    return f'"{path.removeprefix(".")}"'


def _describe_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"{value}"
    names = {str: "a string", list: "a list", dict: "an object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "something else")
