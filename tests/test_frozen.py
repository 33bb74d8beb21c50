"""Reward models by method: the head alone on remembered states is the head on the model, and the model stays itself."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks import reward
from tasks.common import tables
from tasks.common.evaluation.scoring import Scorer
from tasks.common.modelling import models
from tasks.common.modelling.frozen import Frozen
from tasks.common.settings import SettingsError, check, read_params
from tasks.common.stage import StageError
from tests.conftest import ROOT
from tests.training_fixtures import LORA, NUMERICS, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

ENCODER, DECODER = "data/pretrain/mlm/model", "data/finetune/model"
HEAD: dict[str, Any] = {"method": {"name": "head", "layers": 2, "pooling": "model"}, "word_dropout": 0.0}
REPLIES = ["The soup was wonderful.", "The garden was poor, and the song was terrible.", "Peru."]


def trained(settings: Any, chain: Chain, folder: Path) -> tuple[dict[str, Any], Scorer, dict[str, Any]]:
    """Return the metrics, the scorer and the weights of a reward model, and those that it began from."""
    from safetensors.torch import load_file

    job = chain.job("reward@policy", settings, folder)
    metrics = chain.run(job, settings)
    return metrics, Scorer.load(job.outputs["model"], NUMERICS), load_file(job.outputs["model"] / "model.safetensors")


def scores(scorer: Scorer) -> list[float]:
    """Return what is said of some replies."""
    return scorer.score([([], reply) for reply in REPLIES])


def began(base: str, chain: Chain) -> dict[str, Any]:
    """Return the weights of the model that a head is put on."""
    from safetensors.torch import load_file

    return dict(load_file(chain.path(base) / "model.safetensors"))


@pytest.mark.parametrize(
    ("base", "layers", "pooling"),
    [(ENCODER, 2, "model"), (ENCODER, 1, "mean"), (DECODER, 2, "model"), (DECODER, 1, "mean")],
)
def test_a_head_on_remembered_states_is_one_on_the_model(
    base: str, layers: int, pooling: str, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same training with the model worked out in every step gives the same scores; the model's bytes stay."""
    method = {"name": "head", "layers": layers, "pooling": pooling}
    settings = config("reward", model=base, heads=2, steps=40, method=method, word_dropout=0.0)
    metrics, scorer, weights = trained(settings, chain, tmp_path / "remembered")
    before = began(base, chain)
    kept = [name for name in weights if name in before]
    assert all(weights[name].equal(before[name]) for name in kept)
    assert {name.partition(".")[0] for name in weights if name not in before} <= {"score", "classifier"}
    assert len({name.split(".")[2] for name in weights if name.startswith("model.layers.")}) == layers
    monkeypatch.setattr(reward, "Frozen", lambda *_: None)
    other, plain, others = trained(settings, chain, tmp_path / "worked-out")
    assert all(others[name].equal(before[name]) for name in kept)
    assert scores(scorer) == pytest.approx(scores(plain), abs=1e-4)  # float32, sums in another order, over 40 steps
    assert metrics["rating_loss"] == pytest.approx(other["rating_loss"], abs=1e-4)
    assert metrics["gap_at_least_1"] == other["gap_at_least_1"]


def test_a_text_is_worked_out_once(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rankings it is in, and however often it is asked for, in training and in judging."""
    settings, worked_out = config("reward", steps=5, **HEAD), list[tuple[int, ...]]()
    outputs = models.head_outputs

    def watched(model: Any, tokenizer: Any, rows: Any, *others: Any) -> Any:
        worked_out.extend(map(tuple, rows))
        return outputs(model, tokenizer, rows, *others)

    monkeypatch.setattr(models, "head_outputs", watched)
    job = chain.job("reward@policy", settings, tmp_path)
    rows = tables.read(job.inputs["rankings"]).to_pylist()
    again = [{**row, "id": f"{row['id']}-again"} for row in rows]
    job.inputs["rankings"] = tmp_path / "table"
    tables.write([*rows, *again], job.inputs["rankings"], tables.schema("rankings"))
    chain.run(job, settings)
    assert len(worked_out) == len(set(worked_out)) > 10


def test_remembered_outputs_are_those_of_the_head(chain: Chain) -> None:
    """For rows known and new, alone and together, and after the head has changed."""
    import torch

    model: Any = models.new_scorer(chain.path(ENCODER), NUMERICS, 3).eval()
    tokenizer = chain.tokenizer()
    frozen, rows = Frozen(model, tokenizer, NUMERICS), [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11]]
    frozen.read(rows[:1], 2)
    with torch.no_grad():
        for _ in range(2):
            wanted = models.head_outputs(model, tokenizer, [*rows, rows[0]], NUMERICS, 2)
            torch.testing.assert_close(frozen.outputs([*rows, rows[0]], 2), wanted, atol=1e-5, rtol=0)
            model.classifier.weight.mul_(-2.0)
    assert len(frozen.states) == 3


@pytest.mark.parametrize(
    ("base", "method", "moved"),
    [
        (ENCODER, {"name": "top", "layers": 1}, ("model.layers.1.", "model.final_norm.", "head.")),
        (DECODER, LORA, ("model.layers.0.", "model.layers.1.")),
    ],
    ids=["top", "lora"],
)
def test_a_method_trains_what_it_says(
    base: str, method: dict[str, Any], moved: tuple[str, ...], chain: Chain, tmp_path: Path
) -> None:
    """Beside the head, which is fresh; what is left is a plain model that orders held-out sentences as people did."""
    settings = config("reward", model=base, method=method)
    metrics, scorer, weights = trained(settings, chain, tmp_path)
    before = began(base, chain)
    changed = [name for name in weights if name in before and not weights[name].equal(before[name])]
    assert changed
    assert all(name.startswith(moved) for name in changed)
    assert metrics["gap_at_least_1"]["model"] >= 0.9
    assert not any("lora" in name for name in weights)
    assert scores(scorer)[0] > scores(scorer)[1]


@pytest.mark.parametrize("base", [ENCODER, DECODER])
def test_a_mean_over_tokens_is_that_of_the_heads_numbers(base: str, chain: Chain) -> None:
    """Padding counts for nothing; the head of a decoder's one kept block reads what its final norm makes of it."""
    import torch

    model: Any = models.new_scorer(chain.path(base), NUMERICS, 2, layers=1, of_tokens=True).eval()
    tokenizer, rows = chain.tokenizer(), [[1, 5, 6, 9, 12], [1, 7]]
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        found = models.head_outputs(model, tokenizer, rows, NUMERICS, 2)
        for row, outputs in zip(rows, found, strict=True):
            numbers = model(input_ids=torch.tensor([row])).logits[0]  # (T, 2)
            torch.testing.assert_close(outputs, numbers.sum(0) / len(row), atol=1e-5, rtol=0)
        if base == DECODER:
            whole = models.load_decoder(chain.path(base), NUMERICS).eval()
            states = whole(input_ids=torch.tensor([rows[0]]), output_hidden_states=True).hidden_states[1]
            wanted = model.score(whole.model.norm(states)).mean(1)[0]
            torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=0)


def test_more_blocks_than_a_given_model_has_are_told(chain: Chain) -> None:
    """Whose config no setting tells."""
    with pytest.raises(StageError, match="layers is 3, but the model has 2 blocks"):
        models.new_scorer(chain.path(DECODER), NUMERICS, 1, layers=3)


def test_hidden_words_and_remembered_states_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match=r"head reads each response once, and word_dropout \(0\.1\) would hide"):
        config("reward", method=HEAD["method"], word_dropout=0.1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"reward": {**HEAD}, "numerics": {"parallel": {"processes": 2, "engine": "fsdp"}}},
            "reward.method.name: found 'head', which needs numerics.parallel.engine to be data (it is fsdp)",
        ),
        (
            {"reward": {**HEAD, "method": {**HEAD["method"], "layers": 5}}},
            "reward.method.layers: found 5, but it should be at most pretrain.mlm.model.layers, which is 3",
        ),
        (
            {"reward": {"method": {"name": "top", "layers": 4}}},
            "reward.method.layers: found 4, but it should be at most pretrain.mlm.model.layers, which is 3",
        ),
        (
            {"reward": {"method": {**LORA, "rank": 193}, "model": DECODER}},
            "reward.method.rank: found 193, but it should be at most pretrain.clm.model.hidden, which is 192",
        ),
        (
            {"reward": {"model": "data/ingest/checkpoint"}},
            "reward.model: found 'data/ingest/checkpoint', but ingest.checkpoint is null: name a model there",
        ),
        ({"reward": {"method": {"name": "adapter"}}}, "should be one of full, top, lora, head"),
    ],
    ids=["head", "blocks", "top", "lora", "checkpoint", "adapter"],
)
def test_what_cannot_be_trained_is_refused_before_anything_loads(
    changes: dict[str, dict[str, Any]], sentence: str
) -> None:
    """One sentence with what was found and what it should be."""
    params = read_params(ROOT / "profiles/default.yaml")
    for section, settings in changes.items():
        params[section] |= settings
    with pytest.raises(SettingsError) as failure:
        check(params)
    assert sentence in str(failure.value)
    assert "has 1 problem;" in str(failure.value)
