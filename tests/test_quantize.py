"""INT8: a quarter of the weights' bytes, nearly the same logits, the same answers, run by the serving engine."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from serving import folders
from serving.decoding import Sampling
from serving.engine import DecoderLogits, EncoderLogits, MaskEngine, TextEngine
from serving.names import MASK, Candidates, log_scores, make_codec, single_slot
from tasks.common import identity
from tasks.common.modelling import models
from tasks.common.settings import Placement
from tasks.common.text import chat
from tasks.evaluate.encoders_under_test import EngineEncoder, TorchEncoder, open_encoder
from tasks.evaluate.models_under_test import TorchDecoder, open_decoder
from tests.training_fixtures import CAPITALS, NUMERICS, QUESTIONS, SETTINGS, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

KEYS = {"chat": "data/prune/pruned/model", "encoder": "data/pretrain/masked/model"}


def weights(path: Path) -> dict[str, int]:
    """Return the number of constants of each type in an export."""
    counts: dict[str, int] = {}
    for node in folders.import_openvino().Core().read_model(path / folders.GRAPH_FILE).get_ops():
        if node.get_type_name() == "Constant":
            kind = node.get_element_type().get_type_name()
            counts[kind] = counts.get(kind, 0) + int(np.prod(list(node.get_output_shape(0))))
    return counts


@pytest.mark.parametrize("key", KEYS)
def test_weights_take_a_byte_each(key: str, chain: Chain) -> None:
    """Matrices are 8-bit; norms and scales, under 5 % of the numbers, are not. The metrics match the file size."""
    path = chain.path(f"data/quantize/{key}/model")
    counts, metrics = weights(path), chain.metrics[f"quantize@{key}"]
    assert counts["i8"] > 0.95 * sum(counts.values())
    assert metrics["bytes"] == (path / folders.WEIGHTS_FILE).stat().st_size
    assert metrics["ratio"] == round(metrics["bytes"] / metrics["fp32_bytes"], 4) < 0.35  # a toy's norms weigh more
    size = json.loads((path / "size.json").read_text())
    load = models.load_decoder if key == "chat" else models.load_encoder
    assert size == {"parameters": models.parameter_count(load(chain.path(KEYS[key]), NUMERICS))}
    assert metrics["fp32_bytes"] == 4 * size["parameters"]


def test_folders_contain_the_files_that_serving_reads(chain: Chain) -> None:
    """No file is missing or superfluous; OpenVINO's own programs can use the decoder's folder too."""
    files_by_key = {key: {path.name for path in chain.path(f"data/quantize/{key}/model").iterdir()} for key in KEYS}
    graph = {f"openvino_model.{ending}" for ending in ("xml", "bin")}
    graph |= {f"{name}.json" for name in ("config", "engine", "tokenizer", "size", "special_tokens")}
    tokenizer = {f"openvino_{name}.{ending}" for name in ("tokenizer", "detokenizer") for ending in ("xml", "bin")}
    assert files_by_key["encoder"] == graph | {"limits.json"}
    assert files_by_key["chat"] == graph | tokenizer | {"generation_config.json", "chat_template.jinja", "limits.json"}


def test_no_file_contains_a_local_path(chain: Chain) -> None:
    """The same model must have the same bytes in another folder."""
    for key in KEYS:
        for file in chain.path(f"data/quantize/{key}/model").iterdir():
            assert str(chain.root).encode() not in file.read_bytes(), file
            assert b"/tmp" not in file.read_bytes(), file


@pytest.mark.parametrize("key", KEYS)
def test_logits_match_8_bit_weights(key: str, chain: Chain) -> None:
    """They equal PyTorch's with weights rounded to 8 bits, up to the order of sums."""
    texts = np.random.default_rng(0).integers(7, SETTINGS["tokenize"]["tokenizer"]["vocabulary"], (8, 4, 24))
    path = chain.path(f"data/quantize/{key}/model")
    load = models.load_decoder if key == "chat" else models.load_encoder
    plain, rounded = torch_logits(load(chain.path(KEYS[key]), NUMERICS), texts)
    encoder, decoder = EncoderLogits(path, 1), DecoderLogits(path, 1) if key == "chat" else None
    actual = np.stack([decoder(ids) if decoder else encoder(ids, np.ones_like(ids)) for ids in texts])
    rounding_error, quantization_error = (
        float(np.sqrt(np.square(actual - logits).mean()) / plain.std()) for logits in (rounded, plain)
    )
    assert rounding_error < 0.1 * quantization_error
    assert 0 < quantization_error < 0.05
    assert (actual.argmax(-1) == plain.argmax(-1)).mean() > 0.95


def plain_logits(model: Any, ids: Any) -> Any:
    """Return a torch model's logits of token ids (B, T)."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)).logits.numpy()


def torch_logits(model: Any, texts: Any) -> tuple[Any, Any]:
    """Return a model's logits of texts (batches, B, T) in PyTorch, with its own weights and with 8-bit matrices."""
    import torch

    def logits() -> Any:
        return np.stack([plain_logits(model, ids) for ids in texts])

    plain = logits()
    with torch.no_grad():
        for weight in {id(part.weight): part.weight for part in model.modules() if has_weight_matrix(part)}.values():
            # One step for each output, or for each token: the largest number of a row is 128 of them, on its own side.
            step = -weight.gather(1, weight.abs().argmax(1, keepdim=True)) / 128
            weight.copy_((weight / step).round().clip(-128, 127) * step)
    return plain, logits()


def has_weight_matrix(part: Any) -> bool:
    """Return whether a module is a linear layer or an embedding."""
    import torch

    return isinstance(part, (torch.nn.Linear, torch.nn.Embedding))


def test_served_engine_matches_its_export(chain: Chain) -> None:
    """With paged attention and batching, its greedy tokens are still the export's argmax."""
    path = chain.path("data/quantize/chat/model")
    rows = np.random.default_rng(1).integers(7, SETTINGS["tokenize"]["tokenizer"]["vocabulary"], (8, 24))
    engine, logits = TextEngine(path, 1), DecoderLogits(path, 1)
    for row in rows:
        tokens = engine.decode(row.tolist(), 12)
        whole = np.array([[*row.tolist(), *tokens]])
        expected = logits(whole)[0, len(row) - 1 : -1]  # (12, V)
        chosen = np.take_along_axis(expected, np.array(tokens)[:, None], -1)[:, 0]
        assert (expected.max(-1) - chosen).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_the_same_alone_and_in_a_batch(temperature: float, chain: Chain) -> None:
    """With `exact`, concurrent requests do not change an answer."""
    engine = TextEngine(chain.path("data/quantize/chat/model"), 1)
    questions = [f"{form.format(country=country)}" for country in CAPITALS for form in QUESTIONS]
    prepared = [
        engine.prepare([{"role": "user", "content": text}], Sampling(temperature=temperature, seed=seed))
        for seed, text in enumerate(questions)
    ]
    single = [engine.start_all([one])[0].finish().text for one in prepared]
    together = [answer.finish().text for answer in engine.start_all(prepared)]
    assert together == single
    assert len(set(single)) >= 5


def test_int8_encoder_ranks_the_same_names_first(chain: Chain) -> None:
    """For every capital the INT8 and the FP32 encoder rank the same name first."""
    names = sorted({name for pair in CAPITALS.items() for name in pair})
    firsts = []
    for path in (KEYS["encoder"], "data/quantize/encoder/model"):
        encoder = open_encoder(chain.path(path), NUMERICS)
        codec = make_codec(encoder.tokenizer, encoder.special_ids)
        places = [single_slot(f"The capital of {MASK} is {capital}.", codec) for capital in CAPITALS.values()]
        scores = log_scores(encoder.logits, codec, Candidates(names, codec), places)
        firsts.append([names[best] for best in scores.argmax(1)])
    assert firsts[0] == firsts[1]
    assert len(set(firsts[0])) > 5
    assert isinstance(open_encoder(chain.path(KEYS["encoder"]), NUMERICS), TorchEncoder)


def test_int8_replies_match_float32_except_near_ties(chain: Chain) -> None:
    """The INT8 engine's replies are PyTorch's in FP32, except where FP32 itself is nearly tied.

    The toy learnt three tones of each answer, so the first word of a reply is nearly a tie that depends on the
    processor. So replies are not compared as text: each token of a reply must be FP32's best, or second by less
    than four standard deviations of the 8-bit error of the difference of two logits.
    """
    conversations = [
        [{"role": "user", "content": form.format(country=c)}] for c in list(CAPITALS)[:8] for form in QUESTIONS
    ]
    replies = open_decoder(folder := chain.path("data/quantize/chat/model"), NUMERICS).reply(conversations, 24, 0.0, 1)
    model, tokenizer = models.load_decoder(chain.path(KEYS["chat"]), NUMERICS), chain.tokenizer()
    gaps, errors, int8 = [], [], DecoderLogits(folder, 1)
    for turns, reply in zip(conversations, replies, strict=True):
        prompt = chat.encode_prompt(tokenizer, turns)
        reply_ids = [*tokenizer.encode(reply, add_special_tokens=False), tokenizer.eos_token_id][:24]
        ids = np.array([prompt + reply_ids])
        plain = plain_logits(model, ids)[0, len(prompt) - 1 : -1]
        gaps.append(plain.max(-1) - plain[np.arange(len(reply_ids)), reply_ids])
        errors.append(int8(ids)[0, len(prompt) - 1 : -1] - plain)
    error = float(np.sqrt(np.square(np.concatenate(errors)).mean()))
    assert max(gap.max() for gap in gaps) < 4 * math.sqrt(2) * error
    assert np.mean(np.concatenate(gaps) == 0) > 0.9  # a tie is the exception
    assert len(set(replies)) >= 5  # of eight countries


def test_the_engine_has_the_models_tokens_and_limits(chain: Chain) -> None:
    """Special tokens come from the model, limits from the settings."""
    path = chain.path("data/quantize/chat/model")
    model, engine = models.load_decoder(chain.path(KEYS["chat"]), NUMERICS).config, TextEngine(path)
    assert (engine.first_id, engine.eos_ids) == (model.bos_token_id, (model.eos_token_id,))
    limits = json.loads((path / "limits.json").read_text())
    assert limits == {"context": SETTINGS["tokenize"]["context"], "max_new_tokens": 24}
    assert json.loads((path / "engine.json").read_text()) == {"exact": True, "cache_blocks": 16 * 3}


@pytest.mark.parametrize(("exact", "kind"), [(True, "f32"), (False, None)])
def test_exact_setting_uses_float32_activations(exact: bool, kind: str | None, tmp_path: Path) -> None:
    """Both for activations and for the KV cache; without it the processor's fastest type is used."""
    (tmp_path / "engine.json").write_text(json.dumps({"exact": exact}))
    (tmp_path / "openvino_model.bin").write_bytes(b"")
    options = folders.openvino_options(tmp_path, 1)
    assert options.get("INFERENCE_PRECISION_HINT") == options.get("KV_CACHE_PRECISION") == kind


def test_the_engines_of_the_service_open_both_folders(chain: Chain, tmp_path: Path) -> None:
    """The outputs are served unchanged: an answer, and names once `package` has added their list."""
    text = TextEngine(chain.path("data/quantize/chat/model"))
    answer = text.generate([{"role": "user", "content": QUESTIONS[0].format(country="Italy")}], Sampling())
    assert "Rome" in answer.text
    shutil.copytree(chain.path("data/quantize/encoder/model"), tmp_path / "encoder")
    (tmp_path / "encoder/names.json").write_text(json.dumps(list(CAPITALS)))
    (filled,) = MaskEngine(tmp_path / "encoder", 64).fill(f"The capital of {MASK} is Rome.", top=1)
    assert filled[0].name == "Italy"


@pytest.mark.parametrize("key", KEYS)
def test_the_same_model_gives_the_same_bytes(key: str, chain: Chain, tmp_path: Path) -> None:
    """Export and quantization are deterministic; speeds are not part of a tracked output."""
    name = f"quantize@{key}"
    job = chain.job(name, config(name), tmp_path)
    metrics = chain.run(job, config(name))
    assert identity.tree_hash(job.outputs["model"]) == identity.tree_hash(chain.path(f"data/quantize/{key}/model"))
    assert metrics == chain.metrics[name]
    speeds = {"torch_fp32_tokens_per_second", "int8_tokens_per_second", "int8_speedup"}
    assert set(job.figures) == (speeds if key == "chat" else set())
    assert all(value > 0 for value in job.figures.values())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: config("quantize@encoder", weights="int3"), "'int8'"),
        (lambda: config("quantize@encoder", instructions="avx2"), "Extra inputs"),
        (lambda: Placement(timed_tokens=1), "greater than or equal to 8"),
    ],
)
def test_unknown_settings_are_rejected(make: Callable[[], Any], sentence: str) -> None:
    """An unknown weight type, an unknown key and a value out of range."""
    with pytest.raises(ValidationError, match=sentence):
        make()


def test_int8_runs_on_the_threads_of_the_settings(chain: Chain) -> None:
    """The number of threads may change rounding, so it is part of the identity."""
    numerics = NUMERICS.model_copy(update={"threads": 2})
    encoder = EngineEncoder.load(chain.path("data/quantize/encoder/model"), numerics)
    assert encoder.logits.threads == 2


def test_torch_folder_is_opened_with_torch(chain: Chain) -> None:
    """The scorecard chooses the engine by the folder's files."""
    assert isinstance(open_decoder(chain.path(KEYS["chat"]), NUMERICS), TorchDecoder)
