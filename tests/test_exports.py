"""Exports of given folders: a wrong graph is refused, no template means completions, OpenVINO's folder is kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.decoding import Sampling
from serving.engine import TextEngine
from serving.errors import InputError
from serving.names import make_codec
from serving.templates import ChatTemplate
from tasks.common.harness.job import Job, StageError
from tasks.common.modelling import models
from tasks.common.settings import Checkpoints
from tasks.common.text import chat
from tasks.quantize import prompts, stage, verification
from tests.family_fixtures import FAMILIES, Shape, make_tokenizer, write_family
from tests.training_fixtures import NUMERICS, config, ignore_exporter_warnings

QUESTION = [{"role": "user", "content": "who said hello"}]


def run(folder: Path, out: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """Run the stage on a folder; return its output and its metrics."""
    out.mkdir(parents=True)
    settings = config("quantize@chat", model=str(folder), max_new_tokens=24, **changes)
    checkpoints = Checkpoints(url=str(out / "checkpoints"), every_seconds=1e9)
    job = Job("quantize", "chat", {"model": folder}, {"model": out / "model"}, 1, NUMERICS, "0" * 64, checkpoints,
              timed_tokens=4)  # fmt: skip
    with ignore_exporter_warnings():
        metrics = stage.run(settings, job)
    return out / "model", metrics


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a chat template."""
    return write_family("llama3", tmp_path_factory.mktemp("given") / "llama")


@pytest.fixture(scope="module")
def exported(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return run(llama, tmp_path_factory.mktemp("exported") / "out")


def test_record_holds_the_difference_from_torch(exported: tuple[Path, dict[str, Any]]) -> None:
    """Rounded up to a power of ten, so that it is the same on every processor."""
    assert exported[1]["fp32_difference"] in (1e-6, 1e-5, 1e-4)


def test_export_with_other_logits_is_refused(llama: Path) -> None:
    model = models.load_decoder(llama, NUMERICS).eval()

    def shifted(ids: Any) -> Any:
        import torch

        with torch.no_grad():
            return model(input_ids=torch.from_numpy(ids)).logits.numpy() * np.float32(1 + 0.01 * (ids.shape[1] > 8))

    with pytest.raises(StageError, match=r"computes other logits than PyTorch: in a text of 48 tokens they differ"):
        verification.check_float32(model, shifted, 96, 300)


def test_engine_that_chooses_other_tokens_is_refused(
    exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextEngine, "decode", lambda self, prompt, tokens: [7] * tokens)
    with pytest.raises(StageError, match="the serving engine generates other tokens than the exported model computes"):
        verification.check_engine(exported[0], 1, 96, 300)


def test_folder_without_a_template_only_completes_texts(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    target, _ = run(folder, tmp_path / "out")
    engine = TextEngine(target, 1)
    with pytest.raises(InputError, match="no chat template, so it answers no conversations: POST a text to /v1/compl"):
        engine.encode(QUESTION)
    assert engine.generate("the capital", Sampling(4)).completion_tokens == 4
    named, _ = run(folder, tmp_path / "named", chat_template="plain")
    tokenizer = chat.load_tokenizer(folder, "plain")
    assert TextEngine(named, 1).encode(QUESTION) == chat.encode_prompt(tokenizer, QUESTION)


def test_template_that_the_endpoint_renders_otherwise_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat.load_tokenizer(llama)
    prompts.check_template(tokenizer, llama)
    monkeypatch.setattr(ChatTemplate, "render", lambda self, messages: "other")
    with pytest.raises(StageError, match="renders a conversation otherwise at the endpoint than in Transformers"):
        prompts.check_template(tokenizer, llama)


def test_template_that_computes_for_ever_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.templates.MAX_SECONDS", 0.2)
    tokenizer = chat.load_tokenizer(llama)
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(StageError, match=r"cannot be served: .* computes for more than"):
        prompts.check_template(tokenizer, llama)


def test_folder_in_openvino_format_is_served_as_it_is(
    exported: tuple[Path, dict[str, Any]], llama: Path, tmp_path: Path
) -> None:
    """As optimum-cli writes it: the graph's bytes stay, and what serving needs is added."""
    folder = Path(shutil.copytree(exported[0], tmp_path / "int8"))
    for name in ("limits.json", "engine.json", "special_tokens.json", "size.json"):
        (folder / name).unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))  # not the token that ends a turn
    chat.read_tokenizer(llama).save_pretrained(folder)
    target, metrics = run(folder, tmp_path / "out")
    assert metrics == {"bytes": (folder / "openvino_model.bin").stat().st_size}
    assert (target / "openvino_model.bin").read_bytes() == (folder / "openvino_model.bin").read_bytes()
    served, original = TextEngine(target, 1), TextEngine(exported[0], 1)
    assert served.encode(QUESTION) == original.encode(QUESTION)
    assert set(served.eos_ids) == {0, *original.eos_ids}
    assert served.generate(QUESTION, Sampling(8)).text == original.generate(QUESTION, Sampling(8)).text
    assert json.loads((target / "size.json").read_text())["parameters"] > 10_000


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.masked])
def test_masked_name_has_the_tokens_of_running_text(family: str) -> None:
    """With a space before it, in the tokenizer of every encoder of the matrix."""
    tokenizer = make_tokenizer(FAMILIES[family], Shape())
    codec = make_codec(tokenizer.backend_tokenizer, chat.special_ids(tokenizer))
    text = tokenizer.encode("the capital of France is Paris", add_special_tokens=False)
    assert [*codec.encode("the capital of"), *codec.encode(" France"), *codec.encode(" is Paris")] == text
