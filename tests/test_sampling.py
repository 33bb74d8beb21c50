"""Replies: what a plain loop without batches, padding or cache would have said, and the same for the same seed."""

from typing import TYPE_CHECKING, Any

import pytest

from tasks.common.evaluation import sampling
from tasks.common.modelling import models
from tasks.common.text import chat
from tests.training_fixtures import CAPITALS, NUMERICS, QUESTIONS, Chain, chain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

MOST = 24


@pytest.fixture(scope="module")
def model(chain: Chain) -> "PreTrainedModel":
    """The tuned model."""
    return models.load_decoder(chain.path("data/finetune/model"), NUMERICS)


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
    """Return replies at temperature 1, some of the options changed."""
    options = {"max_new_tokens": MOST, "temperature": 1.0, "seed": 5, "numerics": NUMERICS}
    return sampling.replies(model, tokenizer, prompts, **{**options, **changes})


def naive(model: Any, prompt: list[int], end: int) -> list[int]:
    """Return the greedy reply, read from the start for every token."""
    import torch

    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + MOST and (len(ids) == len(prompt) or ids[-1] != end):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_replies_are_a_plain_loops(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """Padding, batching and the cache change no token, and replies come back in the order of their prompts."""
    expected = [naive(model, prompt, tokenizer.eos_token_id) for prompt in prompts]
    assert say(model, tokenizer, prompts, temperature=0.0) == expected
    assert say(model, tokenizer, prompts[::-1], temperature=0.0, batch=3) == expected[::-1]
    assert len(set(map(len, prompts))) > 3
    assert len(set(map(tuple, expected))) > 5


def test_replies_end_at_the_end_token_or_at_their_limit(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """The end token, where there is one, comes last and only once; without it a reply is as long as it may be."""
    for limit in (3, MOST):
        for reply in say(model, tokenizer, prompts, max_new_tokens=limit):
            assert reply.count(tokenizer.eos_token_id) == (reply[-1] == tokenizer.eos_token_id)
            assert len(reply) <= limit
            assert len(reply) == limit or reply[-1] == tokenizer.eos_token_id
            assert tokenizer.pad_token_id not in reply


def test_a_seed_gives_the_same_replies(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """Whatever the process drew before; another seed gives others; and the process's own generator is left alone."""
    import torch

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = say(model, tokenizer, prompts)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert say(model, tokenizer, prompts) == first
    assert say(model, tokenizer, prompts, seed=6) != first


def test_batches_of_one_seed_do_not_repeat_each_other(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """The same question in several batches gets replies drawn independently."""
    same = [prompts[0]] * 12
    replies = say(model, tokenizer, same, batch=1, temperature=3.0)
    assert len(set(map(tuple, replies))) > 6


def test_temperature_flattens(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    """Nearly 0 is greedy; a high one gives more different replies than a low one."""
    same = [prompts[0]] * 40
    greedy = say(model, tokenizer, same, temperature=0.0)
    assert say(model, tokenizer, same, temperature=1e-4) == greedy
    kinds = [len(set(map(tuple, say(model, tokenizer, same, temperature=t)))) for t in (0.3, 3.0)]
    assert kinds[0] < kinds[1]


def test_tokens_are_drawn_as_often_as_the_distribution_says() -> None:
    """20,000 draws, each share within four standard deviations; what has no probability is never drawn."""
    import torch

    torch.manual_seed(1)
    shares = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.199, 0.001, 0.0])
    drawn = sampling.drawn(shares.log().expand(20_000, -1))
    found = torch.bincount(drawn[:, 0], minlength=7) / 20_000
    assert drawn.shape == (20_000, 1)
    assert ((found - shares).abs() <= 4 * (shares * (1 - shares) / 20_000).sqrt()).all()


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_given_back_as_it_was(
    training: bool, model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    """Sampling in the midst of training does not switch training off."""
    model.train(training)
    say(model, tokenizer, prompts[:2])
    assert model.training is training


def test_a_bar_is_shown_only_where_it_is_named(
    model: Any, tokenizer: Any, prompts: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """PPO samples within a bar of its own."""
    say(model, tokenizer, prompts[:4], batch=2)
    assert capsys.readouterr().err == ""
    say(model, tokenizer, prompts[:4], batch=2, desc="prune replies")
    assert "prune replies: 100%|" in capsys.readouterr().err


def test_a_reply_is_text_without_special_tokens(tokenizer: Any) -> None:
    """What is scored and shown is neither padded nor marked."""
    ids = [*tokenizer.encode(" Paris, obviously.", add_special_tokens=False), tokenizer.eos_token_id]
    assert sampling.decode(tokenizer, ids) == "Paris, obviously."
