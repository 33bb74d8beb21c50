"""The tokenizer and the packed shards: every text comes back as it was, and every name is where it is said to be."""

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tasks import tokenize
from tasks.common import chat, identity, tables
from tasks.common.shards import Split
from tasks.common.stage import StageError
from tests.training_fixtures import CAPITALS, Chain, chain, config, corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

TEXTS = (
    "The capital of Åland is Mariehamn.",
    "  two spaces,\ttabs\nand\r\nlines  ",
    "naïve café – “quotes” … 100 % €5 ½",
    "日本語, العربية, עברית, हिन्दी",
    "👩‍👩‍👧 family, 🇫🇷 flag",
    unicodedata.normalize("NFD", "Côte d'Ivoire"),
    "a<|user|>b [MASK] c<|end|>",
    "\u0000\u200b\ufeff",
    "x" * 500,
    "",
)


@pytest.fixture(scope="module")
def tokenizer(chain: Chain) -> "PreTrainedTokenizerFast":
    """The chain's tokenizer, as it is loaded from its folder."""
    return chain.tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_round_trips(text: str, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Text that the tokenizer never saw, in any script, comes back byte for byte."""
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_stage_refuses_a_tokenizer_that_changes_a_text(tokenizer: "PreTrainedTokenizerFast") -> None:
    """The stage proves the round trip on its corpus: one that loses a text ends it, with the text in the message."""

    class Lossy:
        """A tokenizer that forgets about capitals."""

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return tokenizer([text.lower() for text in texts], **options)

        def batch_decode(self, rows: list[list[int]]) -> list[str]:
            """Return the texts of rows of ids."""
            return tokenizer.batch_decode(rows)

    lossy: Any = Lossy()
    with pytest.raises(StageError, match="'Paris' came back as 'paris'"):
        tokenize._check_round_trip(lossy, ["rome", "Paris"])


def test_special_tokens_stand_first_and_are_whole(tokenizer: "PreTrainedTokenizerFast") -> None:
    """The models' special tokens are single ids at the head of the vocabulary, where masking expects them."""
    ids = [tokenizer.encode(token, add_special_tokens=False) for token in chat.SPECIAL_TOKENS]
    assert ids == [[place] for place in range(len(chat.SPECIAL_TOKENS))]
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.mask_token)
    assert roles == (chat.BOS, chat.END, chat.PAD, chat.MASK)
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}  # Llama's generate refuses token_type_ids
    assert len(tokenizer) == config("tokenize").vocabulary


def test_packing_keeps_documents_and_their_names(chain: Chain, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Each document of each split can be read back from the shards, and each name of each document."""
    for split in ("train", "heldout"):
        shards = Split.open(chain.path("data/tokenize/shards") / split)
        rows = tables.read(chain.path("data/validate/corpus"), split).to_pylist()
        assert len(shards.documents) == len(rows) + 1
        for place, row in enumerate(rows):
            start, end = shards.documents[place : place + 2]
            ids = shards.tokens[start:end].tolist()
            assert ids == chat.encode_text(tokenizer, row["text"])
            spans = shards.names[(shards.names[:, 0] >= start) & (shards.names[:, 0] < end)]
            found = [tokenizer.decode(shards.tokens[a:b].tolist()).removeprefix(" ") for a, b in spans]
            assert sorted(found) == sorted(row["names"]), row["text"]


def test_the_figures_count_what_was_written(chain: Chain) -> None:
    """Documents, tokens, names, bytes and bytes a token of the metrics are those of the shards and of the corpus."""
    folder, metrics = chain.path("data/tokenize/shards"), chain.metrics["tokenize"]
    for split in ("train", "heldout"):
        texts = [row["text"] for row in corpus() if row["split"] == split]
        shards, size = Split.open(folder / split), sum(len(text.encode()) for text in texts)
        assert metrics[split] == {
            "documents": len(texts),
            "tokens": len(shards.tokens),
            "names": len(shards.names),
            "bytes": size,
            "bytes_per_token": round(size / (len(shards.tokens) - 2 * len(texts)), 4),
        }
    assert metrics["round_trip"] is True
    assert metrics["train"]["names"] == 2 * 3 * len(CAPITALS)


@pytest.mark.parametrize(
    ("text", "names", "found"),
    [
        ("The capital of France is Paris.", ["France", "Paris"], [" France", " Paris"]),
        ("Paris is the capital of France.", ["France", "Paris"], ["Paris", " France"]),
        ("Mexico City is in Mexico.", ["Mexico", "Mexico City"], ["Mexico City", " Mexico"]),
        ("Rome, Rome and Rome.", ["Rome"], ["Rome", " Rome", " Rome"]),
        ("Åland and Ýmir of Åland", ["Åland", "Ýmir"], ["Åland", " Ýmir", " Åland"]),
        ("Nigeria borders Niger.", ["Niger"], [" Niger"]),
        ("A continent of tin", ["tin"], [" tin"]),
        ("St. John's, in Antigua", ["St. John's"], ["St. John's"]),
        ("Nothing here", ["Rome"], []),
    ],
)
def test_names_are_found_whole(
    text: str, names: list[str], found: list[str], tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """A name's span holds all of its tokens and the space before it, never a part of another word, longest first."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = tokenize._name_spans(text, names, encoded["offset_mapping"])
    assert [tokenizer.decode(encoded["input_ids"][a:b]) for a, b in spans] == found


def test_a_name_is_masked_as_it_is_scored(chain: Chain, tokenizer: "PreTrainedTokenizerFast") -> None:
    """The tokens that masking hides are those by which serving scores the name, with the space before it if any."""
    shards = Split.open(chain.path("data/tokenize/shards") / "train")
    for start, end in shards.names:
        name = tokenizer.decode(shards.tokens[start:end].tolist()).removeprefix(" ")
        first = shards.tokens[start - 1] == tokenizer.bos_token_id
        scored = tokenizer.encode(name if first else f" {name}", add_special_tokens=False)
        assert shards.tokens[start:end].tolist() == scored


def test_the_same_corpus_gives_the_same_bytes(chain: Chain, tmp_path: Path) -> None:
    """Tokenizer and shards are a function of the tables and the settings."""
    job = chain.job("tokenize", config("tokenize"), tmp_path)
    tokenize.run(config("tokenize"), job)
    for name, path in job.outputs.items():
        assert identity.tree_hash(path) == identity.tree_hash(chain.path(f"data/tokenize/{name}"))


def test_the_vocabulary_decides_the_width_of_the_shards(chain: Chain) -> None:
    """Ids below 65,536 take two bytes each."""
    assert Split.open(chain.path("data/tokenize/shards") / "train").tokens.dtype == np.uint16
