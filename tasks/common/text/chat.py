"""Text and chat as tokens: special tokens, the chat template, and the encoding of a conversation with its loss mask."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.common.stage import StageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

BOS, END, PAD, MASK = "<|bos|>", "<|end|>", "<|pad|>", "[MASK]"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (PAD, BOS, END, MASK, *(f"<|{role}|>" for role in ROLES))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

TOGETHER = 16  # rows in one forward pass of training, where they differ in length

Message = dict[str, str]
Exchange = tuple[Sequence[Message], str]  # a conversation up to where a reply is asked for, and the reply


class Question(NamedTuple):
    """A conversation up to where a reply is asked for."""

    id: str  # of the row that asks it
    messages: Sequence[Message]
    ids: list[int]


def load_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Load the chain's tokenizer from its folder."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer


def encode_text(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Return the ids of one text between its start and end tokens, as both models read it; no start, then two ends."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [start, *ids, tokenizer.eos_token_id]


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to where the assistant's next reply begins."""
    _require_template(tokenizer)
    ids: Any = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    return list(ids)


def questions(tokenizer: "PreTrainedTokenizerFast", rows: Sequence[Mapping[str, Any]]) -> list[Question]:
    """Return what rows ask up to their last answers: each different question once, sorted by its ids.

    A question that several rows ask has the first one's id.
    """
    asked = {
        tuple((turn["role"], turn["content"]) for turn in row["messages"][:-1]): row["id"]
        for row in sorted(rows, key=lambda row: str(row["id"]), reverse=True)
    }
    found = []
    for turns, name in sorted(asked.items()):
        messages = [{"role": role, "content": content} for role, content in turns]
        found.append(Question(name, messages, encode_prompt(tokenizer, messages)))
    return sorted(found, key=lambda question: question.ids)


def with_room(tokenizer: "PreTrainedTokenizerFast", found: Sequence[Question], reply: int) -> list[Question]:
    """Return the questions after which a reply of so many tokens fits into the context, and say how many do not.

    Raises StageError where none is left.
    """
    longest = tokenizer.model_max_length
    fitting = [question for question in found if len(question.ids) + reply <= longest]
    told = f"of {len(found)} training questions leave no room for {reply} more tokens in a context of {longest}"
    if not fitting:
        raise StageError(
            f"{len(found)} {told}: raise tokenize.context, lower max_new_tokens, or give `ingest.sources` shorter ones."
        )
    if len(fitting) < len(found):
        print(f"{len(found) - len(fitting)} {told}, and are not asked", flush=True)
    return fitting


def encode_chat(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Return the ids of a whole conversation and, for each, whether it belongs to an answer (end token included).

    Raises StageError for another model's chat template where it does not tell which part of its text is an answer.
    """
    if tokenizer.chat_template != TEMPLATE:
        return encode_by_template(tokenizer, messages)
    ids: list[int] = [tokenizer.bos_token_id]
    answers = [False]
    for message in messages:
        role: Any = tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>")
        content = [*tokenizer.encode(message["content"], add_special_tokens=False), tokenizer.eos_token_id]
        ids += [role, *content]
        answers += [False, *[message["role"] == "assistant"] * len(content)]
    return ids, answers


def encode_by_template(
    tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Do as `encode_chat` with whatever template a tokenizer has.

    An answer is what the template writes of a conversation up to it, less what it writes to ask for that answer, up to
    the end token. That holds only of templates that write a conversation's beginning as they write it alone.
    """

    def written(count: int, *, ask: bool = False) -> str:
        return str(tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, add_generation_prompt=ask))

    _require_template(tokenizer)
    text, end = written(len(messages)), tokenizer.eos_token
    spans = []
    for place in (place for place, message in enumerate(messages) if message["role"] == "assistant"):
        asked, answered = written(place, ask=True), written(place + 1)
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise StageError(
                f"the chat template of the model's tokenizer writes the first {place + 1} of {len(messages)} turns "
                "otherwise alone than within the whole, so that answers cannot be told from the rest: take a template "
                "that leaves earlier turns as they are and begins an answer as `add_generation_prompt` does."
            )
        stop = answered.rfind(end, len(asked)) if end else -1
        spans.append((len(asked), len(answered) if stop < 0 else stop + len(end)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    return list(encoded["input_ids"]), [any(a <= start and till <= b for a, b in spans) for start, till in offsets]


def _require_template(tokenizer: "PreTrainedTokenizerFast") -> None:
    if tokenizer.chat_template is None:
        raise StageError("the model's tokenizer has no chat template; set its `chat_template` and save it once more.")


def pad(rows: Sequence[Sequence[Any]], value: Any, left: bool = False) -> list[list[Any]]:
    """Fill rows to the longest one's length, on the right or on the left."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return [[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows, strict=True)]


def padded(
    rows: Sequence[Sequence[int]], value: int, device: Any, left: bool = False
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return rows of token ids, filled up with `value`, and the mask, 1 where they are their own: both (N, T)."""
    import torch

    mask = [[1] * len(row) for row in rows]
    return torch.tensor(pad(rows, value, left), device=device), torch.tensor(pad(mask, 0, left), device=device)


def alike(rows: Sequence[Sequence[Any]], size: int = TOGETHER) -> list[list[int]]:
    """Return the rows' indices in groups of up to `size`, rows of like length together: little is lost to padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]
