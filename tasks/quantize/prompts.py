"""What turns a conversation or a text into token ids at the endpoint, written beside the graph.

`chat_template.jinja` is the chat template, without dates; a folder without one answers no conversations and only
completes texts. `special_tokens.json` holds the tokens that a template may use, and the ids around a text.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from serving import folders
from serving.errors import InputError, ServingError
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
    template = ChatTemplate(str(tokenizer.chat_template), special_tokens(tokenizer))
    rendered = 0
    for messages in SAMPLES:
        try:
            expected = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception:  # the template's own refusal, for example of a system message
            continue
        try:
            found = template.render(messages)
        except (InputError, ServingError) as error:
            raise StageError(f"the chat template of {source} cannot be served: {error}") from error
        if found != expected:
            raise StageError(
                f"the chat template of {source} renders a conversation otherwise at the endpoint than in Transformers: "
                f"{found[-80:]!r} and not {str(expected)[-80:]!r}. Choose another chat_template."
            )
        rendered += 1
    if not rendered:
        raise StageError(f"the chat template of {source} fails even on one question: choose another chat_template.")


def special_tokens(tokenizer: "PreTrainedTokenizerFast") -> dict[str, str]:
    """Return the special tokens that Transformers passes to a chat template."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def write(tokenizer: "PreTrainedTokenizerFast", target: Path, *, decoder: bool) -> None:
    """Write the special tokens and, for a decoder that has one, the chat template; without one `template` is null."""
    has_template = decoder and tokenizer.chat_template is not None
    if has_template:
        (target / folders.TEMPLATE_FILE).write_text(str(tokenizer.chat_template), encoding="utf-8")
    content = {"template": special_tokens(tokenizer) if has_template else None, **chat.special_ids(tokenizer)}
    records.write_json(target / folders.SPECIAL_TOKENS_FILE, content)
