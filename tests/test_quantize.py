"""INT8: a quarter of the weights' bytes, nearly the same function, the same answers, run by the engine that serves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from serving.decoding import Sampling
from serving.engine import MaskEngine, TextEngine
from serving.folders import load_genai, load_onnx
from serving.names import MASK, Candidates, codec_of, log_scores, only_slot
from tasks.common import identity
from tasks.common.evaluation.candidates import OnnxEncoder, TorchDecoder, TorchEncoder, open_decoder, open_encoder
from tasks.common.modelling import models
from tests.training_fixtures import CAPITALS, NUMERICS, QUESTIONS, SETTINGS, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

KEYS = {"policy": "data/prune/model", "encoder": "data/pretrain/mlm/model"}


def weights(path: Path) -> dict[str, int]:
    """Return how many numbers of each type an ONNX file holds."""
    import onnx

    counts: dict[str, int] = {}
    for tensor in onnx.load(path).graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        counts[kind] = counts.get(kind, 0) + int(np.prod(tensor.dims))
    return counts


@pytest.mark.parametrize("key", KEYS)
def test_weights_take_a_byte_each(key: str, chain: Chain) -> None:
    """Matrices are 8-bit; norms and scales, under 3 % of the numbers, are not. The file is as small as it is said."""
    path = chain.path(f"data/quantize/{key}/model") / "model.onnx"
    counts, metrics = weights(path), chain.metrics[f"quantize@{key}"]
    assert counts["INT8"] + counts["UINT8"] > 0.97 * sum(counts.values())
    assert metrics["bytes"] == path.stat().st_size
    assert metrics["ratio"] == round(metrics["bytes"] / metrics["fp32_bytes"], 4) < 0.6  # the graph is half of a toy
    size = json.loads((path.parent / "size.json").read_text())
    load = models.load_decoder if key == "policy" else models.load_encoder
    assert size == {"parameters": models.parameters(load(chain.path(KEYS[key]), NUMERICS))}
    assert metrics["fp32_bytes"] > 4 * size["parameters"]


def test_the_folders_hold_what_serving_reads(chain: Chain) -> None:
    """Nothing is missing and nothing left over: no FP32 file, no scratch."""
    found = {key: {path.name for path in chain.path(f"data/quantize/{key}/model").iterdir()} for key in KEYS}
    engine = {"genai_config.json", "chat_template.jinja", "limits.json"}
    assert found["encoder"] == {"model.onnx", "tokenizer.json", "size.json"}
    assert found["policy"] == found["encoder"] | engine


@pytest.mark.parametrize("key", KEYS)
def test_the_logits_are_those_of_8_bits(key: str, chain: Chain) -> None:
    """The logits are torch's with weights, and what they are multiplied by, rounded to 8 bits.

    The two add up in another order, so that here and there a number falls to the other side of a rounding. What the
    roundings take from FP32 is a few per cent of the logits' spread.
    """
    texts = np.random.default_rng(0).integers(7, SETTINGS["tokenize"]["tokenizer"]["vocabulary"], (8, 4, 24))
    path = chain.path(f"data/quantize/{key}/model")
    load = models.load_decoder if key == "policy" else models.load_encoder
    plain, rounded = torch_logits(load(chain.path(KEYS[key]), NUMERICS), texts, decoder=key == "policy")
    engine = OnnxEncoder.load(path, NUMERICS) if key == "encoder" else None
    found = np.stack([
        engine.logits(ids, np.ones_like(ids)) if engine else decoder_logits(path, ids) for ids in texts
    ])  # fmt: skip
    apart, lost = (float(np.sqrt(np.square(found - logits).mean()) / plain.std()) for logits in (rounded, plain))
    assert apart < 0.1 * lost
    assert 0 < lost < 0.1
    assert (found.argmax(-1) == plain.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize("key", KEYS)
def test_only_products_with_weights_are_rounded(key: str, chain: Chain) -> None:
    """Attention and rotary angles stay FP32: 8 bits would blur a place of a long text by more than one."""
    import onnx

    kinds = [node.op_type for node in onnx.load(chain.path(f"data/quantize/{key}/model") / "model.onnx").graph.node]
    assert kinds.count("MatMulInteger") == {"policy": 15, "encoder": 10}[key]  # of two blocks, and above them
    assert kinds.count("MatMul") == 5  # two a block, and the angles


def torch_logits(model: Any, texts: Any, *, decoder: bool) -> tuple[Any, Any]:
    """Return a model's logits of texts (batches, B, T) in torch, as it is and with INT8's roundings; it keeps these.

    A decoder's export multiplies by the rounded embedding where its head is that; an encoder's has a copy of its own.
    """
    import torch

    def logits() -> Any:
        with torch.no_grad():
            return np.stack([model(input_ids=torch.from_numpy(ids)).logits.numpy() for ids in texts])

    def in_255_steps(values: Any) -> Any:
        low, high = values.min().clamp(max=0), values.max().clamp(min=0)
        step = (high - low) / 255
        zero = (-low / step).round()
        return (((values / step).round() + zero).clip(0, 255) - zero) * step

    plain = logits()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        embedded = in_255_steps(embedding.weight)
        for part in model.modules():
            if isinstance(part, torch.nn.Linear):
                step = part.weight.abs().amax(1, keepdim=True) / 127  # one for each of its outputs
                weight = embedded if part is head and decoder else (part.weight / step).round() * step
                part.weight = torch.nn.Parameter(weight)
                part.register_forward_pre_hook(lambda _, given: (in_255_steps(given[0]),))
        embedding.weight = torch.nn.Parameter(embedded)
    return plain, logits()


def decoder_logits(path: Path, ids: Any) -> Any:
    """Return the INT8 decoder's logits through its export's own inputs and outputs."""
    session = load_onnx(path / "model.onnx", None)
    config = json.loads((path / "genai_config.json").read_text())["model"]["decoder"]
    heads, size = config["num_key_value_heads"], config["head_size"]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed["position_ids"] = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    for layer in range(config["num_hidden_layers"]):
        for name in ("past_key_names", "past_value_names"):
            feed[config["inputs"][name] % layer] = np.zeros((len(ids), heads, 0, size), np.float32)
    wanted = {item.name for item in session.get_inputs()}
    assert wanted <= set(feed)
    return session.run([config["outputs"]["logits"]], {name: feed[name] for name in wanted})[0]


def test_the_served_engine_computes_as_onnx_runtime_does(chain: Chain) -> None:
    """Both are told to add up without overflow, which processors without VNNI else do not."""
    path = chain.path("data/quantize/policy/model")
    ids = np.random.default_rng(1).integers(7, SETTINGS["tokenize"]["tokenizer"]["vocabulary"], (1, 24))
    import onnxruntime_genai

    model = load_genai(path, 1)
    generator = onnxruntime_genai.Generator(model, onnxruntime_genai.GeneratorParams(model))
    generator.append_tokens(ids[0].tolist())
    expected = decoder_logits(path, ids)
    np.testing.assert_allclose(generator.get_output("logits"), expected, atol=1e-4 * np.abs(expected).max())


def test_the_same_names_are_found(chain: Chain) -> None:
    """For every capital the INT8 encoder puts first the name that the FP32 encoder puts first."""
    names = sorted({name for pair in CAPITALS.items() for name in pair})
    firsts = []
    for path in (KEYS["encoder"], "data/quantize/encoder/model"):
        encoder = open_encoder(chain.path(path), NUMERICS)
        codec = codec_of(encoder.tokenizer)
        places = [only_slot(f"The capital of {MASK} is {capital}.", codec) for capital in CAPITALS.values()]
        scores = log_scores(encoder.logits, codec, Candidates(names, codec), places)
        firsts.append([names[best] for best in scores.argmax(1)])
    assert firsts[0] == firsts[1]
    assert len(set(firsts[0])) > 5
    assert isinstance(open_encoder(chain.path(KEYS["encoder"]), NUMERICS), TorchEncoder)


def test_the_same_answers_are_given(chain: Chain) -> None:
    """The serving engine on the INT8 folder replies, word for word, what torch replies in FP32."""
    asked = [[{"role": "user", "content": form.format(country=c)}] for c in list(CAPITALS)[:8] for form in QUESTIONS]
    plain, quantized = (
        open_decoder(chain.path(path), NUMERICS).reply(asked, 24, 0.0, 1)
        for path in (KEYS["policy"], "data/quantize/policy/model")
    )
    same = sum(a == b for a, b in zip(plain, quantized, strict=True))
    assert same >= 14  # of 16; a toy may hesitate between two tones
    assert len(set(quantized)) > 6


def test_the_engine_config_says_what_the_model_is(chain: Chain) -> None:
    """Shape, special tokens and limits are the model's and the settings'."""
    path = chain.path("data/quantize/policy/model")
    model = models.load_decoder(chain.path(KEYS["policy"]), NUMERICS).config
    engine = json.loads((path / "genai_config.json").read_text())
    assert engine["model"]["context_length"] == engine["search"]["max_length"] == SETTINGS["tokenize"]["context"]
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert engine["model"][name] == getattr(model, name)
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        assert engine["model"]["decoder"][name] == getattr(model, name)
    limits = json.loads((path / "limits.json").read_text())
    assert limits == {"context": SETTINGS["tokenize"]["context"], "max_new_tokens": 24}


def test_the_engines_of_the_service_open_both_folders(chain: Chain, tmp_path: Path) -> None:
    """What the chain leaves is served as it is: an answer, and names once `package` has added their list."""
    text = TextEngine(chain.path("data/quantize/policy/model"))
    answer = text.generate([{"role": "user", "content": QUESTIONS[0].format(country="Italy")}], Sampling())
    assert "Rome" in answer.text
    shutil.copytree(chain.path("data/quantize/encoder/model"), tmp_path / "encoder")
    (tmp_path / "encoder/names.json").write_text(json.dumps(list(CAPITALS)))
    (filled,) = MaskEngine(tmp_path / "encoder", 64).fill(f"The capital of {MASK} is Rome.", top=1)
    assert filled[0].name == "Italy"


@pytest.mark.parametrize("key", KEYS)
def test_the_same_model_gives_the_same_bytes(key: str, chain: Chain, tmp_path: Path) -> None:
    """Export and quantization are functions of the model; speeds are measured and enter no tracked output."""
    name = f"quantize@{key}"
    job = chain.job(name, config(name), tmp_path)
    metrics = chain.run(job, config(name))
    assert identity.tree_hash(job.outputs["model"]) == identity.tree_hash(chain.path(f"data/quantize/{key}/model"))
    assert metrics == chain.metrics[name]
    speeds = {"torch_fp32_tokens_per_second", "int8_tokens_per_second", "int8_speedup"}
    assert set(job.figures) == (speeds if key == "policy" else set())
    assert all(value > 0 for value in job.figures.values())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: config("quantize@encoder", instructions="sse2"), "'avx512_vnni', 'avx2' or 'arm64'"),
        (lambda: config("quantize@encoder", max_new_tokens=8), "Extra inputs"),
        (lambda: config("quantize@policy", timed_tokens=1), "greater than or equal to 8"),
    ],
)
def test_unknown_settings_are_told(make: Callable[[], Any], sentence: str) -> None:
    """Processor instructions that there is no scheme for, and settings of the other key."""
    with pytest.raises(ValidationError, match=sentence):
        make()


def test_int8_runs_on_the_threads_of_the_settings(chain: Chain) -> None:
    """Sums over several threads may round otherwise, so that their number is part of the identity."""
    numerics = NUMERICS.model_copy(update={"threads": 2})
    encoder = OnnxEncoder.load(chain.path("data/quantize/encoder/model"), numerics)
    assert encoder.session.get_session_options().intra_op_num_threads == 2


def test_a_torch_folder_is_opened_as_such(chain: Chain) -> None:
    """The sheet reads a model by what lies in its folder."""
    assert isinstance(open_decoder(chain.path(KEYS["policy"]), NUMERICS), TorchDecoder)
