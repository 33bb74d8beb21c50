"""Train a byte-level BPE tokenizer on the corpus and the training chats, or load a model's; pack the corpus.

Run as `python -m tasks.tokenize`. Byte-level BPE (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners") can represent any text, so every text round-trips; the stage checks this for the whole corpus while it packs
it into memory-mapped token shards. The corpus is read in batches and the shards are appended to on disk, so memory does
not depend on the size of the corpus. A given tokenizer is used unchanged; the texts that it changes are counted.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from tasks.common import tables
from tasks.common.harness.job import Job, StageError
from tasks.common.settings import Settings
from tasks.common.text import chat, shards, templates
from tasks.tokenize.encoding import Encoder, Ids, RoundTripError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUMERICS = False  # no model computes here
INPUTS = {"corpus": "data/validate/corpus", "source": "{config.tokenizer.path}"}
OUTPUTS = {"tokenizer": "data/tokenize/tokenizer", "shards": "data/tokenize/shards"}


class Train(Settings):
    """Train a tokenizer on the training split of the corpus and the chats."""

    name: Literal["train"] = Field(description="Where the tokenizer comes from")
    path: Literal["data/validate/instructions"] = Field(description="Table of chats to train on, besides the corpus")
    vocabulary: int = Field(description="Vocabulary size, including special tokens and 256 bytes", ge=300, le=2**18)
    max_characters: int = Field(
        default=100_000_000, description="Maximum characters of the corpus to train on, sampled by hash", ge=1000
    )


class From(Settings):
    """Use the tokenizer of a given model unchanged."""

    name: Literal["from"] = Field(description="Where the tokenizer comes from")
    path: str = Field(
        description="Folder of a Transformers model or tokenizer, absolute or in the project", min_length=1
    )


class Config(Settings):
    """Settings of the tokenizer."""

    tokenizer: Annotated[Train | From, Field(discriminator="name", description="Where the tokenizer comes from")]
    context: int = Field(description="Context length of the models in tokens", ge=32, le=2**17)


def run(config: Config, job: Job) -> dict[str, Any]:
    """Write the tokenizer and the shards; return counts, bytes per token and whether all texts round-trip."""
    source = config.tokenizer
    tokenizer = _train(config, source, job) if isinstance(source, Train) else _load_given(config, job.inputs["source"])
    tokenizer.save_pretrained(job.outputs["tokenizer"])
    encoder = Encoder(tokenizer, refuse_lossy=isinstance(source, Train))
    writer = ShardWriter(tokenizer, encoder, job)
    metrics: dict[str, Any] = {"vocabulary": len(tokenizer)}
    for split in ("train", "heldout"):
        metrics[split] = writer.write(split)
    writer.log_speed()
    return {**metrics, "round_trip": not encoder.lossy, "lossy_texts": encoder.lossy}


def _texts(config: Train, job: Job) -> Iterator[str]:
    """Yield the texts to train on: the beginning of the corpus, which is in hash order, and all training chats."""
    remaining = config.max_characters
    for rows in tables.batches(job.inputs["corpus"], "train", ["text", "split"]):
        for text in rows["text"].to_pylist():
            remaining -= len(text)
            if remaining >= 0:
                yield text
        if remaining < 0:
            break
    for rows in tables.batches(job.inputs["source"], "train", ["messages", "split"]):
        for messages in rows["messages"].to_pylist():
            yield from (message["content"] for message in messages)


def _train(config: Config, source: Train, job: Job) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=source.vocabulary,
        special_tokens=list(chat.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(source, job), trainer)
    special = {"bos_token": chat.BOS, "eos_token": chat.EOS, "pad_token": chat.PAD, "mask_token": chat.MASK}
    return _wrap(config, tokenizer, special, chat.CHAT_TEMPLATE)


def _wrap(config: Config, tokenizer: Any, special: dict[str, Any], template: Any) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=config.context,
        model_input_names=["input_ids", "attention_mask"],  # Llama's generate refuses token_type_ids
        clean_up_tokenization_spaces=False,
        **special,
    )
    wrapped.chat_template = template
    return wrapped


def _load_given(config: Config, path: Path) -> "PreTrainedTokenizerFast":
    """Load a folder's tokenizer with its special tokens and chat template; its end token replaces a missing pad token.

    The end token is EOS, or SEP of an encoder (BERT's tokenizers have no EOS). Raises StageError if the folder has no
    tokenizer or the tokenizer has neither.
    """
    found = chat.read_tokenizer(path)
    templates.choose(found, None, str(path))
    end = found.eos_token or found.sep_token
    if end is None:
        raise StageError(
            f"tokenize.tokenizer.path: the tokenizer in {path} names no end token (eos_token, or sep_token of an "
            "encoder), so a model could not learn where a text ends: set one in its tokenizer_config.json, or use "
            "another tokenizer."
        )
    special = dict(found.special_tokens_map)
    if found.pad_token is None:
        print(f"the tokenizer in {path} has no pad token; its end token {end} is used instead")
        special["pad_token"] = end
    return _wrap(config, found.backend_tokenizer, special, found.chat_template)


class ShardWriter:
    """Writes the splits of the corpus as token shards, in one pass over the texts."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", encoder: Encoder, job: Job) -> None:
        self.encoder, self.job, self.vocabulary = encoder, job, len(tokenizer)
        self.start, self.end = (np.array([token], encoder.dtype) for token in chat.first_and_last(tokenizer))
        self.bytes, self.seconds = 0, 0.0

    def write(self, split: str) -> dict[str, Any]:
        """Write one split and return its figures."""
        before = self.bytes
        counts = shards.write_split(self.job.outputs["shards"] / split, self._documents(split), self.vocabulary)
        size, inner = self.bytes - before, counts["tokens"] - 2 * counts["documents"]
        return {**counts, "bytes": size, "bytes_per_token": round(size / max(inner, 1), 4)}

    def log_speed(self) -> None:
        """Add the encoded bytes and the CPU seconds of encoding and checking to the run's log."""
        self.job.log_figures(encoded_bytes=self.bytes, encoding_cpu_seconds=round(self.seconds, 3))

    def _documents(self, split: str) -> Iterator[shards.Document]:
        from tqdm import tqdm

        corpus = self.job.inputs["corpus"]
        with tqdm(total=tables.count(corpus), desc=f"tokenize {split}", unit="text", mininterval=2) as bar:
            for rows in tables.batches(corpus, columns=["text", "names", "source", "group", "split"]):
                yield from self._encode_rows(tables.filter_split(rows, split).to_pylist())
                bar.update(rows.num_rows)

    def _encode_rows(self, rows: list[dict[str, Any]]) -> list[shards.Document]:
        started = time.process_time()
        try:
            without_names = iter(self.encoder.encode([row["text"] for row in rows if not row["names"]]))
            with_names = iter(self.encoder.encode_with_offsets([row["text"] for row in rows if row["names"]]))
        except RoundTripError as error:
            raise StageError(str(error)) from error
        documents = [
            self._document(row, *(next(with_names) if row["names"] else (next(without_names), []))) for row in rows
        ]
        self.seconds += time.process_time() - started
        self.bytes += sum(document.bytes for document in documents)
        return documents

    def _document(self, row: dict[str, Any], ids: Ids, offsets: list[tuple[int, int]]) -> shards.Document:
        spans = [(start + 1, end + 1) for start, end in _name_spans(row["text"], row["names"], offsets)]
        with_ends, size = np.concatenate([self.start, ids, self.end]), len(row["text"].encode())
        return shards.Document(with_ends, spans, row["source"], row["group"], size)


def _name_spans(text: str, names: list[str], offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the token spans of all occurrences of names as whole words, sorted; longer names take precedence.

    A span includes the space before the name, whether it is in the name's first token or a token of its own. A name
    that begins or ends inside a token is skipped.
    """
    spans: dict[tuple[int, int], tuple[int, int]] = {}  # of characters: of tokens
    first_tokens: dict[int, int] = {}
    for index, (start, _) in enumerate(offsets):  # keep the first: a character may be split into several byte tokens
        first_tokens.setdefault(start + (text[start : start + 1] == " "), index)
    end_tokens = {end: index + 1 for index, (_, end) in enumerate(offsets)}
    for name in sorted(set(names), key=lambda name: (-len(name), name)):
        for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text):
            start, end = match.span()
            if start in first_tokens and end in end_tokens and not any(a < end and start < b for a, b in spans):
                spans[start, end] = first_tokens[start], end_tokens[end]
    return sorted(spans.values())
