"""The tokenizer and the packed shards: every text round-trips, and every name has its token span."""

import copy
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tasks.common import identity, tables
from tasks.common.harness.job import StageError
from tasks.common.text import chat
from tasks.common.text.shards import Split
from tasks.tokenize import encoding
from tasks.tokenize import stage as tokenize
from tasks.tokenize.encoding import Encoder, RoundTripError
from tests.training_fixtures import CAPITALS, SETTINGS, Chain, chain, config, corpus, instructions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

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
    """Unseen text in any script round-trips byte for byte."""
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("text", [*TEXTS, "It's 1st\t \n\n \x1c x\x85y z", " 's s's  'll", "²³ Ⅷ 𝒜𝟘 _a_ ‿ \u200d"])
def test_words_give_the_ids_of_the_whole_text(text: str, tokenizer: "PreTrainedTokenizerFast") -> None:
    """The word cache gives the tokenizer's ids; special tokens in a text are encoded as letters."""
    encoder, special_ids = Encoder(tokenizer, refuse_lossy=True), tokenizer.backend_tokenizer.get_added_tokens_decoder()
    assert encoder.by_words
    for _ in range(2):  # the second time from the cache
        ids = encoder.encode([text])[0].tolist()
        assert ids == tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert not set(ids) & set(special_ids)


def test_word_boundaries_match_the_tokenizer_for_every_character(
    tokenizer: "PreTrainedTokenizerFast",
) -> None:
    """`re`, `regex` and the library agree on letters, numbers, spaces and other characters of all Unicode."""
    encoder = Encoder(tokenizer, refuse_lossy=True)
    signs = [chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000]
    texts = [f"{sign}a{sign}1 {sign}. " for sign in signs]
    old = [text for text in texts if not encoder.needs_library(text)]
    assert len(old) > 50_000
    for text in old:
        cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        words = encoder.ascii_words(text) if text.isascii() else encoder.all_words(text)
        assert np.cumsum([len(word) for word in words]).tolist() == [end for _, (_, end) in cut], text


def test_full_word_cache_is_cleared(tokenizer: "PreTrainedTokenizerFast", monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache does not grow with the corpus, and evicted words are encoded again."""
    monkeypatch.setattr(encoding, "MAX_CACHED_WORDS", 3)
    encoder = Encoder(tokenizer, refuse_lossy=True)
    for text in ("one two three four five", "one two"):
        assert encoder.encode([text])[0].tolist() == tokenizer.encode(text, add_special_tokens=False)
        assert len(encoder.words) <= 3


def lossy_copy(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """Return a copy of the tokenizer that lower-cases text."""
    from tokenizers import normalizers

    copied = copy.deepcopy(tokenizer)
    copied.backend_tokenizer.normalizer = normalizers.Lowercase()
    return copied


def test_tokenizer_that_changes_a_text_is_rejected(tokenizer: "PreTrainedTokenizerFast") -> None:
    """A text that does not round-trip ends the stage, with the text in the message."""
    encoder = Encoder(lossy_copy(tokenizer), refuse_lossy=True)
    with pytest.raises(RoundTripError, match="'Paris' came back as 'paris'"):
        encoder.encode(["rome", "Paris"])


def run_with_tokenizer(chain: Chain, path: Path, folder: Path) -> tuple[dict[str, Any], Path]:
    """Run the stage with the tokenizer of a folder and return its figures and where its outputs are."""
    settings = config("tokenize", tokenizer={"name": "from", "path": str(path)})
    job = chain.job("tokenize", settings, folder)
    assert job.inputs["source"] == path  # an input of the stage, so it is part of the recipe
    return tokenize.run(settings, job), folder


def test_given_tokenizer_is_used_unchanged(
    chain: Chain, tokenizer: "PreTrainedTokenizerFast", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids, special tokens and chat template are kept; EOS replaces a missing BOS or pad token."""
    from transformers import PreTrainedTokenizerFast

    foreign = PreTrainedTokenizerFast(tokenizer_object=lossy_copy(tokenizer).backend_tokenizer, eos_token="[MASK]")
    foreign.chat_template = "{{ messages }}"
    foreign.save_pretrained(tmp_path / "foreign")
    metrics, folder = run_with_tokenizer(chain, tmp_path / "foreign", tmp_path / "out")
    assert metrics["round_trip"] is False
    assert metrics["lossy_texts"] == sum(row["text"] != row["text"].lower() for row in corpus())
    assert "has no pad token; its end token [MASK] is used instead" in capsys.readouterr().out
    saved = chat.load_tokenizer(folder / "tokenizer/tokenizer")
    assert (saved.eos_token, saved.pad_token, saved.chat_template) == ("[MASK]", "[MASK]", "{{ messages }}")
    assert saved.model_max_length == config("tokenize").context
    shards = Split.open(folder / "shards/shards/heldout")
    texts = [row["text"] for row in corpus() if row["split"] == "heldout"]
    for index, text in enumerate(texts):
        start, end = shards.documents[index : index + 2]
        ids = shards.tokens[start:end].tolist()
        assert ids == chat.encode_text(saved, text)
        assert ids[0] == ids[-1] == saved.eos_token_id


def test_tokenizer_without_bos_and_eos_uses_cls_and_sep(
    chain: Chain, tokenizer: "PreTrainedTokenizerFast", tmp_path: Path
) -> None:
    """BERT's tokenizers have neither BOS nor EOS."""
    from transformers import PreTrainedTokenizerFast

    special = {"cls_token": tokenizer.bos_token, "sep_token": tokenizer.eos_token, "mask_token": tokenizer.mask_token}
    given = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
    given.save_pretrained(tmp_path / "bert")
    _, folder = run_with_tokenizer(chain, tmp_path / "bert", tmp_path / "out")
    saved = chat.read_tokenizer(folder / "tokenizer/tokenizer")
    assert (saved.cls_token, saved.sep_token, saved.eos_token) == (tokenizer.bos_token, tokenizer.eos_token, None)
    assert saved.pad_token == tokenizer.eos_token
    shards = Split.open(folder / "shards/shards/heldout")
    start, end = shards.documents[:2]
    ids = shards.tokens[start:end].tolist()
    assert (ids[0], ids[-1]) == (given.cls_token_id, given.sep_token_id)


def test_the_same_tokenizer_given_makes_the_same_shards(chain: Chain, tmp_path: Path) -> None:
    """A tokenizer trained here can be given to another run."""
    metrics, folder = run_with_tokenizer(chain, chain.path("data/tokenize/tokenizer"), tmp_path)
    assert identity.tree_hash(folder / "shards/shards") == identity.tree_hash(chain.path("data/tokenize/shards"))
    assert metrics == chain.metrics["tokenize"]


def test_unusable_given_tokenizer_is_reported(
    chain: Chain, tokenizer: "PreTrainedTokenizerFast", tmp_path: Path
) -> None:
    """A folder without a tokenizer, and a tokenizer without EOS."""
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "empty").mkdir()
    with pytest.raises(StageError, match=r"the tokenizer in .* cannot be loaded .* expected tokenizer\.json and"):
        run_with_tokenizer(chain, tmp_path / "empty", tmp_path / "one")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "endless")
    with pytest.raises(StageError, match=r"names no end token \(eos_token, or sep_token of an encoder\)"):
        run_with_tokenizer(chain, tmp_path / "endless", tmp_path / "two")


def test_tokenizer_training_sample_ends_at_its_limit(chain: Chain, tmp_path: Path) -> None:
    """Only the beginning of the corpus and the training chats are trained on; other text can still be encoded."""
    learnt = {**SETTINGS["tokenize"]["tokenizer"], "max_characters": 1000}
    settings = config("tokenize", tokenizer=learnt)
    job = chain.job("tokenize", settings, tmp_path)
    texts = list(tokenize._texts(settings.tokenizer, job))
    rows = [row["text"] for row in corpus() if row["split"] == "train"]
    head = texts[: next(index for index, text in enumerate(texts) if text != rows[index])]
    assert 900 < sum(map(len, head)) <= 1000
    assert len(texts) - len(head) == 2 * sum(row["split"] == "train" for row in instructions())
    assert tokenize.run(settings, job)["round_trip"] is True


def test_special_tokens_come_first_and_are_not_split(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Special tokens are single ids at the start of the vocabulary, where masking expects them."""
    ids = [tokenizer.encode(token, add_special_tokens=False) for token in chat.SPECIAL_TOKENS]
    assert ids == [[index] for index in range(len(chat.SPECIAL_TOKENS))]
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.mask_token)
    assert roles == (chat.BOS, chat.EOS, chat.PAD, chat.MASK)
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}  # Llama's generate refuses token_type_ids
    assert len(tokenizer) == config("tokenize").tokenizer.vocabulary


def test_packing_keeps_documents_and_their_names(chain: Chain, tokenizer: "PreTrainedTokenizerFast") -> None:
    """All documents and their names can be decoded from the shards."""
    for split in ("train", "heldout"):
        shards = Split.open(chain.path("data/tokenize/shards") / split)
        rows = tables.read(chain.path("data/validate/corpus"), split).to_pylist()
        assert len(shards.documents) == len(rows) + 1
        for index, row in enumerate(rows):
            start, end = shards.documents[index : index + 2]
            ids = shards.tokens[start:end].tolist()
            assert ids == chat.encode_text(tokenizer, row["text"])
            spans = shards.names[(shards.names[:, 0] >= start) & (shards.names[:, 0] < end)]
            texts = [tokenizer.decode(shards.tokens[a:b].tolist()).removeprefix(" ") for a, b in spans]
            assert sorted(texts) == sorted(row["names"]), row["text"]


def test_the_figures_count_what_was_written(chain: Chain) -> None:
    """Documents, tokens, names, bytes and bytes per token in the metrics match the shards and the corpus."""
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
    ("text", "names", "expected"),
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
def test_name_spans_cover_whole_names(
    text: str, names: list[str], expected: list[str], tokenizer: "PreTrainedTokenizerFast"
) -> None:
    """A name's span has all of its tokens and the space before it, never a part of another word; longer names win."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = tokenize._name_spans(text, names, encoded["offset_mapping"])
    assert [tokenizer.decode(encoded["input_ids"][a:b]) for a, b in spans] == expected


def test_a_name_is_masked_as_it_is_scored(chain: Chain, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Masking hides the same tokens that serving scores for the name, including the space before it."""
    shards = Split.open(chain.path("data/tokenize/shards") / "train")
    for start, end in shards.names:
        name = tokenizer.decode(shards.tokens[start:end].tolist()).removeprefix(" ")
        first = shards.tokens[start - 1] == tokenizer.bos_token_id
        scored = tokenizer.encode(name if first else f" {name}", add_special_tokens=False)
        assert shards.tokens[start:end].tolist() == scored


def test_the_same_corpus_gives_the_same_bytes(chain: Chain, tmp_path: Path) -> None:
    """Tokenizer and shards depend only on the tables and the settings."""
    job = chain.job("tokenize", config("tokenize"), tmp_path)
    tokenize.run(config("tokenize"), job)
    for name, path in job.outputs.items():
        assert identity.tree_hash(path) == identity.tree_hash(chain.path(f"data/tokenize/{name}"))


def test_shard_width_depends_on_the_vocabulary_size(chain: Chain) -> None:
    """Ids below 65,536 take two bytes each."""
    assert Split.open(chain.path("data/tokenize/shards") / "train").tokens.dtype == np.uint16
