"""Chat templates: choosing one by name, dates in them, and the token that ends an assistant's turn."""

import re
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tasks.common.harness.job import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The day that a template's `strftime_now` returns: the same conversation must have the same tokens on every day. It is
# the day that Llama 3's template names where it cannot ask for the date.
TEMPLATE_DATE = date(2024, 7, 26)
DATE_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")

_LOOP = "{% for message in messages %}"
NAMED = {
    "chatml": _LOOP + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{{ bos_token }}" + _LOOP + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}" + _LOOP + "{{ '<start_of_turn>' "
    "+ ('model' if message['role'] == 'assistant' else 'user') + '\n' + message['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "phi3": _LOOP + "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "plain": "{{ bos_token }}" + _LOOP + "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token + '\n' }}{% elif message['role'] == 'system' %}"
    "{{ message['content'] + '\n' }}{% else %}{{ 'User: ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
}  # fmt: skip
CONTROL_TOKENS = {  # that a template writes; they must be single tokens of the model's tokenizer
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "plain": (),
}
ANSWER_MARK = "ANSWER"


def choose(tokenizer: "PreTrainedTokenizerFast", name: str | None, where: str) -> None:
    """Set a tokenizer's chat template: the one with this name, else its own one or its `default`, without dates.

    `name` is one of the tokenizer's own templates, if it has several, or a key of `NAMED`. Raises StageError for an
    unknown name, for a template whose control tokens the tokenizer lacks, and for a date that cannot be fixed.
    """
    own: Any = tokenizer.chat_template
    several = own if isinstance(own, dict) else {}
    if name is None:
        template = several.get("default") if isinstance(own, dict) else own
        if template is None and several:
            raise StageError(f"{where} has several chat templates: set chat_template to one of {', '.join(several)}.")
    elif name in several:
        template = several[name]
    elif name in NAMED:
        _check_control_tokens(tokenizer, name, where)
        template = NAMED[name]
    else:
        raise StageError(
            f"chat_template is {name!r}, and there is no template of that name: expected one of "
            f"{', '.join([*several, *NAMED])}."
        )
    tokenizer.chat_template = None if template is None else fix_dates(template, where)


def fix_dates(template: str, where: str) -> str:
    """Return a template in which each `strftime_now(...)` is replaced by TEMPLATE_DATE in that format.

    Raises StageError if a format is computed by the template.
    """
    fixed = DATE_CALL.sub(lambda call: repr(TEMPLATE_DATE.strftime(call["format"])), template)
    if re.search(r"strftime_now\s*\(", fixed):
        raise StageError(
            f"the chat template of {where} writes the current date in a format that it computes, so its tokens would "
            "depend on the day: write the format into the strftime_now call, or choose another chat_template."
        )
    return fixed


def _check_control_tokens(tokenizer: "PreTrainedTokenizerFast", name: str, where: str) -> None:
    vocabulary = tokenizer.get_vocab()
    lacking = [token for token in CONTROL_TOKENS[name] if token not in vocabulary]
    if name == "plain" and tokenizer.eos_token is None:
        lacking = ["an eos_token"]
    if lacking:
        raise StageError(
            f"chat_template is {name}, and the tokenizer in {where} lacks {', '.join(lacking)}: choose a template of "
            "the model's own family, or plain, which needs only an end token."
        )


def turn_end(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """Return the token that the chat template writes after an assistant's answer; None if it writes none.

    Without a template it is the tokenizer's end token.
    """
    if tokenizer.chat_template is None:
        end: str | None = tokenizer.eos_token
        return end
    tokens = {str(token) for token in tokenizer.get_added_vocab()}
    return _turn_end(str(tokenizer.chat_template), frozenset(tokens), tuple(tokenizer.special_tokens_map.items()))


@lru_cache(maxsize=16)
def _turn_end(template: str, tokens: frozenset[str], special: tuple[tuple[str, str], ...]) -> str | None:
    """Return the first of a tokenizer's control tokens in what the template writes after an answer."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": ANSWER_MARK}]
    try:
        [text], _ = render_jinja_template([messages], chat_template=template, **dict(special))
    except (TemplateError, TypeError, ValueError) as error:
        raise StageError(f"the model's chat template fails on a question and its answer: {error}.") from error
    tail = text.rpartition(ANSWER_MARK)[2].lstrip()
    return next((token for token in sorted(tokens, key=len, reverse=True) if tail.startswith(token)), None)
