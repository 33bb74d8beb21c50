"""Pruning: the right neurons are removed, the rest computes the same, and recovery reduces the divergence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tasks import prune
from tasks.common.modelling import models
from tasks.common.text import chat
from tests.training_fixtures import NUMERICS, SHAPE, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

NEURONS = SHAPE["feed_forward"]


@pytest.fixture
def model(chain: Chain) -> Any:
    """A fresh copy of the original model."""
    return models.load_decoder(chain.path("data/align/policy/model"), NUMERICS).eval()


@pytest.fixture(scope="module")
def batch(chain: Chain) -> Any:
    """Ids and mask of three conversations, padded."""
    import torch

    tokenizer = chain.tokenizer()
    texts = ["The capital of Italy is Rome.", "Tokyo, obviously.", "Åland"]
    rows = [chat.encode_text(tokenizer, text) for text in texts]
    mask = chat.pad([[1] * len(row) for row in rows], 0)
    return torch.tensor(chat.pad(rows, tokenizer.pad_token_id)), torch.tensor(mask)


def logits(model: Any, batch: Any) -> Any:
    """Return a model's logits on a batch."""
    import torch

    with torch.no_grad():
        return model(input_ids=batch[0], attention_mask=batch[1]).logits


def random_scores(seed: int = 0) -> list[Any]:
    """Return random importances for both layers."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(NEURONS, generator=generator) for _ in range(SHAPE["layers"])]


# Removing neurons


def test_pruning_without_removal_keeps_the_model(model: Any, batch: Any) -> None:
    """The logits are bitwise the same."""
    import torch

    before = logits(model, batch)
    assert torch.equal(
        logits(prune.remove_neurons(model, prune.select_neurons(random_scores(), NEURONS)), batch), before
    )


def test_removing_neurons_equals_zeroing_them(model: Any, batch: Any, chain: Chain) -> None:
    """The smaller model's logits are those of the original with these neurons' outputs at 0."""
    import torch

    scores, keep = random_scores(), 40
    zeroed = models.load_decoder(chain.path("data/align/policy/model"), NUMERICS).eval()
    with torch.no_grad():
        for layer, score in zip(zeroed.model.layers, scores, strict=True):
            layer.mlp.down_proj.weight[:, score.argsort()[: NEURONS - keep]] = 0
    expected, whole = logits(zeroed, batch), logits(model, batch)
    removed_logits = logits(prune.remove_neurons(model, prune.select_neurons(scores, keep)), batch)
    torch.testing.assert_close(removed_logits, expected, atol=1e-4, rtol=0)  # float32 sums of 96 and of 40 products
    assert (removed_logits - whole).abs().max() > 1.0


def test_pruned_model_has_fewer_weights(model: Any, tmp_path: Path, chain: Chain, batch: Any) -> None:
    """Parameters, config and file shrink, and the reloaded model computes the same."""
    import torch

    before = models.parameter_count(model)
    small = prune.remove_neurons(model, prune.select_neurons(random_scores(), 40))
    removed = SHAPE["layers"] * 3 * SHAPE["hidden"] * (NEURONS - 40)
    assert models.parameter_count(small) == before - removed
    models.save(small, chain.tokenizer(), tmp_path / "model")
    loaded = models.load_decoder(tmp_path / "model", NUMERICS).eval()
    assert loaded.config.intermediate_size == 40
    assert models.parameter_count(loaded) == before - removed
    assert torch.equal(logits(loaded, batch), logits(small, batch))


def test_the_most_important_neurons_stay_in_their_order(model: Any) -> None:
    """The rows of a pruned matrix keep their order and are not sorted by score."""
    import torch

    score = torch.zeros(NEURONS)
    score[[70, 3, 41]] = torch.tensor([1.0, 2.0, 3.0])
    before = [model.model.layers[0].mlp.up_proj.weight[place].clone() for place in (3, 41, 70)]
    prune.remove_neurons(model, prune.select_neurons([score, score], 3))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, torch.stack(before))


# Importance


def test_taylor_importance_is_the_squared_effect_on_the_loss(model: Any, batch: Any) -> None:
    """Against finite differences of the loss in a neuron's output, squared and summed over batches."""
    import torch

    model = model.double()
    batches = [batch, (batch[0][:1, :5], batch[1][:1, :5])]
    importance = prune.importance(model, "taylor", batches)

    def loss(part: Any, layer: int, neuron: int, factor: float) -> float:
        ids, mask = part
        weight = model.model.layers[layer].mlp.down_proj.weight
        with torch.no_grad():
            original = weight[:, neuron].clone()
            weight[:, neuron] *= factor
            logp = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits, -1)
            weight[:, neuron] = original
        places = [(row, t) for row in range(len(ids)) for t in range(1, ids.shape[1]) if mask[row, t]]
        return -sum(logp[row, t - 1, ids[row, t]].item() for row, t in places) / len(places)

    for layer, neuron in ((0, 0), (0, 50), (1, 7), (1, NEURONS - 1)):
        slopes = [(loss(b, layer, neuron, 1.01) - loss(b, layer, neuron, 0.99)) / 0.02 for b in batches]
        naive = sum(slope**2 for slope in slopes)
        assert importance[layer][neuron].item() == pytest.approx(naive, rel=0.01)  # Llama's norms are float32


def test_importance_does_not_change_the_model(model: Any, batch: Any) -> None:
    """Its logits and gradients are unchanged."""
    import torch

    before = logits(model, batch)
    prune.importance(model, "taylor", [batch])
    assert torch.equal(logits(model, batch), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_magnitude_is_the_product_of_a_neurons_norms(model: Any) -> None:
    """The norms of its gate, up and down weights, by plain sums."""
    importance = prune.importance(model, "magnitude", [])
    for layer, neuron in ((0, 0), (1, 95)):
        mlp = model.model.layers[layer].mlp
        inward = (mlp.gate_proj.weight[neuron].tolist(), mlp.up_proj.weight[neuron].tolist())
        outward = mlp.down_proj.weight[:, neuron].tolist()
        norms = [sum(value**2 for value in values) ** 0.5 for values in (*inward, outward)]
        assert importance[layer][neuron].item() == pytest.approx(float(np.prod(norms)), rel=1e-5)


def test_an_unknown_importance_error_lists_the_choices() -> None:
    """Validation rejects it."""
    with pytest.raises(ValidationError, match="'taylor' or 'magnitude'"):
        config("prune@pruned", importance="random")


# Recovery


def test_the_divergence_is_a_plain_sum(model: Any, batch: Any, chain: Chain, tmp_path: Path) -> None:
    """KL of the pruned model from the teacher, token by token over the vocabulary; 0 between a model and itself.

    The split into micro-batches makes no difference.
    """
    import torch

    policy = models.load_decoder(chain.path("data/align/policy/model"), NUMERICS).eval()
    job = chain.job("prune@pruned", config("prune@pruned"), tmp_path)
    assert prune.divergence(policy, policy, [batch], job).item() == pytest.approx(0, abs=1e-6)
    pruned = prune.remove_neurons(model, prune.select_neurons(random_scores(), 40))
    ours, theirs = (torch.softmax(logits(part, batch).double(), -1) for part in (pruned, policy))
    ids, mask = batch
    naive = [
        float((theirs[row, t] * (theirs[row, t].log() - ours[row, t].log())).sum())
        for row in range(len(ids))
        for t in range(ids.shape[1] - 1)
        if mask[row, t + 1]
    ]
    assert prune.divergence(pruned, policy, [batch], job).item() == pytest.approx(sum(naive), rel=1e-4)
    parts = [(ids[:1], mask[:1]), (ids[1:], mask[1:])]
    assert prune.divergence(pruned, policy, parts, job).item() == pytest.approx(sum(naive), rel=1e-4)


def test_batches_are_replies_and_pretraining_text(chain: Chain, model: Any, tmp_path: Path) -> None:
    """A batch is a function of the step: replies to training questions, then windows, each with its mask."""
    settings = config("prune@pruned")
    job, tokenizer = chain.job("prune@pruned", settings, tmp_path), chain.tokenizer()
    first, second = (prune.RecoveryBatches(settings, job, model, tokenizer) for _ in range(2))
    prompts = set()
    for step in range(6):
        *replies, windows = first.at(step)
        again = second.at(step)
        assert all(
            (ids == ids_again).all() for (ids, _), (ids_again, _) in zip([*replies, windows], again, strict=True)
        )
        assert sum(len(ids) for ids, _ in replies) == settings.batch
        assert windows[1].sum(1).tolist() == [settings.window] * settings.windows
        assert all(((ids == tokenizer.pad_token_id) == (mask == 0)).all() for ids, mask in replies)
        for row in (row for ids, _ in replies for row in ids.tolist()):
            text = tokenizer.decode(row)
            assert text.startswith("<|bos|><|user|>")
            assert "<|assistant|>" in text
            prompts.add(text.split("<|end|>")[0])
    assert len(prompts) > 6
    assert not any("Kenya" in text or "Peru" in text for text in prompts)


def test_recovery_reduces_the_divergence(chain: Chain, tmp_path: Path) -> None:
    """With three quarters of the neurons removed, a few steps restore most of the teacher's distribution."""
    policy = models.load_decoder(chain.path("data/align/policy/model"), NUMERICS).eval()
    divergences = {}
    for steps in (0, 40):
        settings = config("prune@pruned", keep=0.25, steps=steps)
        job = chain.job("prune@pruned", settings, tmp_path / str(steps))
        batch = prune.RecoveryBatches(settings, job, policy, chain.tokenizer()).at(10_000)
        metrics = chain.run(job, settings)
        pruned = models.load_decoder(job.outputs["model"], NUMERICS).eval()
        divergences[steps] = prune.divergence(pruned, policy, batch, job).item()
        assert metrics["feed_forward"] == NEURONS / 4
        assert metrics["parameters"] == models.parameter_count(pruned)
        assert metrics["removed"] == round(1 - models.parameter_count(pruned) / models.parameter_count(policy), 4)
    assert divergences[40] < divergences[0] / 3


def test_the_right_neurons_are_cut(chain: Chain, batch: Any, tmp_path: Path) -> None:
    """Before recovery, removing the least important neurons hurts less than removing the most important ones."""
    settings = config("prune@pruned")
    policy = models.load_decoder(chain.path("data/align/policy/model"), NUMERICS).eval()
    job = chain.job("prune@pruned", settings, tmp_path)
    batches = prune.RecoveryBatches(settings, job, policy, chain.tokenizer())
    calibration = [part for step in range(settings.calibration) for part in batches.at(step)]
    scores = prune.importance(policy, settings.importance, calibration)
    divergences = []
    for sign in (1, -1):
        cut = prune.remove_neurons(
            models.load_decoder(chain.path("data/align/policy/model"), NUMERICS),
            prune.select_neurons([sign * score for score in scores], 60),
        )
        divergences.append(prune.divergence(cut.eval(), policy, [batch], job).item())
    assert divergences[0] < divergences[1] / 2


# Reconstruction


def test_a_duplicate_neuron_takes_over_exactly(model: Any, batch: Any) -> None:
    """If every removed neuron has a kept duplicate, the output is unchanged."""
    import torch

    half = NEURONS // 2
    outputs = torch.randn(2000, half, generator=torch.Generator().manual_seed(0)).double()
    twins = torch.cat([outputs, outputs], 1)  # neuron i + half duplicates neuron i
    before = [layer.mlp.down_proj.weight.clone() for layer in model.model.layers]
    stay = torch.arange(half)
    prune.reconstruct(model, [stay, stay], [twins.T @ twins] * 2)
    for layer, old in zip(model.model.layers, before, strict=True):
        now = layer.mlp.down_proj.weight
        torch.testing.assert_close(now[:, :half], old[:, :half] + old[:, half:], atol=1e-2, rtol=1e-2)
        assert torch.equal(now[:, half:], old[:, half:])


def test_second_moments_are_sums_over_tokens(model: Any, batch: Any) -> None:
    """Of products of two neurons' outputs, without padding, against plain arithmetic."""
    ids, mask = batch
    moments = prune.second_moments(model, [(ids[:2], mask[:2]), (ids[2:], mask[2:])])
    seen: list[Any] = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, batch)
    hook.remove()
    rows = seen[0].double()
    for i, j in ((0, 0), (3, 77), (95, 2)):
        naive = sum((rows[row, t, i] * rows[row, t, j]).item() for row, t in mask.nonzero().tolist())
        assert moments[0][i, j].item() == pytest.approx(naive, rel=1e-3, abs=1e-5)


def test_reconstruction_reduces_the_divergence(chain: Chain, tmp_path: Path) -> None:
    """Before recovery, on text that the least squares were not fitted to."""
    settings = config("prune@pruned")
    policy = models.load_decoder(chain.path("data/align/policy/model"), NUMERICS).eval()
    job = chain.job("prune@pruned", settings, tmp_path)
    batches = prune.RecoveryBatches(settings, job, policy, chain.tokenizer())
    calibration = [part for step in range(settings.calibration) for part in batches.at(step)]
    neurons = prune.select_neurons(prune.importance(policy, "taylor", calibration), NEURONS // 2)
    divergences = []
    for handed in (False, True):
        pruned = models.load_decoder(chain.path("data/align/policy/model"), NUMERICS).eval()
        if handed:
            prune.reconstruct(pruned, neurons, prune.second_moments(policy, calibration))
        divergences.append(
            prune.divergence(prune.remove_neurons(pruned, neurons), policy, batches.at(10_000), job).item()
        )
    assert divergences[1] < divergences[0] / 1.5
