"""Pretraining: both objectives against plain sums, and models that learn their text."""

import csv
import logging
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tasks.common.modelling import models
from tasks.common.text.shards import Split
from tasks.common.training.loop import Shard
from tasks.common.training.losses import IGNORE_INDEX
from tasks.pretrain import stage as pretrain
from tasks.pretrain.masking import Vocabulary
from tasks.pretrain.stage import CausalObjective, MaskedObjective
from tests.training_fixtures import NUMERICS, SHAPE, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

# Losses


def test_the_causal_loss_is_the_next_token_nll(chain: Chain, tmp_path: Path) -> None:
    """Against a loop over a batch's windows and positions."""
    import torch

    model = models.load_decoder(chain.path("data/pretrain/causal/model"), NUMERICS)
    split = Split.open(chain.path("data/tokenize/shards") / "train")
    settings = config("pretrain@causal", batch=4)
    causal = CausalObjective(settings, chain.job("pretrain@causal", settings, tmp_path), model, split)
    batch = causal.draw(3, Shard())
    ids = torch.from_numpy(causal.mixture.batch(3))
    logp = torch.log_softmax(model(input_ids=ids).logits, -1)
    naive = [-logp[row, t, ids[row, t + 1]].item() for row in range(4) for t in range(15)]
    assert causal.loss_sums(batch)["causal"].item() == pytest.approx(sum(naive), rel=1e-5)
    assert (batch.target_counts, batch.tokens) == ({"causal": len(naive)}, 4 * 16)
    assert batch.names == ["window 12", "window 13", "window 14", "window 15"]


def test_the_masked_loss_is_the_nll_of_the_targets(chain: Chain, tmp_path: Path) -> None:
    """Logits computed only at targets equal those of the whole model."""
    import torch

    model = models.load_encoder(chain.path("data/pretrain/masked/model"), NUMERICS).eval()
    masked = masked_of(chain, tmp_path, model)
    batch = masked.draw(2, Shard())
    hidden, mask, targets = batch.inputs
    logp = torch.log_softmax(model(input_ids=hidden, attention_mask=mask).logits, -1)
    naive = [-logp[row, t, targets[row, t]].item() for row, t in (targets != IGNORE_INDEX).nonzero().tolist()]
    assert len(naive) > 10
    assert masked.loss_sums(batch)["masked"].item() == pytest.approx(sum(naive), rel=1e-5)
    assert (batch.target_counts, batch.tokens) == ({"masked": len(naive)}, int(mask.sum()))


def masked_of(chain: Chain, path: Path, model: Any) -> MaskedObjective:
    """Return the masked objective of the toy chain."""
    split, settings = Split.open(chain.path("data/tokenize/shards") / "train"), config("pretrain@masked")
    tokenizer = chain.tokenizer()
    job = chain.job("pretrain@masked", settings, path)
    return MaskedObjective(settings, job, model, split, Vocabulary.of(tokenizer), tokenizer.pad_token_id)


def test_masks_are_a_function_of_seed_and_step(chain: Chain, tmp_path: Path) -> None:
    """A step has the same masks every time, and its shards are those of the whole batch."""
    first, again = (masked_of(chain, tmp_path / name, SimpleNamespace()) for name in ("first", "again"))
    batches = [first.draw(step, Shard()) for step in range(8)]
    for step in reversed(range(8)):
        for ours, theirs in zip(again.draw(step, Shard()).inputs, batches[step].inputs, strict=True):
            assert ours.equal(theirs)
        parts = [again.draw(step, Shard(index, 3)) for index in range(3)]
        assert sum(part.target_counts["masked"] for part in parts) == batches[step].target_counts["masked"]
        assert sorted(name for part in parts for name in part.names) == sorted(batches[step].names)
    assert len({tuple(part.inputs[0].flatten().tolist()) for part in batches}) == 8


def test_heldout_loss_is_the_mean_over_whole_windows(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a loop over windows; an incomplete window is dropped, and without a full one there is no loss."""
    import torch

    model = models.load_decoder(chain.path("data/pretrain/causal/model"), NUMERICS).eval()
    split = Split.open(chain.path("data/tokenize/shards") / "heldout")
    sums = []
    for start in range(0, len(split.tokens) - 15, 16):
        ids = torch.tensor([split.tokens[start : start + 16].tolist()])
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        sums += [-logp[t, ids[0, t + 1]].item() for t in range(15)]
    figures = pretrain.heldout_figures(model, split, 16, "held-out text")
    assert figures["heldout_loss"] == pytest.approx(sum(sums) / len(sums), rel=1e-5)
    assert "held-out text: 100%" in capsys.readouterr().err
    assert pretrain.heldout_figures(model, split, len(split.tokens) + 1)["heldout_loss"] is None


# Stages


@pytest.mark.parametrize("key", ["causal", "masked"])
def test_a_model_learns_its_text(key: str, chain: Chain) -> None:
    """The loss falls far below that of a uniform guess, and history and metrics agree."""
    path = chain.path(f"data/pretrain/{key}/history.csv")
    with path.open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    metrics = chain.metrics[f"pretrain@{key}"]
    guess = float(np.log(config("tokenize").tokenizer.vocabulary))
    assert losses[0] == pytest.approx(guess, rel=0.1)
    assert losses[-1] == metrics["loss"] < guess / 3
    assert metrics["steps"] == config(f"pretrain@{key}").steps


@pytest.mark.parametrize(("key", "kind"), [("causal", "LlamaForCausalLM"), ("masked", "ModernBertForMaskedLM")])
def test_models_have_the_shape_that_was_asked_for(key: str, kind: str, chain: Chain) -> None:
    """Plain Transformers loads the folder, tokenizer included."""
    from transformers import AutoConfig, AutoTokenizer

    path = chain.path(f"data/pretrain/{key}/model")
    shape, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert shape.architectures == [kind]
    actual = (shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads, shape.intermediate_size)
    assert actual == tuple(SHAPE.values())
    assert len(tokenizer) == shape.vocab_size
    assert shape.max_position_embeddings == config("tokenize").context
    assert tokenizer.decode(tokenizer.encode("Åland", add_special_tokens=False)) == "Åland"


def test_suppressed_warnings_return_after_the_context(caplog: pytest.LogCaptureFixture) -> None:
    """Errors and other libraries' warnings are not suppressed, and an exception ends the suppression too."""
    caplog.set_level(logging.WARNING)  # BentoML, built with in an earlier test, raises the level of the root logger
    ours, other = logging.getLogger("library.part"), logging.getLogger("another")
    with suppress(KeyError), models.suppress_warnings("library"):
        ours.warning("expected")
        ours.error("not expected")
        other.warning("of another")
        raise KeyError
    ours.warning("afterwards")
    assert [record.message for record in caplog.records] == ["not expected", "of another", "afterwards"]
