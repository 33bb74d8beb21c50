"""Pretraining: both objectives against plain sums, and models that learnt their text."""

import csv
import logging
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tasks import pretrain
from tasks.common.modelling import models
from tasks.common.text.masking import Vocabulary
from tasks.common.text.shards import Split
from tasks.common.training.loop import Share
from tasks.common.training.losses import IGNORED
from tasks.pretrain import Causal, Masked
from tests.training_fixtures import NUMERICS, SHAPE, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

# Losses


def test_the_causal_loss_is_the_mean_surprise_of_each_next_token(chain: Chain, tmp_path: Path) -> None:
    """Against a loop over a batch's windows and positions."""
    import torch

    model = models.load_decoder(chain.path("data/pretrain/clm/model"), NUMERICS)
    split = Split.open(chain.path("data/tokenize/shards") / "train")
    settings = config("pretrain@clm", batch=4)
    causal = Causal(settings, chain.job("pretrain@clm", settings, tmp_path), model, split)
    drawn = causal.draw(3, Share())
    ids = torch.from_numpy(causal.mixture.batch(3))
    logp = torch.log_softmax(model(input_ids=ids).logits, -1)
    naive = [-logp[row, t, ids[row, t + 1]].item() for row in range(4) for t in range(15)]
    assert causal.sums(drawn)["causal"].item() == pytest.approx(sum(naive), rel=1e-5)
    assert (drawn.targets, drawn.tokens) == ({"causal": len(naive)}, 4 * 16)
    assert drawn.names == ["window 12", "window 13", "window 14", "window 15"]


def test_the_masked_loss_is_the_mean_surprise_where_something_is_asked(chain: Chain, tmp_path: Path) -> None:
    """The logits that are computed at the asked places alone are those of the whole model."""
    import torch

    model = models.load_encoder(chain.path("data/pretrain/mlm/model"), NUMERICS).eval()
    masked = masked_of(chain, tmp_path, model)
    drawn = masked.draw(2, Share())
    hidden, mask, targets = drawn.content
    logp = torch.log_softmax(model(input_ids=hidden, attention_mask=mask).logits, -1)
    naive = [-logp[row, t, targets[row, t]].item() for row, t in (targets != IGNORED).nonzero().tolist()]
    assert len(naive) > 10
    assert masked.sums(drawn)["masked"].item() == pytest.approx(sum(naive), rel=1e-5)
    assert (drawn.targets, drawn.tokens) == ({"masked": len(naive)}, int(mask.sum()))


def masked_of(chain: Chain, path: Path, model: Any) -> Masked:
    """Return the masked objective of the toy chain."""
    split, settings = Split.open(chain.path("data/tokenize/shards") / "train"), config("pretrain@mlm")
    tokenizer = chain.tokenizer()
    job = chain.job("pretrain@mlm", settings, path)
    return Masked(settings, job, model, split, Vocabulary.of(tokenizer), tokenizer.pad_token_id)


def test_masks_are_a_function_of_seed_and_step(chain: Chain, tmp_path: Path) -> None:
    """A step draws the same masks whenever it is drawn, and its parts are those of the whole batch."""
    first, again = (masked_of(chain, tmp_path / name, SimpleNamespace()) for name in ("first", "again"))
    drawn = [first.draw(step, Share()) for step in range(8)]
    for step in reversed(range(8)):
        for ours, theirs in zip(again.draw(step, Share()).content, drawn[step].content, strict=True):
            assert ours.equal(theirs)
        parts = [again.draw(step, Share(index, 3)) for index in range(3)]
        assert sum(part.targets["masked"] for part in parts) == drawn[step].targets["masked"]
        assert sorted(name for part in parts for name in part.names) == sorted(drawn[step].names)
    assert len({tuple(part.content[0].flatten().tolist()) for part in drawn}) == 8


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
    guess = float(np.log(config("tokenize").tokenizer.vocabulary))
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
