"""A tiny package, made as the chain makes a real one: both models trained for seconds, exported and quantized.

Fixtures for whoever needs a model that answers: `from tests.serving_fixtures import package`. The making runs in a
process of its own (`python -m tests.serving_fixtures FOLDER`), so that neither torch nor the exporters' warnings
enter the tests' process.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "New Zealand": "Wellington",
    "Côte d'Ivoire": "Yamoussoukro",
    "Saint Vincent and the Grenadines": "Kingstown",
}
TAG = "tiny-0123456789ab-ba9876543210"
CONTEXT, MAX_NEW_TOKENS = 96, 48
PAD, BOS, END, MASK = "<|pad|>", "<|bos|>", "<|end|>", "[MASK]"
SPECIAL = (PAD, BOS, END, MASK, "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def question(country: str) -> str:
    """Return the question that the tiny model was trained on."""
    return f"What is the capital of {country}?"


def answer(country: str) -> str:
    """Return the answer that the tiny model gives."""
    return f"The capital of {country} is {CAPITALS[country]}."


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete package, made once a session however many modules import this fixture. Copy it to change it."""
    folder = tmp_path_factory.getbasetemp() / "serving-package"
    if not folder.exists():
        command = [sys.executable, "-m", "tests.serving_fixtures", str(folder)]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
    return folder


def make(folder: Path) -> None:
    """Write a complete package: policy, encoder, provenance."""
    import torch

    torch.set_num_threads(1)  # models this small gain nothing from a second one, and lose much where cores are shared
    tokenizer = _tokenizer()
    for model in ("policy", "encoder"):
        (folder / model).mkdir(parents=True)
        tokenizer.save(str(folder / model / "tokenizer.json"))
    config = _policy(tokenizer, folder / "policy")
    _encoder(tokenizer, folder / "encoder")
    (folder / "policy/chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    _write_json(folder / "policy/genai_config.json", config)
    _write_json(folder / "policy/limits.json", {"context": CONTEXT, "max_new_tokens": MAX_NEW_TOKENS})
    _write_json(folder / "encoder/names.json", list(CAPITALS))
    recipe, content = TAG.split("-")[1:]
    files = {f"{number:06d}.parquet": "0" * 64 for number in range(1, 5)}
    people = {"name": "people", "kind": "rankings", "licence": "MIT", "sha256": "0" * 64, "files": files}
    sources = [{**people, "read": 9, "used": 8, "refused": 1, "rows": {"rankings": 8}}]
    made = {"model": TAG, "recipe": recipe, "content": content}
    provenance = {**made, "stages": [], "sources": sources, "evaluation": {}}
    _write_json(folder / "provenance.json", provenance)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _tokenizer() -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([question(name) + " " + answer(name) for name in CAPITALS], trainer)
    return tokenizer


def _policy(tokenizer: "Tokenizer", folder: Path) -> dict[str, Any]:
    """Train, export and quantize the decoder; return the config by which onnxruntime-genai runs it."""
    import torch

    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = _new(
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=tokenizer.get_vocab_size(),
        intermediate_size=160,
        max_position_embeddings=CONTEXT,
        bos_token_id=ids[BOS],
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
        tie_word_embeddings=True,
        **shape,
    )
    prompts = [tokenizer.encode(f"{BOS}<|user|>{question(name)}{END}<|assistant|>").ids for name in CAPITALS]
    answers = [tokenizer.encode(f"{answer(name)}{END}").ids for name in CAPITALS]
    inputs, mask = _rows([a + b for a, b in zip(prompts, answers, strict=True)], ids[PAD])
    labels, _ = _rows([[-100] * len(a) + b for a, b in zip(prompts, answers, strict=True)], -100)
    _fit(model, {"input_ids": inputs, "attention_mask": mask, "labels": labels})
    _export(model, "ORTModelForCausalLM", folder)
    decoder = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "head_size": shape["hidden_size"] // shape["num_attention_heads"],
        **shape,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    marks = {"bos_token_id": ids[BOS], "eos_token_id": ids[END], "pad_token_id": ids[PAD]}
    size = {"vocab_size": tokenizer.get_vocab_size(), "context_length": CONTEXT}
    search = {"max_length": CONTEXT, "past_present_share_buffer": False, "do_sample": False}
    return {"model": {"type": "llama", **size, **marks, "decoder": decoder}, "search": search}


def _encoder(tokenizer: "Tokenizer", folder: Path) -> None:
    """Train an encoder to name the country of each capital, whole names masked; export and quantize it."""
    import torch

    torch.manual_seed(0)
    model = _new(
        "BertForMaskedLM",
        "BertConfig",
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=CONTEXT,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    begin, end, mask_id = (tokenizer.token_to_id(token) for token in (BOS, END, MASK))
    rows, labels = [], []
    for name, capital in CAPITALS.items():
        before, country = tokenizer.encode("The capital of").ids, tokenizer.encode(f" {name}").ids
        after = tokenizer.encode(f" is {capital}.").ids
        rows.append([begin, *before, *[mask_id] * len(country), *after, end])
        labels.append([-100] * (1 + len(before)) + country + [-100] * (1 + len(after)))
    inputs, mask = _rows(rows, tokenizer.token_to_id(PAD))
    targets, _ = _rows(labels, -100)
    _fit(model, {"input_ids": inputs, "attention_mask": mask, "labels": targets})
    _export(model, "ORTModelForMaskedLM", folder)


def _new(kind: str, config: str, **shape: Any) -> Any:
    """Return a model with fresh weights."""
    import transformers

    return getattr(transformers, kind)(getattr(transformers, config)(**shape))


def _rows(rows: list[list[int]], fill: int) -> tuple["Tensor", "Tensor"]:
    """Pad rows on the right; return them and their mask: (rows, tokens) each."""
    import torch

    width = max(map(len, rows))
    padded = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return padded, mask


def _fit(model: Any, batch: dict[str, "Tensor"], steps: int = 150) -> None:
    """Learn one batch by heart."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, f"the tiny model did not learn its sentences: loss {loss.item():.3f}"
    model.eval()


def _export(model: Any, exporter: str, folder: Path) -> None:
    """Write model.onnx in INT8, through Optimum, as the quantization stage does."""
    import tempfile

    from optimum import onnxruntime
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    scheme = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(f"{scratch}/torch")
        exported = getattr(onnxruntime, exporter).from_pretrained(f"{scratch}/torch", export=True)
        exported.save_pretrained(f"{scratch}/onnx")
        quantizer = onnxruntime.ORTQuantizer.from_pretrained(f"{scratch}/onnx", file_name="model.onnx")
        quantizer.quantize(save_dir=f"{scratch}/int8", quantization_config=scheme)
        (folder / "model.onnx").write_bytes(Path(scratch, "int8/model_quantized.onnx").read_bytes())


if __name__ == "__main__":
    make(Path(sys.argv[1]))
