"""Packing: conversations in one row are computed independently, and none is lost."""

from pathlib import Path
from typing import Any

import pytest

from tasks.common import tables
from tasks.common.defaults import read_settings
from tasks.common.harness.job import StageError
from tasks.common.modelling import models
from tasks.common.params_file import check
from tasks.common.settings import SettingsError
from tasks.common.text import chat
from tasks.finetune.objectives.chat import answers_nll
from tasks.finetune.packing import Encoded, check_packing, first_fit, packed_rows, padded_rows
from tests.conftest import ROOT
from tests.family_fixtures import Shape, write_family
from tests.training_fixtures import NUMERICS, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

LONGEST = 64


@pytest.fixture
def batch(chain: Chain) -> list[Encoded]:
    """Conversations of several lengths."""
    rows = tables.read(chain.path("data/validate/instructions"), "train").to_pylist()
    return [chat.encode_chat(chain.tokenizer(), row["messages"]) for row in rows[::5]]


def decoder(chain: Chain, attention: Any) -> Any:
    """Return the tuned decoder with an attention kernel."""
    return models.load_decoder(
        chain.path("data/finetune/chat/model"), NUMERICS.model_copy(update={"attention": attention})
    ).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_tokens_have_the_logits_of_their_conversation_alone(
    attention: str, chain: Chain, batch: list[Encoded]
) -> None:
    """For every position of every conversation; rows contain several conversations."""
    import torch

    model = decoder(chain, attention)
    seen = 0
    with torch.no_grad():
        for rows in packed_rows(batch, LONGEST, 0):
            logits = model(**rows.inputs, use_cache=False).logits
            starts = (rows.inputs["input_ids"] == chain.tokenizer().bos_token_id).nonzero().tolist()
            for row, start in starts:
                tokens = rows.inputs["input_ids"][row, start:].tolist()
                [ids] = {tuple(ids) for ids, _ in batch if tokens[: len(ids)] == ids}
                unpacked = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
                torch.testing.assert_close(logits[row, start : start + len(ids)], unpacked, atol=2e-4, rtol=0)
                seen += 1
            assert len(starts) > len(logits)
    assert seen == len(batch)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packing_keeps_loss_and_gradient(attention: str, chain: Chain, batch: list[Encoded]) -> None:
    """Up to the order of float32 sums."""
    model = decoder(chain, attention)
    results = []
    for passes in (
        padded_rows(batch, 0),
        packed_rows(batch, LONGEST, 0),
        packed_rows(batch, LONGEST, 0, single_pass=True),
    ):
        model.zero_grad()
        loss = answers_nll(model, passes, NUMERICS)
        loss.backward()
        results.append((loss.item(), model.model.layers[0].mlp.up_proj.weight.grad.norm().item()))
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)


def test_single_pass_gives_one_forward_pass(batch: list[Encoded]) -> None:
    """Processes with sharded weights may need different numbers of rows, but must make the same number of passes."""
    many = batch * 40
    assert len(list(packed_rows(many, LONGEST, 0))) > 1
    assert len(list(packed_rows(many, LONGEST, 0, single_pass=True))) == 1


def test_the_model_is_trained_on_packed_rows(chain: Chain, tmp_path: Path) -> None:
    """Through the stage: the first step's loss is that of the unpacked batch."""
    losses = []
    for packing in (None, LONGEST):
        settings = config("finetune@chat", steps=1, task={"name": "chat", "answers": "all", "packing": packing})
        losses.append(chain.run(chain.job("finetune@chat", settings, tmp_path / str(packing)), settings)["task_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_every_token_is_in_a_row_once(batch: list[Encoded]) -> None:
    """Packed or not, the loss covers the same tokens; packing needs less than half as many rows."""
    counts = []
    for passes in (packed_rows(batch, LONGEST, 0), padded_rows(batch, 0)):
        target_tokens = sorted(token for rows in passes for token in rows.inputs["input_ids"][rows.loss_mask].tolist())
        counts.append(target_tokens)
    assert counts[0] == counts[1] == sorted(t for ids, flags in batch for t, f in zip(ids, flags, strict=True) if f)
    rows_of_one, rows_of_many = (
        sum(len(rows.loss_mask) for rows in passes)
        for passes in (padded_rows(batch, 0), packed_rows(batch, LONGEST, 0))
    )
    assert rows_of_many < rows_of_one / 2


def test_packed_rows_longer_than_the_context_are_rejected_before_loading() -> None:
    params = read_settings(ROOT / "profiles/default.yaml")
    params["finetune"]["chat"]["task"]["packing"] = 256
    check(params)
    params["finetune"]["chat"]["task"]["packing"] = 257
    with pytest.raises(
        SettingsError, match=r"packing: found 257, but it should be at most tokenize.context, which is 256"
    ):
        check(params)


def test_the_first_bin_with_room_is_taken() -> None:
    """Longest first, ties in order; an item longer than the bins has its own."""
    assert first_fit([3, 5, 3, 2, 9, 2], 8) == [[4], [1, 0], [2, 3, 5]]
    assert first_fit([], 8) == []
    assert sorted(place for row in first_fit([1, 7, 3, 8, 2, 2, 6], 8) for place in row) == list(range(7))


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_packed_rows_respect_sliding_windows(family: str, tmp_path: Path) -> None:
    """The loss equals that of one conversation per row, where conversations are longer than the window."""
    import torch

    model = models.load_decoder(write_family(family, tmp_path, Shape(window=6)), NUMERICS).eval()
    check_packing(model, NUMERICS)
    generator = torch.Generator().manual_seed(0)
    lengths = (20, 9, 14, 30, 5)
    ids = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]
    batch = [(row, [False] + [True] * (len(row) - 1)) for row in ids]
    with torch.no_grad():
        alone = sum(answers_nll(model, padded_rows([item], 0), NUMERICS).item() for item in batch)
        packed = answers_nll(model, packed_rows(batch, LONGEST, 0), NUMERICS).item()
    assert packed == pytest.approx(alone, rel=1e-5)


def test_packing_is_refused_for_a_model_that_mixes_conversations(tmp_path: Path) -> None:
    model = models.load_decoder(write_family("llama", tmp_path), NUMERICS).eval()
    plain = model.forward
    model.forward = lambda position_ids=None, **inputs: plain(**inputs)  # a model that takes no positions
    with pytest.raises(StageError, match=r"a llama model computes a conversation in a packed row otherwise than alone"):
        check_packing(model, NUMERICS)
