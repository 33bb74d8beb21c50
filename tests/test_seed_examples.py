"""The project's first examples, each through the real code: names, words, loss, optimizer, reward, INT8, API."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.names import Candidates, best, codec_of, log_scores, only_slot
from tasks import package
from tasks.common import tables
from tasks.common.evaluation import sampling
from tasks.common.evaluation.candidates import TorchEncoder
from tasks.common.evaluation.scoring import Scorer
from tasks.common.modelling import models
from tasks.common.settings import Checkpoints
from tasks.common.stage import Job
from tasks.common.text import chat
from tasks.common.text.packing import padded_rows
from tasks.common.training import losses, optimizers
from tasks.common.training.answering import answers_surprise
from tasks.common.training.optimizers import Sgd
from tests.training_fixtures import CAPITALS, NUMERICS, RULE, Chain, chain, config, rankings

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain


def test_the_masked_capital(chain: Chain) -> None:
    """ "The capital of [MASK] is Paris." gives France, among all names and whatever their number of tokens."""
    encoder = TorchEncoder.load(chain.path("data/pretrain/mlm/model"), NUMERICS)
    codec = codec_of(encoder.tokenizer)
    candidates = Candidates([name for pair in CAPITALS.items() for name in pair], codec)
    assert len(candidates.groups[True]) > 2  # names of one, of two and of more tokens compete
    for country in ("France", "Italy", "Japan", "Egypt", "New Zealand", "Antigua and Barbuda"):
        place = only_slot(f"The capital of [MASK] is {CAPITALS[country]}.", codec)
        (ranked,) = best(log_scores(encoder.logits, codec, candidates, [place]), candidates, 3)
        assert ranked[0].name == country
        assert ranked[0].score > ranked[1].score > 0


def test_the_next_words(chain: Chain) -> None:
    """A decoder that has learnt its text by heart goes on where a sentence stops, word by word to its end."""
    model = models.load_decoder(chain.path("data/pretrain/clm/model"), NUMERICS)
    tokenizer = chain.tokenizer()
    for country in ("France", "Mexico", "Antigua and Barbuda"):
        begun, rest = f"The capital of {country} is", f"{CAPITALS[country]}."
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(begun, add_special_tokens=False)]
        (reply,) = sampling.replies(
            model, tokenizer, [prompt], max_new_tokens=12, temperature=0.0, seed=1, numerics=NUMERICS
        )
        assert sampling.decode(tokenizer, reply) == rest
        assert reply[-1] == tokenizer.eos_token_id


class Sure:
    """A model that gives the next token a fixed probability and shares the rest out evenly."""

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


def test_the_loss_of_a_right_word_held_for_85_per_cent_likely(chain: Chain) -> None:
    """-ln 0.85 = 0.1625, by the loss that fine-tuning computes."""
    tokenizer = chain.tokenizer()
    right = tokenizer.encode(" Paris", add_special_tokens=False)[0]
    model = Sure(right, 0.85, len(tokenizer))
    asked: Any = [([tokenizer.bos_token_id, right], [False, True])]
    loss = answers_surprise(model, padded_rows(asked, tokenizer.pad_token_id), NUMERICS)
    assert loss.item() == pytest.approx(-math.log(0.85), rel=1e-6)
    assert f"{loss.item():.4f}" == "0.1625"


def test_one_step_of_gradient_descent() -> None:
    """w - learning rate x gradient: 0.5 - 0.1 x 0.2 = 0.48, by the optimizer that the stages build."""
    import torch

    weight = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(weight.weight, 0.5)
    changed = {"learning_rate": 0.1, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    (optimizer,) = optimizers.build(Sgd.model_validate({"name": "sgd", **RULE, **changed}), weight)
    loss = 0.2 * weight.weight.sum()  # whose gradient is 0.2 whatever the weight
    loss.backward()
    optimizer.step()
    assert weight.weight.item() == pytest.approx(0.48)


BAD_JOKE = "Why did the chicken cross the road? To get to the other side."
GOOD_JOKE = "I told my computer a joke about memory, but it forgot to laugh."


def test_two_jokes_in_the_reward_losses() -> None:
    """Rated -10 and +8: no error where the scores say so, 18 points where they are the wrong way round."""
    import torch

    right, wrong = torch.tensor([-10.0, 8.0]), torch.tensor([8.0, -10.0])
    rated, better = torch.tensor([-10.0, 8.0]), [(1, 0, 18.0)]
    assert losses.squared_error(right, rated).item() == 0
    assert losses.squared_error(right + 1, rated).item() / 2 == pytest.approx(1)
    assert losses.squared_error(wrong, rated).item() / 2 == pytest.approx(18**2)
    assert losses.bradley_terry(right, better).item() == pytest.approx(math.log1p(math.exp(-18)), rel=1e-4, abs=1e-9)
    assert losses.bradley_terry(wrong, better).item() == pytest.approx(18, abs=1e-6)


def test_two_jokes_are_learnt_on_their_scale(chain: Chain, tmp_path: Path) -> None:
    """The reward stage, given nothing but these two ratings, scores the jokes -10 and +8."""
    settings = config("reward", steps=60, word_dropout=0.0, judge_share=1e-6)
    job = chain.job("reward@policy", settings, tmp_path)
    job.inputs["rankings"] = tmp_path / "jokes"
    joke = {**next(rankings()), "responses": [BAD_JOKE, GOOD_JOKE], "scores": [[-10.0], [8.0]], "scale": [-10.0, 10.0]}
    tables.write([joke], job.inputs["rankings"], tables.schema("rankings"))
    chain.run(job, settings)
    found = Scorer.load(job.outputs["model"], NUMERICS).score([([], BAD_JOKE), ([], GOOD_JOKE)])
    assert found == pytest.approx([-10.0, 8.0], abs=1.0)


def test_int8_is_smaller_and_its_speed_is_measured(
    chain: Chain, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """FP32 to INT8: sizes of both files and tokens a second of both, told in the test's record and on its output."""
    settings = config("quantize@policy")
    job = chain.job("quantize@policy", settings, tmp_path)
    sizes = chain.run(job, settings)
    for name, value in {**sizes, **job.figures}.items():
        record_property(name, value)
        print(f"{name}: {value}")
    assert sizes["bytes"] < 0.6 * sizes["fp32_bytes"]  # at this size half of the file is the graph
    assert job.figures["torch_fp32_tokens_per_second"] > 0
    assert job.figures["int8_tokens_per_second"] > 0


@pytest.fixture
def served(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that the packaging stage made of the chain's INT8 models; the service will find it."""
    inputs = {
        "policy": chain.path("data/quantize/policy/model"),
        "encoder": chain.path("data/quantize/encoder/model"),
        "corpus": chain.path("data/validate/corpus"),
    }
    records = {
        f"record of {name}": {"stage": name.replace("/", "@"), "recipe": "0" * 64, "content": "1" * 64}
        for name in package.RECORDS
    }
    for name, content in {"sources": [], "evaluation": {"models": [], "gates": []}, **records}.items():
        inputs[name] = tmp_path / f"{name.replace('/', '-')}.json"
        inputs[name].write_text(json.dumps(content))
    outputs = {name: tmp_path / "package" / name for name in package.OUTPUTS}
    (tmp_path / "package").mkdir()
    checkpoints = Checkpoints(url="memory://", every_seconds=1e9)
    job = Job("package", None, inputs, outputs, 1, NUMERICS, "r", checkpoints)
    package.run(package.Config(refuse_failed_gates=True), job)
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
        answered = client.post("/generate", json={"input": "What is the capital of Italy?"})
        assert answered.status_code == 200
        assert list(answered.json()) == ["output"]
        assert "Rome" in answered.json()["output"]
        filled = client.post("/fill-mask", json={"input": "The capital of [MASK] is Paris."}).json()
        assert filled["output"] == "The capital of France is Paris."
        refused = client.post("/generate", json={"question": "What is the capital of Italy?"})
        assert refused.status_code == 400
        assert "input" in refused.text
        told = client.get("/provenance").json()
    assert told == json.loads((served / "provenance.json").read_text())


def test_a_chat_is_encoded_for_the_model_as_the_service_encodes_it(served: Path, chain: Chain) -> None:
    """What the policy was trained on and what the endpoint feeds it are the same ids."""
    from serving.engine import TextEngine

    messages = [{"role": "user", "content": "What is the capital of Åland?"}]
    assert TextEngine(served / "policy").encode(messages) == chat.encode_prompt(chain.tokenizer(), messages)
