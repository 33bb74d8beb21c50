"""Train a byte-level BPE tokenizer on the clean corpus and the training chats, or take a model's; pack the corpus.

Run as `python -m tasks.tokenize`. Byte-level BPE (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners") can write any text, so every text round-trips; the stage proves it on the whole corpus while it packs it into
token shards, which are memory-mapped. The corpus is read in batches and the shards grow on disk: what the stage holds
does not hang on how much text there is. A given tokenizer is used as it is; the texts that it changes are counted.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from tasks.common import stage, tables
from tasks.common.settings import Settings
from tasks.common.stage import Job, StageError
from tasks.common.text import chat, shards
from tasks.common.text.encoding import Encoder, Ids, NotTheSame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUMERICS = False  # no model computes here
INPUTS = {"corpus": "data/validate/corpus", "source": "{config.tokenizer.path}"}
OUTPUTS = {"tokenizer": "data/tokenize/tokenizer", "shards": "data/tokenize/shards"}


class Train(Settings):
    """A tokenizer is learnt from the training split of the corpus and the chats."""

    name: Literal["train"] = Field(description="Where the tokenizer comes from")
    path: Literal["data/validate/instructions"] = Field(description="Table of chats, learnt from beside the corpus")
    vocabulary: int = Field(
        description="Entries of the vocabulary, special tokens and 256 bytes included", ge=300, le=2**18
    )
    characters: int = Field(description="Most characters of the corpus to learn from, a sample drawn by hash", ge=1000)


class From(Settings):
    """The tokenizer of a given model is used as it is."""

    name: Literal["from"] = Field(description="Where the tokenizer comes from")
    path: str = Field(
        description="Folder of a Transformers model or tokenizer, absolute or in the project", min_length=1
    )


class Config(Settings):
    """Settings of the tokenizer."""

    tokenizer: Annotated[Train | From, Field(discriminator="name")]
    context: int = Field(description="Longest sequence that the models read, in tokens", ge=32, le=2**17)


def run(config: Config, job: Job) -> dict[str, Any]:
    """Write the tokenizer and the shards; return counts, bytes per token and the round-trip's verdict."""
    source = config.tokenizer
    tokenizer = _train(config, source, job) if isinstance(source, Train) else _given(config, job.inputs["source"])
    tokenizer.save_pretrained(job.outputs["tokenizer"])
    encoder = Encoder(tokenizer, refuse_lossy=isinstance(source, Train))
    packing = Packing(tokenizer, encoder, job)
    metrics: dict[str, Any] = {"vocabulary": len(tokenizer)}
    for split in ("train", "heldout"):
        metrics[split] = packing.write(split)
    packing.measure()
    return {**metrics, "round_trip": not encoder.lossy, "lossy_texts": encoder.lossy}


def _texts(config: Train, job: Job) -> Iterator[str]:
    """Yield the texts to learn from: the head of the corpus, whose order a hash drew, and all chats of training."""
    left = config.characters
    for rows in tables.batches(job.inputs["corpus"], "train", ["text", "split"]):
        for text in rows["text"].to_pylist():
            left -= len(text)
            if left >= 0:
                yield text
        if left < 0:
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
    special = {"bos_token": chat.BOS, "eos_token": chat.END, "pad_token": chat.PAD, "mask_token": chat.MASK}
    return _wrapped(config, tokenizer, special, chat.TEMPLATE)


def _wrapped(config: Config, tokenizer: Any, special: dict[str, Any], template: Any) -> "PreTrainedTokenizerFast":
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


def _given(config: Config, path: Path) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a folder with its special tokens and chat template; a missing pad token is its end."""
    if not (path / "tokenizer.json").is_file():
        raise StageError(
            f"tokenize.tokenizer.path: expected a folder with a fast tokenizer of Transformers, but {path} holds no "
            "tokenizer.json; mend the path, or load the tokenizer with AutoTokenizer and save it there."
        )
    found = chat.load_tokenizer(path)
    if found.eos_token is None:
        raise StageError(
            f"tokenize.tokenizer.path: the tokenizer in {path} names no end token (eos_token), so a model could not "
            "tell when a text ends; name one in its tokenizer_config.json, or take another tokenizer."
        )
    special = dict(found.special_tokens_map)
    if found.pad_token is None:
        print(f"the tokenizer in {path} has no token to pad with; its end token {found.eos_token} is used")
        special["pad_token"] = found.eos_token
    return _wrapped(config, found.backend_tokenizer, special, found.chat_template)


class Packing:
    """Writes the splits of the corpus as token shards, in one pass over the texts."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", encoder: Encoder, job: Job) -> None:
        self.encoder, self.job, self.vocabulary = encoder, job, len(tokenizer)
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.start, self.end = (np.array([token], encoder.dtype) for token in (start, tokenizer.eos_token_id))
        self.bytes, self.seconds = 0, 0.0

    def write(self, split: str) -> dict[str, Any]:
        """Write one split and return its figures."""
        before = self.bytes
        counts = shards.write_split(self.job.outputs["shards"] / split, self._documents(split), self.vocabulary)
        size, inner = self.bytes - before, counts["tokens"] - 2 * counts["documents"]
        return {**counts, "bytes": size, "bytes_per_token": round(size / max(inner, 1), 4)}

    def measure(self) -> None:
        """Tell how fast texts were encoded and checked, by the time of one processor."""
        self.job.measured(encoded_bytes=self.bytes, encoding_cpu_seconds=round(self.seconds, 3))

    def _documents(self, split: str) -> Iterator[shards.Document]:
        from tqdm import tqdm

        corpus = self.job.inputs["corpus"]
        with tqdm(total=tables.count(corpus), desc=f"tokenize {split}", unit="text", mininterval=2) as bar:
            for rows in tables.batches(corpus, columns=["text", "names", "source", "group", "split"]):
                yield from self._encoded(tables.only(rows, split).to_pylist())
                bar.update(rows.num_rows)

    def _encoded(self, rows: list[dict[str, Any]]) -> list[shards.Document]:
        began = time.process_time()
        try:
            plain = iter(self.encoder.encode([row["text"] for row in rows if not row["names"]]))
            named = iter(self.encoder.offsets([row["text"] for row in rows if row["names"]]))
        except NotTheSame as error:
            raise StageError(str(error)) from error
        documents = [self._document(row, *(next(named) if row["names"] else (next(plain), []))) for row in rows]
        self.seconds += time.process_time() - began
        self.bytes += sum(document.bytes for document in documents)
        return documents

    def _document(self, row: dict[str, Any], ids: Ids, offsets: list[tuple[int, int]]) -> shards.Document:
        spans = [(start + 1, end + 1) for start, end in _name_spans(row["text"], row["names"], offsets)]
        packed, size = np.concatenate([self.start, ids, self.end]), len(row["text"].encode())
        return shards.Document(packed, spans, row["source"], row["group"], size)


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
