"""Settings of a language model that judges pairs of replies, behind an OpenAI-compatible endpoint.

They belong to the kind of evaluation `judge`; `compare` asks the model.
"""

from pydantic import Field, field_validator

from tasks.common.settings import Settings

FIELDS = ("{question}", "{first}", "{second}")
DEFAULT_PROMPT = """You compare two replies to the last message of a conversation. Prefer the reply that is more \
correct, then the one that is more helpful, then the one that is clearer. Length alone is no merit.

[Conversation]
{question}

[Reply A]
{first}

[Reply B]
{second}

Answer with one word: A if reply A is better, B if reply B is better, TIE if neither is."""


class JudgeModel(Settings):
    """A language model as the judge: it sees each pair in both orders, at temperature 0."""

    url: str = Field(description="Base URL of the endpoint: http://127.0.0.1:8000/v1", pattern=r"^https?://\S+$")
    model: str = Field(description="Name of the model at the endpoint", min_length=1)
    key_variable: str | None = Field(
        default=None, description="Environment variable with the API key; null: none is sent", min_length=1
    )
    prompt: str = Field(
        default=DEFAULT_PROMPT,
        description="Question to the judge, with {question}, {first} and {second}; the last A, B or TIE of its answer "
        "is the verdict",
    )
    max_new_tokens: int = Field(default=512, description="Maximum length of its answer, in tokens", ge=1)
    timeout_seconds: float = Field(default=120.0, description="Seconds for one answer", gt=0)
    retries: int = Field(default=4, description="Repeated attempts after a failed one, with growing pauses", ge=0)
    parallel: int = Field(default=4, description="Requests at the same time", ge=1, le=256)

    @field_validator("prompt")
    @classmethod
    def _validate_prompt(cls, prompt: str) -> str:
        absent = [name for name in FIELDS if name not in prompt]
        if absent:
            raise ValueError(f"the prompt must contain {', '.join(FIELDS)}; it lacks {', '.join(absent)}")
        return prompt
