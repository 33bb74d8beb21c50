"""A tiny package, built like a real one: both models are trained for seconds, exported and quantized.

Use: `from tests.serving_fixtures import package`. The package is built in a subprocess
(`python -m tests.serving_fixtures FOLDER`), so that the test process does not import torch and shows no warnings
of the exporters.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

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
EUROPEAN = ("France", "Italy")
LABELS = ["Europe", "elsewhere"]
TAG = "tiny-0123456789ab-ba9876543210"
CONTEXT, MAX_NEW_TOKENS = 96, 48
PAD, BOS, END, MASK = "<|pad|>", "<|bos|>", "<|end|>", "[MASK]"
BERT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": CONTEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
SPECIAL = (PAD, BOS, END, MASK, "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def question(country: str) -> str:
    """Return the question that the tiny model was trained on."""
    return f"What is the capital of {country}?"


def continent(country: str) -> str:
    """Return the label of a question about a country."""
    return LABELS[0] if country in EUROPEAN else LABELS[1]


def answer(country: str) -> str:
    """Return the answer that the tiny model gives."""
    return f"The capital of {country} is {CAPITALS[country]}."


@pytest.fixture(scope="session")
def package(session_folder: Path) -> Path:
    """A complete package, built once per session. Copy it to change it."""
    folder = session_folder / "serving-package"
    with FileLock(folder.with_suffix(".lock")):  # another worker may be building it
        if not folder.exists():
            unfinished = folder.with_suffix(".new")  # a build that failed is not taken for a package
            command = [sys.executable, "-m", "tests.serving_fixtures", str(unfinished)]
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert process.returncode == 0, process.stderr
            unfinished.rename(folder)
    return folder


def make(folder: Path) -> None:
    """Write a complete package: chat model, encoder, classifier, provenance."""
    import torch

    torch.set_num_threads(1)  # such small models do not profit from more, and are much slower on shared cores
    tokenizer = _tokenizer()
    first, last, mask = (tokenizer.token_to_id(token) for token in (BOS, END, MASK))
    special = {"template": {"bos_token": BOS, "eos_token": END}, "first": first, "last": last, "mask": mask}
    for model in ("chat", "encoder", "classifier"):
        (folder / model).mkdir(parents=True)
        tokenizer.save(str(folder / model / "tokenizer.json"))
        _write_json(folder / model / "special_tokens.json", {**special, "template": None})
    _make_decoder(tokenizer, folder / "chat")
    _make_encoder(tokenizer, folder / "encoder")
    _make_classifier(tokenizer, folder / "classifier")
    _write_json(folder / "chat/special_tokens.json", special)
    (folder / "chat/chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    _write_json(folder / "chat/engine.json", {"exact": True, "cache_blocks": 64})
    _write_json(folder / "encoder/engine.json", {"exact": True})
    _write_json(folder / "classifier/engine.json", {"exact": True})
    _write_json(folder / "classifier/labels.json", LABELS)
    _write_json(folder / "classifier/limits.json", {"context": CONTEXT})
    _write_json(folder / "chat/limits.json", {"context": CONTEXT, "max_new_tokens": MAX_NEW_TOKENS})
    _write_json(folder / "encoder/limits.json", {"context": CONTEXT})
    _write_json(folder / "encoder/names.json", list(CAPITALS))
    samples = [question("France"), question("Italy")]
    examples = {
        "prompts": [],
        "samples": samples,
        "masked": "The capital of [MASK] is Rome.",
        "classified": question("Italy"),
    }
    _write_json(folder / "examples.json", examples)
    recipe, content = TAG.split("-")[1:]
    files = {f"{number:06d}.parquet": "0" * 64 for number in range(1, 5)}
    people = {"name": "people", "kind": "rankings", "licence": "MIT", "sha256": "0" * 64, "files": files}
    sources = [{**people, "read": 9, "used": 8, "rejected": 1, "rows": {"rankings": 8}}]
    identifiers = {"model": TAG, "recipe": recipe, "content": content}
    provenance = {**identifiers, "stages": [], "sources": sources, "evaluation": {}}
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


def _make_decoder(tokenizer: "Tokenizer", folder: Path) -> None:
    """Train, export and quantize the decoder."""
    import torch

    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    torch.manual_seed(0)
    model = _new(
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=160,
        max_position_embeddings=CONTEXT,
        bos_token_id=ids[BOS],
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
        tie_word_embeddings=True,
    )
    prompts = [tokenizer.encode(f"{BOS}<|user|>{question(name)}{END}<|assistant|>").ids for name in CAPITALS]
    answers = [tokenizer.encode(f"{answer(name)}{END}").ids for name in CAPITALS]
    inputs, mask = _rows([a + b for a, b in zip(prompts, answers, strict=True)], ids[PAD])
    labels, _ = _rows([[-100] * len(a) + b for a, b in zip(prompts, answers, strict=True)], -100)
    _train(model, {"input_ids": inputs, "attention_mask": mask, "labels": labels})
    _export(model, folder, "causal")


def _make_encoder(tokenizer: "Tokenizer", folder: Path) -> None:
    """Train an encoder to name the country of each capital, whole names masked; export and quantize it."""
    import torch

    torch.manual_seed(0)
    model = _new("BertForMaskedLM", "BertConfig", vocab_size=tokenizer.get_vocab_size(), **BERT)
    begin, end, mask_id = (tokenizer.token_to_id(token) for token in (BOS, END, MASK))
    rows, labels = [], []
    for name, capital in CAPITALS.items():
        before, country = tokenizer.encode("The capital of").ids, tokenizer.encode(f" {name}").ids
        after = tokenizer.encode(f" is {capital}.").ids
        rows.append([begin, *before, *[mask_id] * len(country), *after, end])
        labels.append([-100] * (1 + len(before)) + country + [-100] * (1 + len(after)))
    inputs, mask = _rows(rows, tokenizer.token_to_id(PAD))
    targets, _ = _rows(labels, -100)
    _train(model, {"input_ids": inputs, "attention_mask": mask, "labels": targets})
    _export(model, folder, "masked")


def _make_classifier(tokenizer: "Tokenizer", folder: Path) -> None:
    """Train a classifier to tell which of two continents a question is about; export and quantize it."""
    import torch

    torch.manual_seed(0)
    model = _new(
        "BertForSequenceClassification", "BertConfig", vocab_size=tokenizer.get_vocab_size(), num_labels=len(LABELS),
        **BERT,
    )  # fmt: skip
    begin, end = (tokenizer.token_to_id(token) for token in (BOS, END))
    inputs, mask = _rows([[begin, *tokenizer.encode(question(name)).ids, end] for name in CAPITALS], 0)
    labels = torch.tensor([LABELS.index(continent(name)) for name in CAPITALS])
    _train(model, {"input_ids": inputs, "attention_mask": mask, "labels": labels})
    _export(model, folder, "classifier")


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


def _train(model: Any, batch: dict[str, "Tensor"], steps: int = 150) -> None:
    """Overfit one batch."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, f"the tiny model did not learn its sentences: loss {loss.item():.3f}"
    model.eval()


def _export(model: Any, folder: Path, kind: str) -> None:
    """Export the model with INT8 weights, like the quantization stage."""
    import tempfile

    from tasks.quantize import openvino_export

    with tempfile.TemporaryDirectory() as scratch:
        plain, float32 = Path(scratch, "plain"), Path(scratch, "float32")
        model.save_pretrained(plain)
        openvino_export.export_float32(plain, float32, kind)
        openvino_export.compress(float32, folder, kind, "int8")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
