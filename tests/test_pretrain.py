"""Pretraining: what is masked and what is asked, both losses against plain sums, models that learnt their text."""

import csv
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import pretrain
from tasks.common import models
from tasks.common.shards import Document, Mixture, Split, write_split
from tasks.pretrain import IGNORED, MaskedConfig, Masker
from tests.training_fixtures import NUMERICS, SHAPE, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

VOCABULARY, SPECIAL, MASK, PAD, BOS, END = 400, 7, 3, 0, 1, 2


class Ids:
    """What masking asks of a tokenizer."""

    mask_token_id, pad_token_id = MASK, PAD

    def __len__(self) -> int:
        return VOCABULARY


def masker(path: Path, names: list[tuple[int, int]], **changes: Any) -> tuple[Masker, Split]:
    """Return a masker over 200 random texts of 30 tokens, each with the same spans of names."""
    random = np.random.default_rng(0)
    texts = [[BOS, *random.integers(SPECIAL, VOCABULARY, 28).tolist(), END] for _ in range(200)]
    write_split(path, [Document(ids, names) for ids in texts], VOCABULARY)
    split = Split.open(path)
    settings: MaskedConfig = config("pretrain@mlm", batch=20, window=32, statements=1.0 if names else 0.0, **changes)
    tokenizer: Any = Ids()
    return Masker(settings, split, tokenizer, 1), split


def originals(masked: Masker, step: int) -> np.ndarray[Any, Any]:
    """Return a step's ids before anything was hidden."""
    return masked.batches.read(masked.batches.at(step), PAD)[0]


# Masking


def test_tokens_are_masked_80_10_10(tmp_path: Path) -> None:
    """Of 15 % of the tokens, 80 % become the mask, 10 % another token and 10 % stay (Devlin et al. 2019, 3.1)."""
    masked, _ = masker(tmp_path / "split", [], mask_tokens=0.15, mask_names=0.0)
    asked = total = 0
    fates = np.zeros(3)
    for step in range(200):
        hidden, mask, targets = masked.draw(step)
        ids = originals(masked, step)
        places = targets != IGNORED
        assert (targets[places] == ids[places]).all()
        assert (hidden[~places] == ids[~places]).all()
        total += int((mask.sum(1) - 2).sum())
        asked += int(places.sum())
        masks, same = hidden[places] == MASK, hidden[places] == ids[places]
        fates += (masks.sum(), (~masks & ~same).sum(), same.sum())
    # 16,800 of 112,000 tokens: a standard deviation of 0.1 % in the first rate and of at most 0.3 % in the others.
    assert asked / total == pytest.approx(0.15, abs=0.005)
    assert fates / asked == pytest.approx([0.8, 0.1, 0.1], abs=0.012)


def test_special_tokens_are_neither_hidden_nor_drawn(tmp_path: Path) -> None:
    """Start, end and padding are never asked for, and no token is replaced by one of them."""
    masked, _ = masker(tmp_path / "split", [], mask_tokens=0.9, mask_names=0.0)
    drawn = set()
    for step in range(50):
        hidden, _, targets = masked.draw(step)
        ids = originals(masked, step)
        assert (targets[ids < SPECIAL] == IGNORED).all()
        assert (hidden[ids < SPECIAL] == ids[ids < SPECIAL]).all()
        drawn |= set(hidden[hidden != ids].tolist())
    assert min(drawn - {MASK}) >= SPECIAL
    assert len(drawn) > 0.9 * (VOCABULARY - SPECIAL)


def test_names_are_hidden_whole(tmp_path: Path) -> None:
    """One name of a text or none, each of its tokens by a mask, all of them asked; the other name stays in sight."""
    spans = [(3, 6), (9, 13)]
    masked, _ = masker(tmp_path / "split", spans, mask_tokens=0.15, mask_names=0.6)
    counts = {spans[0]: 0, spans[1]: 0, None: 0}
    for step in range(100):
        hidden, _, targets = masked.draw(step)
        ids = originals(masked, step)
        for row in range(len(ids)):
            asked = [span for span in spans if (targets[row, slice(*span)] != IGNORED).any()]
            counts[asked[0] if asked else None] += 1
            assert len(asked) <= 1
            for span in spans:
                place = slice(*span)
                assert (hidden[row, place] == (MASK if span in asked else ids[row, place])).all()
                assert (targets[row, place] == (ids[row, place] if span in asked else IGNORED)).all()
    rows = sum(counts.values())
    shares = [counts[spans[0]] / rows, counts[spans[1]] / rows, counts[None] / rows]
    assert shares == pytest.approx([0.3, 0.3, 0.4], abs=0.04)  # 2,100 texts: a standard deviation of 1 %


def test_masks_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    """A step draws the same masks whenever it is drawn; the next epoch hides the same texts otherwise."""
    first, split = masker(tmp_path / "split", [(3, 6), (9, 13)])
    drawn = [first.draw(step) for step in range(30)]
    tokenizer: Any = Ids()
    again = Masker(first.config, split, tokenizer, 1)
    for step in reversed(range(30)):
        for ours, theirs in zip(again.draw(step), drawn[step], strict=True):
            assert np.array_equal(ours, theirs)
    other = Masker(first.config, split, tokenizer, 2)
    assert not all(np.array_equal(other.draw(step)[0], drawn[step][0]) for step in range(5))


def test_a_step_always_asks_something(tmp_path: Path) -> None:
    """Where chance hides nothing at all, the loss is still a number."""
    masked, _ = masker(tmp_path / "split", [], mask_tokens=1e-9, mask_names=0.0)
    for step in range(20):
        assert (masked.draw(step)[2] != IGNORED).sum() == 1


# Losses


def test_the_causal_loss_is_the_mean_surprise_of_each_next_token(chain: Chain, tmp_path: Path) -> None:
    """Against a loop over a batch's windows and positions."""
    import torch

    model = models.load_decoder(chain.path("data/pretrain/clm/model"), NUMERICS)
    split = Split.open(chain.path("data/tokenize/shards") / "train")
    mixture = Mixture(split, 16, 4, 0.5, 1)
    job = chain.job("pretrain@clm", config("pretrain@clm"), tmp_path)
    loss, _, read = pretrain._causal_loss(model, mixture, job, 3)
    ids = torch.from_numpy(mixture.batch(3))
    logp = torch.log_softmax(model(input_ids=ids).logits, -1)
    naive = [-logp[row, t, ids[row, t + 1]].item() for row in range(4) for t in range(15)]
    assert loss.item() == pytest.approx(sum(naive) / len(naive), rel=1e-5)
    assert read == 4 * 16


def test_the_masked_loss_is_the_mean_surprise_where_something_is_asked(chain: Chain, tmp_path: Path) -> None:
    """The logits that are computed at the asked places alone are those of the whole model."""
    import torch

    model = models.load_encoder(chain.path("data/pretrain/mlm/model"), NUMERICS).eval()
    split = Split.open(chain.path("data/tokenize/shards") / "train")
    settings = config("pretrain@mlm")
    masked = Masker(settings, split, chain.tokenizer(), 1)
    loss, _, read = pretrain._masked_loss(model, masked, chain.job("pretrain@mlm", settings, tmp_path), 2)
    hidden, mask, targets = (torch.from_numpy(array) for array in masked.draw(2))
    logp = torch.log_softmax(model(input_ids=hidden, attention_mask=mask).logits, -1)
    naive = [-logp[row, t, targets[row, t]].item() for row, t in (targets != IGNORED).nonzero().tolist()]
    assert len(naive) > 10
    assert loss.item() == pytest.approx(sum(naive) / len(naive), rel=1e-5)
    assert read == mask.sum()


def test_heldout_loss_is_the_mean_over_whole_windows(chain: Chain) -> None:
    """Against a loop over windows; what does not fill a window is left out, and less than one gives no figure."""
    import torch

    model = models.load_decoder(chain.path("data/pretrain/clm/model"), NUMERICS).eval()
    split = Split.open(chain.path("data/tokenize/shards") / "heldout")
    sums = []
    for start in range(0, len(split.tokens) - 15, 16):
        ids = torch.tensor([split.tokens[start : start + 16].tolist()])
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        sums += [-logp[t, ids[0, t + 1]].item() for t in range(15)]
    assert pretrain.heldout_loss(model, split, 16) == pytest.approx(sum(sums) / len(sums), rel=1e-5)
    assert pretrain.heldout_loss(model, split, len(split.tokens) + 1) is None


# Stages


@pytest.mark.parametrize("key", ["clm", "mlm"])
def test_a_model_learns_its_text(key: str, chain: Chain) -> None:
    """The loss falls far below that of a guess among all tokens, and curves and metrics tell the same story."""
    path = chain.path(f"data/pretrain/{key}/history.csv")
    with path.open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    metrics = chain.metrics[f"pretrain@{key}"]
    guess = float(np.log(config("tokenize").vocabulary))
    assert losses[0] == pytest.approx(guess, rel=0.1)
    assert losses[-1] == metrics["loss"] < guess / 3
    assert metrics["steps"] == config(f"pretrain@{key}").steps


@pytest.mark.parametrize(("key", "kind"), [("clm", "LlamaForCausalLM"), ("mlm", "ModernBertForMaskedLM")])
def test_models_have_the_shape_that_was_asked_for(key: str, kind: str, chain: Chain) -> None:
    """Any Transformers user can load the folder, tokenizer included."""
    from transformers import AutoConfig, AutoTokenizer

    path = chain.path(f"data/pretrain/{key}/model")
    shape, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert shape.architectures == [kind]
    found = (shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads, shape.intermediate_size)
    assert found == tuple(SHAPE.values())
    assert len(tokenizer) == shape.vocab_size
    assert shape.max_position_embeddings == config("tokenize").context
    assert tokenizer.decode(tokenizer.encode("Åland", add_special_tokens=False)) == "Åland"


def test_a_library_is_quiet_only_as_long_as_it_is_told_to(caplog: pytest.LogCaptureFixture) -> None:
    """Its warnings are kept back, its errors and those of others are not, and a failure within ends it too."""
    ours, other = logging.getLogger("library.part"), logging.getLogger("another")
    with suppress(KeyError), models.quiet("library"):
        ours.warning("expected")
        ours.error("not expected")
        other.warning("of another")
        raise KeyError
    ours.warning("afterwards")
    assert [record.message for record in caplog.records] == ["not expected", "of another", "afterwards"]
