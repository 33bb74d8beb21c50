"""Worked examples through the real code: names, words, loss, optimizer, reward, INT8 and API."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.names import Candidates, log_scores, make_codec, single_slot, top_names
from tasks import package
from tasks.common import tables
from tasks.common.generation import sampling
from tasks.common.harness.job import Job
from tasks.common.modelling import models
from tasks.common.reward.scoring import Scorer
from tasks.common.settings import Checkpoints
from tasks.common.text import chat
from tasks.common.training import losses, optimizers
from tasks.common.training.optimizers import Sgd
from tasks.evaluate.encoders_under_test import TorchEncoder
from tasks.finetune.objectives.chat import answers_nll
from tasks.finetune.packing import padded_rows
from tests.training_fixtures import BASE_OPTIMIZER, CAPITALS, NUMERICS, Chain, chain, config, links, rankings

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain


def test_masked_capital_has_its_probabilities(chain: Chain) -> None:
    """ "The capital of [MASK] is Paris." gives France, among all names of any number of tokens."""
    encoder = TorchEncoder.load(chain.path("data/pretrain/masked/model"), NUMERICS)
    codec = make_codec(encoder.tokenizer, encoder.special_ids)
    candidates = Candidates([name for pair in CAPITALS.items() for name in pair], codec)
    assert len(candidates.groups[True]) > 2  # names of one, of two and of more tokens compete
    for country in ("France", "Italy", "Japan", "Egypt", "New Zealand", "Antigua and Barbuda"):
        place = single_slot(f"The capital of [MASK] is {CAPITALS[country]}.", codec)
        (ranked,) = top_names(log_scores(encoder.logits, codec, candidates, [place]), candidates, 3)
        assert ranked[0].name == country
        assert ranked[0].score > ranked[1].score > 0


def test_next_words_complete_the_sentence(chain: Chain) -> None:
    """A decoder that has memorized its text completes a sentence word by word."""
    model = models.load_decoder(chain.path("data/pretrain/causal/model"), NUMERICS)
    tokenizer = chain.tokenizer()
    for country in ("France", "Mexico", "Antigua and Barbuda"):
        beginning, rest = f"The capital of {country} is", f"{CAPITALS[country]}."
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(beginning, add_special_tokens=False)]
        (reply,) = sampling.generate_replies(
            model, tokenizer, [prompt], max_new_tokens=12, temperature=0.0, seed=1, numerics=NUMERICS
        )
        assert sampling.decode_reply(tokenizer, reply) == rest
        assert reply[-1] == tokenizer.eos_token_id


class FixedProbability:
    """A model that gives the next token a fixed probability and the other tokens equal shares of the rest."""

    def __init__(self, token: int, probability: float, vocabulary: int) -> None:
        import torch

        rest = math.log((1 - probability) / (vocabulary - 1))
        self.logits = torch.full((vocabulary,), rest)
        self.logits[token] = math.log(probability)
        self.config = SimpleNamespace(model_type="llama")

    def parameters(self) -> Iterator[Any]:
        """Yield the one tensor."""
        yield self.logits

    def __call__(self, input_ids: Any, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_loss_of_a_word_with_probability_85_percent(chain: Chain) -> None:
    """-ln 0.85 = 0.1625, by the loss that fine-tuning computes."""
    tokenizer = chain.tokenizer()
    right = tokenizer.encode(" Paris", add_special_tokens=False)[0]
    model = FixedProbability(right, 0.85, len(tokenizer))
    batch: Any = [([tokenizer.bos_token_id, right], [False, True])]
    loss = answers_nll(model, padded_rows(batch, tokenizer.pad_token_id), NUMERICS)
    assert loss.item() == pytest.approx(-math.log(0.85), rel=1e-6)
    assert f"{loss.item():.4f}" == "0.1625"


def test_one_step_of_gradient_descent() -> None:
    """w - learning rate x gradient: 0.5 - 0.1 x 0.2 = 0.48, by the optimizer that the stages build."""
    import torch

    weight = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(weight.weight, 0.5)
    changed = {"learning_rate": 0.1, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    (optimizer,) = optimizers.build(Sgd.model_validate({"name": "sgd", **BASE_OPTIMIZER, **changed}), weight)
    loss = 0.2 * weight.weight.sum()  # whose gradient is 0.2 whatever the weight
    loss.backward()
    optimizer.step()
    assert weight.weight.item() == pytest.approx(0.48)


BAD_JOKE = "Why did the chicken cross the road? To get to the other side."
GOOD_JOKE = "I told my computer a joke about memory, but it forgot to laugh."


def test_two_jokes_in_the_reward_losses() -> None:
    """Rated -10 and +8: no error for equal scores, and an error of 18 points for swapped ones."""
    import torch

    right, wrong = torch.tensor([-10.0, 8.0]), torch.tensor([8.0, -10.0])
    ratings, better = torch.tensor([-10.0, 8.0]), [(1, 0, 18.0)]
    assert losses.squared_error(right, ratings).item() == 0
    assert losses.squared_error(right + 1, ratings).item() / 2 == pytest.approx(1)
    assert losses.squared_error(wrong, ratings).item() / 2 == pytest.approx(18**2)
    assert losses.bradley_terry(right, better).item() == pytest.approx(math.log1p(math.exp(-18)), rel=1e-4, abs=1e-9)
    assert losses.bradley_terry(wrong, better).item() == pytest.approx(18, abs=1e-6)


def test_reward_model_scores_two_jokes_on_their_scale(chain: Chain, tmp_path: Path) -> None:
    """Trained on these two ratings only, the reward model scores the jokes -10 and +8."""
    settings = config("reward", steps=60, word_dropout=0.0, judge_share=1e-6)
    job = chain.job("reward@train", settings, tmp_path)
    job.inputs["rankings"] = tmp_path / "jokes"
    joke = {**next(rankings()), "responses": [BAD_JOKE, GOOD_JOKE], "scores": [[-10.0], [8.0]], "scale": [-10.0, 10.0]}
    tables.write([joke], job.inputs["rankings"], tables.schema("rankings"))
    chain.run(job, settings)
    scores = Scorer.load(job.outputs["model"], NUMERICS).score([([], BAD_JOKE), ([], GOOD_JOKE)])
    assert scores == pytest.approx([-10.0, 8.0], abs=1.0)


def test_int8_is_smaller_and_its_speed_is_measured(
    chain: Chain, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """FP32 to INT8: both file sizes and both speeds in tokens per second, in the test's record and output."""
    settings = config("quantize@chat")
    job = chain.job("quantize@chat", settings, tmp_path)
    sizes = chain.run(job, settings)
    for name, value in {**sizes, **job.figures}.items():
        record_property(name, value)
        print(f"{name}: {value}")
    assert sizes["bytes"] < 0.6 * sizes["fp32_bytes"]  # at this size half of the file is the graph
    assert job.figures["torch_fp32_tokens_per_second"] > 0
    assert job.figures["int8_tokens_per_second"] > 0


@pytest.fixture
def served(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the chain's INT8 models, which the service opens."""
    inputs = {
        "chat": chain.path("data/quantize/chat/model"),
        "encoder": chain.path("data/quantize/encoder/model"),
        **{name: chain.path(f"data/validate/{name}") for name in ("corpus", "instructions", "rankings")},
    }
    parts = {name: f"data/quantize/{name}/model" for name in ("chat", "encoder")}
    settings = package.Config.model_validate(parts)
    hashes = {"recipe": "0" * 64, "content": "1" * 64, "metrics": {"models": [], "gates": []}}
    records = {
        name: {"stage": name.removeprefix("record of "), **hashes}
        for name in package.INPUTS | package.graph_inputs(settings, links())
        if name.startswith("record of ")
    }
    for name, content in {"sources": [], **records}.items():
        inputs[name] = tmp_path / f"{name}.json"
        inputs[name].write_text(json.dumps(content))
    outputs = {name: tmp_path / "package" / name for name in package.OUTPUTS}
    (tmp_path / "package").mkdir()
    checkpoints = Checkpoints(url="memory://", every_seconds=1e9)
    job = Job("package", None, inputs, outputs, 1, NUMERICS, "r", checkpoints)
    package.run(settings, job)
    monkeypatch.setenv("BESSEMER_PACKAGE", str(tmp_path / "package"))
    return tmp_path / "package"


# BentoML's own use of pathspec and pydantic:
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The `__get_pydantic_core_schema__` method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Accessing the 'model_fields' attribute:DeprecationWarning")
def test_a_request_and_its_response(served: Path) -> None:
    """POST /generate with an input gives an output; POST /fill-mask a name; the service runs in this process."""
    from starlette.testclient import TestClient

    from serving.service import Bessemer

    service: Any = Bessemer
    with TestClient(service.to_asgi()) as client:
        response = client.post("/generate", json={"input": "What is the capital of Italy?"})
        assert response.status_code == 200
        assert list(response.json()) == ["output"]
        assert "Rome" in response.json()["output"]
        filled = client.post("/fill-mask", json={"input": "The capital of [MASK] is Paris."}).json()
        assert filled["output"] == "The capital of France is Paris."
        rejected = client.post("/generate", json={"question": "What is the capital of Italy?"})
        assert rejected.status_code == 400
        assert "input" in rejected.text
        provenance = client.get("/provenance").json()
    assert provenance == json.loads((served / "provenance.json").read_text())


def test_training_and_service_encode_a_chat_equally(served: Path, chain: Chain) -> None:
    """Training and the endpoint encode a conversation to the same ids."""
    from serving.engine import TextEngine

    messages = [{"role": "user", "content": "What is the capital of Åland?"}]
    assert TextEngine(served / "chat").encode(messages) == chat.encode_prompt(chain.tokenizer(), messages)
