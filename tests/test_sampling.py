"""Replies equal those of a plain loop without batches, padding or cache, and are reproducible for a seed."""

from typing import TYPE_CHECKING, Any

import pytest

from tasks.common.generation import sampling
from tasks.common.modelling import models
from tasks.common.text import chat
from tests.training_fixtures import CAPITALS, NUMERICS, QUESTIONS, Chain, chain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

MOST = 24


@pytest.fixture(scope="module")
def model(chain: Chain) -> "PreTrainedModel":
    """The tuned model."""
    return models.load_decoder(chain.path("data/finetune/chat/model"), NUMERICS)


@pytest.fixture(scope="module")
def tokenizer(chain: Chain) -> "PreTrainedTokenizerFast":
    """Its tokenizer."""
    return chain.tokenizer()


@pytest.fixture(scope="module")
def prompts(tokenizer: "PreTrainedTokenizerFast") -> list[list[int]]:
    """Questions of different lengths."""
    texts = [form.format(country=country) for country in CAPITALS for form in QUESTIONS]
    return [chat.encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def say(model: Any, tokenizer: Any, prompts: list[list[int]], **changes: Any) -> list[list[int]]:
    """Return replies at temperature 1, with changed options."""
    options = {"max_new_tokens": MOST, "temperature": 1.0, "seed": 5, "numerics": NUMERICS}
    return sampling.generate_replies(model, tokenizer, prompts, **{**options, **changes})


def naive(model: Any, prompt: list[int], end: int) -> list[int]:
    """Return the greedy reply, recomputing the whole sequence for every token."""
    import torch

    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + MOST and (len(ids) == len(prompt) or ids[-1] != end):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_replies_match_a_plain_loop(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """Padding, batching and the cache change no token, and replies are in the order of their prompts."""
    expected = [naive(model, prompt, tokenizer.eos_token_id) for prompt in prompts]
    assert say(model, tokenizer, prompts, temperature=0.0) == expected
    assert say(model, tokenizer, prompts[::-1], temperature=0.0, batch=3) == expected[::-1]
    assert len(set(map(len, prompts))) > 3
    assert len(set(map(tuple, expected))) > 5


def test_replies_end_at_the_end_token_or_at_their_limit(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """EOS comes last and only once; a reply without EOS has `max_new_tokens` tokens."""
    for limit in (3, MOST):
        for reply in say(model, tokenizer, prompts, max_new_tokens=limit):
            assert reply.count(tokenizer.eos_token_id) == (reply[-1] == tokenizer.eos_token_id)
            assert len(reply) <= limit
            assert len(reply) == limit or reply[-1] == tokenizer.eos_token_id
            assert tokenizer.pad_token_id not in reply


def test_a_seed_gives_the_same_replies(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """Replies depend only on the seed, and torch's global generator is restored."""
    import torch

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = say(model, tokenizer, prompts)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert say(model, tokenizer, prompts) == first
    assert say(model, tokenizer, prompts, seed=6) != first


def test_batches_of_one_seed_do_not_repeat_each_other(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """The same question in several batches gets independent replies."""
    same = [prompts[0]] * 12
    replies = say(model, tokenizer, same, batch=1, temperature=3.0)
    assert len(set(map(tuple, replies))) > 6


def test_temperature_flattens(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """A temperature near 0 is greedy; a high one gives more distinct replies than a low one."""
    same = [prompts[0]] * 40
    greedy = say(model, tokenizer, same, temperature=0.0)
    # Two logits 1e-4 apart, which a toy may have between two tones, are still e^100 apart in odds at this temperature.
    assert say(model, tokenizer, same, temperature=1e-6) == greedy
    kinds = [len(set(map(tuple, say(model, tokenizer, same, temperature=t)))) for t in (0.3, 3.0)]
    assert kinds[0] < kinds[1]


def test_sample_tokens_frequencies_match_the_distribution() -> None:
    """20,000 samples, each share within four standard deviations; tokens of probability 0 are never sampled."""
    import torch

    torch.manual_seed(1)
    shares = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.199, 0.001, 0.0])
    tokens = sampling.sample_tokens(shares.log().expand(20_000, -1))
    frequencies = torch.bincount(tokens[:, 0], minlength=7) / 20_000
    assert tokens.shape == (20_000, 1)
    assert ((frequencies - shares).abs() <= 4 * (shares * (1 - shares) / 20_000).sqrt()).all()


@pytest.mark.parametrize("training", [False, True])
def test_generate_replies_restores_the_model(
    training: bool, model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    """Sampling during training restores the model's training mode."""
    model.train(training)
    say(model, tokenizer, prompts[:2])
    assert model.training is training


def test_progress_bar_is_shown_only_with_desc(
    model: Any, tokenizer: Any, prompts: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """PPO has its own progress bar and passes no `desc`."""
    say(model, tokenizer, prompts[:4], batch=2)
    assert capsys.readouterr().err == ""
    say(model, tokenizer, prompts[:4], batch=2, desc="prune replies")
    assert "prune replies: 100%|" in capsys.readouterr().err


def test_a_reply_is_text_without_special_tokens(tokenizer: Any) -> None:
    """Decoded replies contain no padding and no special tokens."""
    ids = [*tokenizer.encode(" Paris, obviously.", add_special_tokens=False), tokenizer.eos_token_id]
    assert sampling.decode_reply(tokenizer, ids) == "Paris, obviously."
