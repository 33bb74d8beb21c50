"""Bits per byte: a case computed by hand, a plain sum over a text's tokens, and independence of the tokenization."""

import math
from pathlib import Path
from typing import Any

import pytest

from tasks.common.evaluation.nll import bits_per_byte, model_nll, text_windows
from tasks.common.modelling import models
from tasks.common.text.shards import Document, Split, write_split
from tests.training_fixtures import NUMERICS, Chain, chain, corpus

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)
START, END = 1, 2


def split_of(folder: Path, *texts: tuple[list[int], int]) -> Split:
    """Return a split of texts, each given as tokens and a number of bytes."""
    write_split(folder, [Document([START, *ids, END], [], "s", None, size) for ids, size in texts], 300)
    return Split.open(folder)


def test_bits_per_byte_matches_a_hand_calculation(tmp_path: Path) -> None:
    """Five tokens of 3 bits each for eight bytes give 15/8; BOS and EOS cost nothing."""
    split = split_of(tmp_path / "split", ([10, 11, 12], 5), ([13, 14], 3), ([], 0))
    rows_seen: list[list[int]] = []

    def nats(rows: Any) -> list[float]:
        rows_seen.extend(rows.tolist())
        return [(len(row) - 1) * 3 * math.log(2) for row in rows]

    assert bits_per_byte(split, 16, nats) == 15 / 8
    assert sorted(rows_seen) == [[START, 10, 11, 12], [START, 13, 14]]
    assert bits_per_byte(split_of(tmp_path / "none"), 16, nats) is None


def test_text_windows_contain_each_target_token_once(tmp_path: Path) -> None:
    ids = list(range(10, 31))
    for window in (2, 3, 5, 16, 22, 23):
        rows = [
            row for part in text_windows(split_of(tmp_path / str(window), (ids, 9)), window) for row in part.tolist()
        ]
        assert sorted(token for row in rows for token in row[1:]) == ids
        assert max(map(len, rows)) <= window
        assert all(row[0] in (START, row[1] - 1) for row in rows)


def test_bits_per_byte_does_not_depend_on_tokenization(tmp_path: Path) -> None:
    """At probability 1/2 per byte, bits per byte are 1 whether tokens have one byte or three; perplexities differ."""
    size = {10: 1, 11: 2, 12: 3}  # bytes of a token

    def nats(rows: Any) -> list[float]:
        return [sum(size[token] * math.log(2) for token in row[1:]) for row in rows.tolist()]

    for name, ids in {"bytes": [10] * 8, "pairs": [11] * 4, "mixed": [12, 12, 10, 10]}.items():
        assert bits_per_byte(split_of(tmp_path / name, (ids, 8)), 4, nats) == 1.0


def test_model_nll_matches_a_plain_sum(chain: Chain) -> None:
    """The reference is a loop over the held-out texts, their tokens and a softmax."""
    import torch

    model = models.load_decoder(chain.path("data/pretrain/causal/model"), NUMERICS).eval()
    tokenizer = chain.tokenizer()
    texts = [row["text"] for row in corpus() if row["split"] == "heldout"]
    nats, size = 0.0, 0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        nats -= sum(logp[position, token].item() for position, token in enumerate(ids[1:]))
        size += len(text.encode())
    split = Split.open(chain.path("data/tokenize/shards") / "heldout")
    assert int(split.bytes.sum()) == size
    bits = bits_per_byte(split, 64, lambda rows: model_nll(model, rows))
    assert bits == pytest.approx(nats / math.log(2) / size, abs=1e-4)
