"""Tokenization of texts and chats: special tokens, the chat template, and a conversation's ids with its loss mask."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from tasks.common import model_folder
from tasks.common.harness.job import StageError
from tasks.common.text import templates

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

UNLIMITED = 2**24  # tokens; a larger `model_max_length` of a tokenizer states no context length
MICROBATCH_ROWS = 16  # rows of different lengths that share a forward pass in training

TemplateName = Annotated[
    str | None,
    Field(
        description="Chat template by name, where the model's own is missing or not wanted: one of its own, if it has "
        f"several, or {', '.join(templates.NAMED)}; null: the model's own",
        min_length=1,
    ),
]

Message = dict[str, str]
Exchange = tuple[Sequence[Message], str]  # a prompt (the conversation so far) and the reply to it


class Question(NamedTuple):
    """A conversation that ends where the assistant's next reply begins."""

    id: str  # of the instruction row that it comes from
    messages: Sequence[Message]
    ids: list[int]  # the encoded prompt


def read_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Load a folder's tokenizer unchanged; an adapter without one has that of its base model.

    A folder with only the files of a slow tokenizer (`vocab.json`, `tokenizer.model`) is converted. Raises StageError
    if there is no tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = model_folder.tokenizer_folder(path)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
            if tokenizer.eos_token is None and tokenizer.sep_token is None:
                names = _default_special_tokens(folder, tokenizer.get_vocab())
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **names)
        else:
            # Without a vocabulary, Transformers returns an empty tokenizer.
            if not model_folder.has_tokenizer(folder):
                raise FileNotFoundError("the folder has no vocabulary")
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # of `tokenizers`, Transformers and the converters: no common class
        raise StageError(
            f"the tokenizer in {folder} cannot be loaded ({str(error).splitlines()[0][:200]}): expected tokenizer.json "
            "and tokenizer_config.json; load it with AutoTokenizer where it works and save it there."
        ) from error
    return tokenizer


def _default_special_tokens(folder: Path, vocabulary: Mapping[str, int]) -> dict[str, str]:
    """Return the special tokens that Transformers' tokenizer class of a model type has, if they are in the vocabulary.

    The files of many models name none: those of BERT, DistilBERT, GPT-2 and XLM-RoBERTa on the Hugging Face hub.
    """
    from transformers import AutoTokenizer

    if not (folder / model_folder.CONFIG).is_file():
        return {}
    found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).special_tokens_map
    return {name: str(token) for name, token in found.items() if str(token) in vocabulary}


def load_tokenizer(path: Path, template: str | None = None) -> "PreTrainedTokenizerFast":
    """Load a model's tokenizer, ready for training: context length, pad token, and one chat template without dates.

    Many published tokenizers have a `model_max_length` of 10^30, no pad token and several chat templates. `template`
    names the template to use (`templates.choose`). The end token replaces a missing pad token.
    """
    tokenizer = read_tokenizer(path)
    templates.choose(tokenizer, template, str(path))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or templates.turn_end(tokenizer)
    if tokenizer.pad_token is None:
        raise StageError(
            f"the tokenizer in {path} has neither an end token nor a pad token: set eos_token in its "
            "tokenizer_config.json."
        )
    max_length = model_folder.context_length(model_folder.read_json(model_folder.base_of(path) / model_folder.CONFIG))
    if max_length is None and tokenizer.model_max_length > UNLIMITED:
        max_length = model_folder.DEFAULT_CONTEXT
    if max_length is not None and tokenizer.model_max_length > max_length:
        tokenizer.model_max_length = max_length
    return tokenizer


def end_ids(model: Any, tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """Return the ids of all tokens that end a reply, the one that ends a turn of the chat template first.

    They are that token, the tokenizer's end token and those of the model's generation config: many models end a turn
    with another token than a text (Gemma, Llama 3, Phi-3, Qwen2.5's base models).
    """
    found: list[int | None] = []
    if (turn_end := templates.turn_end(tokenizer)) is not None:
        found.append(tokenizer.convert_tokens_to_ids(turn_end))
    found.append(tokenizer.eos_token_id)
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        configured = getattr(holder, "eos_token_id", None)
        found += configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(token for token in found if token is not None and 0 <= token < len(tokenizer)))


def first_and_last(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, int]:
    """Return the ids that begin and end a text: BOS and EOS, or CLS and SEP; the last one replaces a missing first."""
    last = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if last is None:
        raise StageError("the model's tokenizer has no end token (eos_token or sep_token): set one and save it again.")
    first = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return last if first is None else first, last


def special_ids(tokenizer: "PreTrainedTokenizerFast") -> dict[str, int | None]:
    """Return the ids around a text (`first`, `last`) and that of the mask token; None if there is no mask token."""
    first, last = first_and_last(tokenizer)
    return {"first": first, "last": last, "mask": tokenizer.mask_token_id}


def encode_text(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Return the ids of a text between the tokens of `first_and_last`, as decoder and encoder read it."""
    first, last = first_and_last(tokenizer)
    return [first, *tokenizer.encode(text, add_special_tokens=False), last]


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to where the assistant's next reply begins (`add_generation_prompt`).

    An encoder without a chat template reads the turns as one text, a turn a line.
    """
    if tokenizer.chat_template is None and tokenizer.mask_token is not None:
        return encode_text(tokenizer, "\n".join(message["content"] for message in messages))
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
    """Return the ids of a whole conversation (T,) and the loss mask (T,): True in the assistant's turns, end included.

    Raises StageError if the assistant's turns cannot be located in the output of another model's chat template, or if
    the template ends them with no token: replies would never stop.
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
    `add_generation_prompt` renders before it, up to the token that ends the turn. This works only for templates whose
    output for the first turns is a prefix of their output for the whole conversation.
    """

    def render(turns: int, *, generation_prompt: bool = False) -> str:
        text = tokenizer.apply_chat_template(
            list(messages[:turns]), tokenize=False, add_generation_prompt=generation_prompt
        )
        return str(text)

    _require_template(tokenizer)
    text, end = render(len(messages)), templates.turn_end(tokenizer)
    if end is None:
        raise StageError(
            "the chat template of the model's tokenizer writes no token that ends the assistant's turns, so replies "
            "would never stop: choose a template by name with chat_template (plain suits every tokenizer)."
        )
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
        stop = answered.rfind(end, len(prompt))
        spans.append((len(prompt), len(answered) if stop < 0 else stop + len(end)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    return list(encoded["input_ids"]), [any(a <= start and end <= b for a, b in spans) for start, end in offsets]


def _require_template(tokenizer: "PreTrainedTokenizerFast") -> None:
    if tokenizer.chat_template is None:
        raise StageError(
            "the model's tokenizer has no chat template: choose one by name with chat_template "
            f"({', '.join(templates.NAMED)})."
        )


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
