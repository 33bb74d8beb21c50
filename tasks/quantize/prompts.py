"""What turns a conversation or a text into token ids at the endpoint, written beside the graph.

`chat_template.jinja` is the chat template, without dates; a folder without one answers no conversations and only
completes texts. `special_tokens.json` holds the tokens that a template may use, and the ids around a text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from serving import folders
from serving.errors import InputError
from serving.templates import ChatTemplate
from tasks.common.harness import records
from tasks.common.harness.job import StageError
from tasks.common.text import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUESTION, ANSWER = {"role": "user", "content": "Hello, who are you?"}, {"role": "assistant", "content": "A model."}
SAMPLES = ([QUESTION], [QUESTION, ANSWER, QUESTION], [{"role": "system", "content": "Be brief."}, QUESTION])


def check_template(tokenizer: "PreTrainedTokenizerFast", source: Path) -> None:
    """Raise StageError if the endpoint would render the chat template otherwise than Transformers, or not at all."""
    if tokenizer.chat_template is None:
        return
    template, rendered = ChatTemplate(str(tokenizer.chat_template), special_tokens(tokenizer)), 0
    for messages in SAMPLES:
        found, failure = _try(template, messages)
        if found is None and failure is not None and failure.status == 500:  # it exceeds the endpoint's bounds
            raise StageError(f"the chat template of {source} cannot be served: {failure}") from failure
        expected = _reference(tokenizer, messages)
        if found != expected:
            raise StageError(
                f"the chat template of {source} renders a conversation otherwise at the endpoint than in Transformers: "
                f"{(found or str(failure))[-80:]!r} and not {str(expected)[-80:]!r}. Choose another chat_template."
            )
        rendered += found is not None
    if not rendered:
        raise StageError(f"the chat template of {source} fails even on one question: choose another chat_template.")


def _try(template: ChatTemplate, messages: Sequence[chat.Message]) -> tuple[str | None, InputError | None]:
    try:
        return template.render(messages), None
    except InputError as error:
        return None, error


def _reference(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[chat.Message]) -> str | None:
    """Return what Transformers renders; None if the template rejects the conversation, for example a system message."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except Exception:  # of the template's own code: any
        return None


def special_tokens(tokenizer: "PreTrainedTokenizerFast") -> dict[str, str]:
    """Return the special tokens that Transformers passes to a chat template."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def write(tokenizer: "PreTrainedTokenizerFast", target: Path, *, conversations: bool) -> None:
    """Write the special tokens and, if the model reads conversations, the chat template; else `template` is null."""
    has_template = conversations and tokenizer.chat_template is not None
    if has_template:
        (target / folders.TEMPLATE_FILE).write_text(str(tokenizer.chat_template), encoding="utf-8")
    content = {"template": special_tokens(tokenizer) if has_template else None, **chat.special_ids(tokenizer)}
    records.write_json(target / folders.SPECIAL_TOKENS_FILE, content)
