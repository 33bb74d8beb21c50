"""Train a byte-level BPE tokenizer on the clean corpus and the training chats; pack the corpus into token shards.

Run as `python -m tasks.tokenize`. Byte-level BPE (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners") can write any text, so every text round-trips; the stage proves it on the whole corpus before it ends. The
shards are memory-mapped.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tasks.common import chat, shards, stage, tables
from tasks.common.settings import Settings
from tasks.common.stage import Job, StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INPUTS = {"corpus": "data/validate/corpus", "instructions": "data/validate/instructions"}
OUTPUTS = {"tokenizer": "data/tokenize/tokenizer", "shards": "data/tokenize/shards"}

SLICE = 1000  # texts between two steps of a progress bar


class Config(Settings):
    """Settings of the tokenizer."""

    vocabulary: int = Field(
        description="Entries of the vocabulary, special tokens and 256 bytes included", ge=300, le=2**18
    )
    context: int = Field(description="Longest sequence that the models read, in tokens", ge=32, le=2**17)


def run(config: Config, job: Job) -> dict[str, Any]:
    """Write the tokenizer and the shards; return counts, bytes per token and the round-trip's verdict."""
    splits = {split: tables.read(job.inputs["corpus"], split).to_pylist() for split in ("train", "heldout")}
    conversations = tables.read(job.inputs["instructions"], "train").column("messages").to_pylist()
    texts = [row["text"] for row in splits["train"]]
    tokenizer = _train(config, [*texts, *(message["content"] for messages in conversations for message in messages)])
    tokenizer.save_pretrained(job.outputs["tokenizer"])
    _check_round_trip(tokenizer, [row["text"] for rows in splits.values() for row in rows])
    metrics: dict[str, Any] = {"vocabulary": len(tokenizer)}
    for split, rows in splits.items():
        documents = list(_documents(tokenizer, rows))
        counts = shards.write_split(job.outputs["shards"] / split, documents, len(tokenizer))
        size = sum(len(row["text"].encode()) for row in rows)
        inner = counts["tokens"] - 2 * counts["documents"]
        metrics[split] = {**counts, "bytes": size, "bytes_per_token": round(size / max(inner, 1), 4)}
    return {**metrics, "round_trip": True}


def _train(config: Config, texts: list[str]) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=list(chat.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=chat.BOS,
        eos_token=chat.END,
        pad_token=chat.PAD,
        mask_token=chat.MASK,
        model_max_length=config.context,
        model_input_names=["input_ids", "attention_mask"],  # Llama's generate refuses token_type_ids
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = chat.TEMPLATE
    return wrapped


def _check_round_trip(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> None:
    from tqdm import tqdm

    for start in tqdm(range(0, len(texts), SLICE), desc="tokenize round trip", mininterval=2):
        some = texts[start : start + SLICE]
        encoded = tokenizer(some, add_special_tokens=False)["input_ids"]
        for text, back in zip(some, tokenizer.batch_decode(encoded), strict=True):
            if text != back:
                raise StageError(f"a text does not survive the tokenizer: {text[:80]!r} came back as {back[:80]!r}")


def _documents(tokenizer: "PreTrainedTokenizerFast", rows: list[dict[str, Any]]) -> Iterator[shards.Document]:
    from tqdm import tqdm

    for start in tqdm(range(0, len(rows), SLICE), desc="tokenize shards", mininterval=2):
        some = rows[start : start + SLICE]
        encoded = tokenizer([row["text"] for row in some], add_special_tokens=False, return_offsets_mapping=True)
        for row, ids, offsets in zip(some, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            spans = [(start + 1, end + 1) for start, end in _name_spans(row["text"], row["names"], offsets)]
            yield shards.Document([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], spans)


def _name_spans(text: str, names: list[str], offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the token spans of the names' occurrences as whole words, in order; longer names go first at a place.

    The space before a name belongs to it, in its first token or as a token of its own; a name that begins or ends
    inside a token is left out.
    """
    taken: dict[tuple[int, int], tuple[int, int]] = {}
    opens: dict[int, int] = {}
    for index, (start, _) in enumerate(offsets):  # the first of several: a character may be split into byte tokens
        opens.setdefault(start + (text[start : start + 1] == " "), index)
    closes = {end: index + 1 for index, (_, end) in enumerate(offsets)}
    for name in sorted(set(names), key=lambda name: (-len(name), name)):
        for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text):
            at, end = match.span()
            if at in opens and end in closes and not any(a < end and at < b for a, b in taken):
                taken[at, end] = opens[at], closes[end]
    return sorted(taken.values())


if __name__ == "__main__":
    stage.main("tasks.tokenize")
