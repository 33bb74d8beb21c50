"""Tokenization of texts and chats: special tokens, the chat template, and a conversation's ids with its loss mask."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.common.harness.job import StageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, MASK = "<|bos|>", "<|end|>", "<|pad|>", "[MASK]"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (PAD, BOS, EOS, MASK, *(f"<|{role}|>" for role in ROLES))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

MICROBATCH_ROWS = 16  # rows of different lengths that share a forward pass in training

Message = dict[str, str]
Exchange = tuple[Sequence[Message], str]  # a prompt (the conversation so far) and the reply to it


class Question(NamedTuple):
    """A conversation that ends where the assistant's next reply begins."""

    id: str  # of the instruction row that it comes from
    messages: Sequence[Message]
    ids: list[int]  # the encoded prompt


MAX_POSITIONS_KEYS = ("max_position_embeddings", "n_positions")  # the context length in a Transformers config.json


def read_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Load a folder's tokenizer unchanged."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer


def load_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Load a model's tokenizer with `model_max_length` set from config.json and, if it has no pad token, EOS as one.

    Many published tokenizers have a `model_max_length` of 10^30 and no pad token.
    """
    tokenizer = read_tokenizer(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = path / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    max_length = next((values[name] for name in MAX_POSITIONS_KEYS if isinstance(values.get(name), int)), None)
    if max_length is not None and tokenizer.model_max_length > max_length:
        tokenizer.model_max_length = max_length
    return tokenizer


def encode_text(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Return the ids of a text between BOS and EOS, as decoder and encoder read it; EOS replaces a missing BOS."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [start, *ids, tokenizer.eos_token_id]


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to where the assistant's next reply begins (`add_generation_prompt`)."""
    _require_template(tokenizer)
    ids: Any = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    return list(ids)


def control_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Return the texts of a tokenizer's special tokens. A message that spells one would be encoded as the token."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]


def spells_control_token(controls: Sequence[str], messages: Sequence[Message]) -> bool:
    """Return whether a message contains one of these texts."""
    return any(control in message["content"] for message in messages for control in controls)


def unique_questions(tokenizer: "PreTrainedTokenizerFast", rows: Sequence[Mapping[str, Any]]) -> list[Question]:
    """Return the distinct questions of rows (all turns but the last), sorted by token ids.

    A question that several rows share gets the smallest of their ids. Questions that spell a special token are left
    out; their number is printed.
    """
    controls, count = control_tokens(tokenizer), len(rows)
    rows = [row for row in rows if not spells_control_token(controls, row["messages"][:-1])]
    if len(rows) < count:
        print(
            f"{count - len(rows)} of {count} questions spell a special token of the tokenizer and are skipped",
            flush=True,
        )
    row_ids = {
        tuple((turn["role"], turn["content"]) for turn in row["messages"][:-1]): row["id"]
        for row in sorted(rows, key=lambda row: str(row["id"]), reverse=True)
    }
    found = []
    for turns, row_id in sorted(row_ids.items()):
        messages = [{"role": role, "content": content} for role, content in turns]
        found.append(Question(row_id, messages, encode_prompt(tokenizer, messages)))
    return sorted(found, key=lambda question: question.ids)


def fits_context(tokenizer: "PreTrainedTokenizerFast", prompt: Sequence[int], reply: int) -> bool:
    """Return whether a prompt and a reply of `reply` tokens fit into the context."""
    return bool(len(prompt) + reply <= tokenizer.model_max_length)


def drop_too_long(tokenizer: "PreTrainedTokenizerFast", found: Sequence[Question], reply: int) -> list[Question]:
    """Return the questions after which a reply of `reply` tokens fits into the context; print how many are dropped.

    Raises StageError if no question fits.
    """
    context = tokenizer.model_max_length
    fitting = [question for question in found if fits_context(tokenizer, question.ids, reply)]
    reason = f"of {len(found)} training questions leave no room for {reply} more tokens in a context of {context}"
    if not fitting:
        raise StageError(
            f"{len(found)} {reason}: raise tokenize.context, lower max_new_tokens, or add shorter questions to "
            "`ingest.sources`."
        )
    if len(fitting) < len(found):
        print(f"{len(found) - len(fitting)} {reason} and are skipped", flush=True)
    return fitting


def encode_chat(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Return the ids of a whole conversation (T,) and the loss mask (T,): True in the assistant's turns, EOS included.

    Raises StageError if the assistant's turns cannot be located in the output of another model's chat template.
    """
    if tokenizer.chat_template != CHAT_TEMPLATE:
        return encode_by_template(tokenizer, messages)
    ids: list[int] = [tokenizer.bos_token_id]
    loss_mask = [False]
    for message in messages:
        role: Any = tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>")
        content = [*tokenizer.encode(message["content"], add_special_tokens=False), tokenizer.eos_token_id]
        ids += [role, *content]
        loss_mask += [False, *[message["role"] == "assistant"] * len(content)]
    return ids, loss_mask


def encode_by_template(
    tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Encode a conversation as `encode_chat` does, with any chat template.

    An assistant turn is the text that the template renders up to and including it, minus the prompt that
    `add_generation_prompt` renders before it, up to EOS. This works only for templates whose output for the first turns
    is a prefix of their output for the whole conversation.
    """

    def render(turns: int, *, generation_prompt: bool = False) -> str:
        text = tokenizer.apply_chat_template(
            list(messages[:turns]), tokenize=False, add_generation_prompt=generation_prompt
        )
        return str(text)

    _require_template(tokenizer)
    text, eos = render(len(messages)), tokenizer.eos_token
    spans = []
    for index in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
        prompt, answered = render(index, generation_prompt=True), render(index + 1)
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise StageError(
                f"the chat template of the model's tokenizer renders the first {index + 1} of {len(messages)} turns "
                "differently alone than as part of the whole conversation, so the assistant's turns cannot be located: "
                "use a template that does not change earlier turns and begins an answer as `add_generation_prompt` "
                "does."
            )
        stop = answered.rfind(eos, len(prompt)) if eos else -1
        spans.append((len(prompt), len(answered) if stop < 0 else stop + len(eos)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    return list(encoded["input_ids"]), [any(a <= start and end <= b for a, b in spans) for start, end in offsets]


def _require_template(tokenizer: "PreTrainedTokenizerFast") -> None:
    if tokenizer.chat_template is None:
        raise StageError("the model's tokenizer has no chat template: set its `chat_template` and save it again.")


def pad(rows: Sequence[Sequence[Any]], value: Any, left: bool = False) -> list[list[Any]]:
    """Pad rows to the length of the longest one, on the right or on the left."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return [[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows, strict=True)]


def pad_batch(
    rows: Sequence[Sequence[int]], value: int, device: Any, left: bool = False
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return rows of token ids, padded with `value`, and their attention mask, both (N, T)."""
    import torch

    mask = [[1] * len(row) for row in rows]
    return torch.tensor(pad(rows, value, left), device=device), torch.tensor(pad(mask, 0, left), device=device)


def length_buckets(rows: Sequence[Sequence[Any]], size: int = MICROBATCH_ROWS) -> list[list[int]]:
    """Return the rows' indices in groups of up to `size` rows of similar length, which keeps padding small."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]
