"""Reward models by training method: a head on cached states equals a head on the model, whose weights do not change."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.common import tables
from tasks.common.defaults import read_settings
from tasks.common.harness.job import StageError
from tasks.common.modelling import head_models, models
from tasks.common.params_file import check
from tasks.common.reward.frozen import FrozenBackbone
from tasks.common.reward.scoring import Scorer
from tasks.common.settings import SettingsError
from tasks.reward import stage as reward
from tests.conftest import ROOT
from tests.training_fixtures import LORA, NUMERICS, STABLE_OPTIMIZER, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

ENCODER, DECODER = "data/pretrain/masked/model", "data/finetune/chat/model"
HEAD: dict[str, Any] = {"method": {"name": "head", "layers": 2, "pooling": "model"}, "word_dropout": 0.0}
REPLIES = ["The soup was wonderful.", "The garden was poor, and the song was terrible.", "Peru."]


def train_scorer(settings: Any, chain: Chain, folder: Path) -> tuple[dict[str, Any], Scorer, dict[str, Any]]:
    """Train a reward model; return its metrics, scorer and weights."""
    from safetensors.torch import load_file

    job = chain.job("reward@train", settings, folder)
    metrics = chain.run(job, settings)
    return metrics, Scorer.load(job.outputs["model"], NUMERICS), load_file(job.outputs["model"] / "model.safetensors")


def reply_scores(scorer: Scorer) -> list[float]:
    """Return the scores of three replies."""
    return scorer.score([([], reply) for reply in REPLIES])


def base_weights(base: str, chain: Chain) -> dict[str, Any]:
    """Return the weights of the base model."""
    from safetensors.torch import load_file

    return dict(load_file(chain.path(base) / "model.safetensors"))


@pytest.mark.parametrize(
    ("base", "layers", "pooling"),
    [(ENCODER, 2, "model"), (ENCODER, 1, "mean"), (DECODER, 2, "model"), (DECODER, 1, "mean")],
)
def test_head_on_cached_states_matches_head_on_model(
    base: str, layers: int, pooling: str, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training without cached states gives the same scores; the backbone's weights do not change."""
    method = {"name": "head", "layers": layers, "pooling": pooling}
    settings = config(
        "reward", model=base, heads=2, steps=40, method=method, word_dropout=0.0, optimizer=STABLE_OPTIMIZER
    )
    metrics, scorer, weights = train_scorer(settings, chain, tmp_path / "remembered")
    before = base_weights(base, chain)
    shared = [name for name in weights if name in before]
    assert all(weights[name].equal(before[name]) for name in shared)
    assert {name.partition(".")[0] for name in weights if name not in before} <= {"score", "classifier"}
    assert len({name.split(".")[2] for name in weights if name.startswith("model.layers.")}) == layers
    monkeypatch.setattr(reward, "FrozenBackbone", lambda *_: None)
    other, plain, others = train_scorer(settings, chain, tmp_path / "worked-out")
    assert all(others[name].equal(before[name]) for name in shared)
    assert reply_scores(scorer) == pytest.approx(
        reply_scores(plain), abs=1e-4
    )  # float32, sums in another order, over 40 steps
    assert metrics["rating_loss"] == pytest.approx(other["rating_loss"], abs=1e-4)
    assert metrics["gap_at_least_1"] == other["gap_at_least_1"]


def test_frozen_states_are_computed_once_per_text(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For texts in several rankings and repeated rows, in training and evaluation."""
    settings, computed = config("reward", steps=5, **HEAD), list[tuple[int, ...]]()
    outputs = head_models.head_outputs

    def record_rows(model: Any, tokenizer: Any, rows: Any, *others: Any) -> Any:
        computed.extend(map(tuple, rows))
        return outputs(model, tokenizer, rows, *others)

    monkeypatch.setattr(head_models, "head_outputs", record_rows)
    job = chain.job("reward@train", settings, tmp_path)
    rows = tables.read(job.inputs["rankings"]).to_pylist()
    again = [{**row, "id": f"{row['id']}-again"} for row in rows]
    job.inputs["rankings"] = tmp_path / "table"
    tables.write([*rows, *again], job.inputs["rankings"], tables.schema("rankings"))
    chain.run(job, settings)
    assert len(computed) == len(set(computed)) > 10


def test_cached_outputs_match_the_head(chain: Chain) -> None:
    """For cached and new rows, and after the head has changed."""
    import torch

    model: Any = head_models.new_scorer(chain.path(ENCODER), NUMERICS, 3).eval()
    tokenizer = chain.tokenizer()
    frozen, rows = FrozenBackbone(model, tokenizer, NUMERICS), [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11]]
    frozen.cache_states(rows[:1], 2)
    with torch.no_grad():
        for _ in range(2):
            wanted = head_models.head_outputs(model, tokenizer, [*rows, rows[0]], NUMERICS, 2)
            torch.testing.assert_close(frozen.outputs([*rows, rows[0]], 2), wanted, atol=1e-5, rtol=0)
            model.classifier.weight.mul_(-2.0)
    assert len(frozen.states) == 3


@pytest.mark.parametrize(
    ("base", "method", "trained_prefixes"),
    [
        (ENCODER, {"name": "top_layers", "layers": 1}, ("model.layers.1.", "model.final_norm.", "head.")),
        (DECODER, LORA, ("model.layers.0.", "model.layers.1.")),
    ],
    ids=["top", "lora"],
)
def test_method_trains_its_weights_only(
    base: str, method: dict[str, Any], trained_prefixes: tuple[str, ...], chain: Chain, tmp_path: Path
) -> None:
    """The new head trains too; the saved model has no adapters and orders held-out sentences as people did."""
    settings = config("reward", model=base, method=method)
    metrics, scorer, weights = train_scorer(settings, chain, tmp_path)
    before = base_weights(base, chain)
    changed = [name for name in weights if name in before and not weights[name].equal(before[name])]
    assert changed
    assert all(name.startswith(trained_prefixes) for name in changed)
    assert metrics["gap_at_least_1"]["model"] >= 0.9
    assert not any("lora" in name for name in weights)
    assert reply_scores(scorer)[0] > reply_scores(scorer)[1]


@pytest.mark.parametrize("base", [ENCODER, DECODER])
def test_pooled_mean_matches_the_mean_of_token_outputs(base: str, chain: Chain) -> None:
    """Padding is ignored; with one block of a decoder, the head reads the output of the final norm."""
    import torch

    model: Any = head_models.new_scorer(chain.path(base), NUMERICS, 2, layers=1, token_level=True).eval()
    tokenizer, rows = chain.tokenizer(), [[1, 5, 6, 9, 12], [1, 7]]
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        outputs = head_models.head_outputs(model, tokenizer, rows, NUMERICS, 2)
        for row, pooled in zip(rows, outputs, strict=True):
            numbers = model(input_ids=torch.tensor([row])).logits[0]  # (T, 2)
            torch.testing.assert_close(pooled, numbers.sum(0) / len(row), atol=1e-5, rtol=0)
        if base == DECODER:
            whole = models.load_decoder(chain.path(base), NUMERICS).eval()
            states = whole(input_ids=torch.tensor([rows[0]]), output_hidden_states=True).hidden_states[1]
            wanted = model.score(whole.model.norm(states)).mean(1)[0]
            torch.testing.assert_close(outputs[0], wanted, atol=1e-5, rtol=0)


def test_more_blocks_than_the_model_has_are_reported(chain: Chain) -> None:
    """The number of blocks is in the model's config, not in the settings."""
    with pytest.raises(StageError, match="layers is 3, but the model has 2 blocks"):
        head_models.new_scorer(chain.path(DECODER), NUMERICS, 1, layers=3)


def test_word_dropout_with_cached_states_is_rejected() -> None:
    with pytest.raises(ValidationError, match=r"head reads each response once, and word_dropout \(0\.1\) would mask"):
        config("reward", method=HEAD["method"], word_dropout=0.1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"reward": {**HEAD}, "numerics": {"parallel": {"processes": 2, "engine": "fsdp"}}},
            "reward.train.method.name: found 'head', which needs numerics.parallel.engine to be data (it is fsdp)",
        ),
        (
            {"reward": {**HEAD, "method": {**HEAD["method"], "layers": 5}}},
            "reward.train.method.layers: found 5, but it should be at most pretrain.masked.model.layers, which is 3",
        ),
        (
            {"reward": {"method": {"name": "top_layers", "layers": 4}}},
            "reward.train.method.layers: found 4, but it should be at most pretrain.masked.model.layers, which is 3",
        ),
        (
            {"reward": {"method": {**LORA, "rank": 193}, "model": DECODER}},
            "reward.train.method.rank: found 193, but it should be at most pretrain.causal.model.hidden, which is 192",
        ),
        (
            {"reward": {"model": "data/ingest/checkpoint"}},
            "reward.train.model: found 'data/ingest/checkpoint', but ingest.checkpoint is null: set it to a model",
        ),
        ({"reward": {"method": {"name": "adapter"}}}, "should be one of full, top_layers, lora, head"),
    ],
    ids=["head", "blocks", "top", "lora", "checkpoint", "adapter"],
)
def test_untrainable_model_is_rejected_before_loading(changes: dict[str, dict[str, Any]], sentence: str) -> None:
    """The message has the value found and the value expected."""
    params = read_settings(ROOT / "profiles/default.yaml")
    for section, settings in changes.items():
        (params["reward"]["train"] if section == "reward" else params[section]).update(settings)
    with pytest.raises(SettingsError) as failure:
        check(params)
    assert sentence in str(failure.value)
    assert "has 1 problem;" in str(failure.value)
