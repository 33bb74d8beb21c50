"""Model folders as people have them: float types, shards, adapters, vocabularies, templates, end tokens, damage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.align.halves import Halves
from tasks.common import model_folder
from tasks.common.generation import sampling
from tasks.common.harness.job import StageError
from tasks.common.modelling import head_models, loading, models
from tasks.common.reward.frozen import FrozenBackbone
from tasks.common.text import chat, templates
from tests.family_fixtures import Shape, write_family
from tests.training_fixtures import NUMERICS

QUESTION = [{"role": "user", "content": "who said hello"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "Rome"}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Llama with ChatML."""
    return write_family("llama3", tmp_path_factory.mktemp("given") / "llama")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def change(path: Path, **entries: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def logits(path: Path) -> Any:
    """Return a model's logits of a few tokens."""
    import torch

    with torch.no_grad():
        return models.load_decoder(path, NUMERICS).eval()(input_ids=torch.arange(5, 40)[None]).logits


# Weights


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_folder_is_loaded_in_float32(dtype: str, llama: Path, tmp_path: Path) -> None:
    import torch

    model = models.load_decoder(llama, NUMERICS).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    shutil.copy(llama / "tokenizer.json", tmp_path)
    loaded = dict(models.load_decoder(tmp_path, NUMERICS).named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(loaded[name], weight.float())


def test_sharded_folder_equals_a_whole_one(llama: Path, tmp_path: Path) -> None:
    import torch

    models.load_decoder(llama, NUMERICS).save_pretrained(tmp_path, max_shard_size="60KB")
    shutil.copy(llama / "tokenizer.json", tmp_path)
    assert (tmp_path / model_folder.INDEX).is_file()
    assert list(model_folder.problems(tmp_path)) == []
    assert torch.equal(logits(tmp_path), logits(llama))


def test_tokens_beyond_the_embedding_get_rows(copy: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each new row is the mean of the others, the same in every load; the other logits do not change."""
    import torch

    tokenizer = chat.read_tokenizer(copy)
    tokenizer.add_tokens(["<|tool|>", "<|call|>"])
    tokenizer.save_pretrained(copy)
    first, second = (models.load_decoder(copy, NUMERICS).get_input_embeddings().weight for _ in range(2))
    assert torch.equal(first, second)
    assert len(first) == len(tokenizer)
    torch.testing.assert_close(first[-1], first[:-2].mean(0))
    assert "2 rows are added, each the mean of the others" in capsys.readouterr().out
    assert torch.equal(logits(copy)[..., :-2], logits(llama))


def test_embedding_larger_than_the_tokenizer_is_kept(tmp_path: Path) -> None:
    folder = write_family("qwen2", tmp_path)
    model = models.load_decoder(folder, NUMERICS)
    model.resize_token_embeddings(384, mean_resizing=False)
    model.save_pretrained(folder)
    assert len(models.load_decoder(folder, NUMERICS).get_input_embeddings().weight) == 384


# Problems of folders, reported without loading a weight


def truncate_weights(folder: Path) -> None:
    file = folder / model_folder.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def empty_weights(folder: Path) -> None:
    (folder / model_folder.WEIGHTS).write_bytes(b"")


def pickle_weights(folder: Path) -> None:
    (folder / model_folder.WEIGHTS).rename(folder / "pytorch_model.bin")


def drop_shard(folder: Path) -> None:
    (folder / model_folder.WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {name: f"model-0000{name}-of-00002.safetensors" for name in "12"}}
    (folder / model_folder.INDEX).write_text(json.dumps(index))


def hide_in_subfolder(folder: Path) -> None:
    (folder / "checkpoint-500").mkdir()
    (folder / "config.json").rename(folder / "checkpoint-500/config.json")


def convert_to_gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / model_folder.WEIGHTS).rename(folder / "model-q4.gguf")


def drop_end_token(folder: Path) -> None:
    change(folder / "tokenizer_config.json", eos_token=None)


def set_config(**entries: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "config.json", **entries)


PROBLEMS: list[tuple[Callable[[Path], Any], str]] = [
    (truncate_weights, "its model.safetensors is damaged or incomplete"),
    (empty_weights, "its model.safetensors is damaged or incomplete (0 bytes)"),
    (pickle_weights, "pytorch_model.bin, which is pickled, and a pickle runs code"),
    (drop_shard, "model-00002-of-00002.safetensors is missing"),
    (lambda folder: (folder / "config.json").unlink(), "no config.json, so it is no model of Transformers"),
    (lambda folder: (folder / "config.json").write_text("[]"), "its config.json is no JSON object"),
    (hide_in_subfolder, "but checkpoint-500 in it does: name that folder"),
    (convert_to_gguf, "model-q4.gguf, a file for llama.cpp: name a folder with the original model"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "it has no tokenizer (tokenizer.json): save"),
    (drop_end_token, "its tokenizer names no end token (eos_token, or sep_token of an encoder): set one"),
    (set_config(model_type="unheard-of"), "its model_type is 'unheard-of', which the installed release of Transf"),
    (set_config(auto_map={"AutoModel": "a.B"}), "code of its own (auto_map), which is never run"),
    (set_config(quantization_config={"quant_method": "gptq"}), "quantized (gptq), and full precision is needed"),
    (set_config(model_type="mamba"), "a mamba model keeps a recurrent state"),
    (set_config(vision_config={"a": 1}), "it reads more than text (vision_config)"),
    (set_config(is_encoder_decoder=True), "is an encoder with a decoder"),
]


@pytest.mark.parametrize(("harm", "sentence"), PROBLEMS, ids=[sentence[:24] for _, sentence in PROBLEMS])
def test_unusable_folder_is_refused_by_its_problem(harm: Callable[[Path], Any], sentence: str, copy: Path) -> None:
    harm(copy)
    [problem] = model_folder.problems(copy)
    assert sentence in problem
    with pytest.raises(StageError, match="cannot be used as a model"):
        models.load_decoder(copy, NUMERICS)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("meta/Llama-9B", "it does not exist: correct the path; if it is a name on the Hugging Face hub: hf download "
                          "meta/Llama-9B --local-dir Llama-9B"),
        ("/nowhere/models/mine", "it does not exist: correct the path"),
        (__file__, "it is a file: name the folder that holds the model with its config.json and its tokenizer"),
    ],
)  # fmt: skip
def test_path_that_is_no_folder_is_refused_with_what_to_do(path: str, sentence: str) -> None:
    assert list(model_folder.problems(Path(path))) == [sentence]


@pytest.mark.parametrize(("family", "ends"), [("bert", ("[CLS]", "[SEP]")), ("gpt2", ("<|endoftext|>",) * 2)])
def test_special_tokens_of_the_class_are_used_where_the_files_name_none(
    family: str, ends: tuple[str, str], tmp_path: Path
) -> None:
    """As in the folders of BERT, DistilBERT, GPT-2 and XLM-RoBERTa on the Hugging Face hub."""
    folder = write_family(family, tmp_path)
    vocabulary = chat.read_tokenizer(folder).get_vocab()
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 96}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert list(model_folder.problems(folder)) == []
    tokenizer = chat.load_tokenizer(folder)
    assert tuple(tokenizer.convert_ids_to_tokens(list(chat.first_and_last(tokenizer)))) == ends
    assert tokenizer.get_vocab() == vocabulary


@pytest.mark.parametrize("entries", [{"num_attention_heads": "four"}])
def test_config_that_transformers_does_not_know_is_named(entries: dict[str, Any], copy: Path) -> None:
    change(copy / "config.json", **entries)
    known = "the installed version of Transformers has no model of the type unheard-of"
    with pytest.raises(StageError, match=rf"the config\.json of .* is not one that this release of Transf|{known}"):
        models.load_decoder(copy, NUMERICS)


def test_sound_folder_has_no_problem(llama: Path) -> None:
    assert list(model_folder.problems(llama)) == []


def test_longrope_uses_its_original_context(tmp_path: Path) -> None:
    """Beyond it all angles change, so that a row would depend on the other rows of its batch."""
    folder = write_family("phi3-longrope", tmp_path, Shape(positions=64))
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 192
    assert chat.load_tokenizer(folder).model_max_length == 64


@pytest.mark.parametrize(("entries", "expected"), [({"max_seq_len": 64}, 64), ({}, model_folder.DEFAULT_CONTEXT)])
def test_context_of_a_model_without_positions_is_bounded(entries: dict[str, int], expected: int, copy: Path) -> None:
    """MPT states it under another name, BLOOM states none, and its tokenizer's is 10^30."""
    change(copy / "config.json", max_position_embeddings=None, **entries)
    change(copy / "tokenizer_config.json", model_max_length=int(1e30))
    assert chat.load_tokenizer(copy).model_max_length == expected


def test_roberta_positions_begin_after_the_padding_id() -> None:
    config = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert model_folder.context_length(config) == 512


# Adapters


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    """A PEFT adapter of the Llama with random updates, without a tokenizer of its own."""
    return write_adapter(llama, tmp_path / "adapter")


def write_adapter(base: Path, folder: Path) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(models.load_decoder(base, NUMERICS), LoraConfig(r=2, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def test_adapter_folder_is_loaded_merged(adapter: Path, llama: Path) -> None:
    """As PEFT merges it; the tokenizer is that of the base model."""
    import torch
    from peft import PeftModel

    assert list(model_folder.problems(adapter)) == []
    merged: Any = PeftModel.from_pretrained(models.load_decoder(llama, NUMERICS), str(adapter)).merge_and_unload()
    with torch.no_grad():
        expected = merged.eval()(input_ids=torch.arange(5, 40)[None]).logits
    torch.testing.assert_close(logits(adapter), expected)
    assert not torch.allclose(expected, logits(llama), atol=1e-2)
    assert chat.load_tokenizer(adapter).chat_template == chat.load_tokenizer(llama).chat_template
    assert models.model_kind(adapter) == "causal"


def test_base_beside_the_adapter_is_found_by_its_name(adapter: Path, llama: Path) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path="someone/llama")
    shutil.copytree(llama, adapter.parent / "llama")
    assert model_folder.adapter_base(adapter) == adapter.parent / "llama"


def test_adapter_without_its_base_names_the_folder_to_fill(adapter: Path) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path="someone/other")
    [problem] = model_folder.problems(adapter)
    assert problem.startswith("it is a PEFT adapter of someone/other, which is no folder here: put that model into")
    assert str(adapter.parent / "other") in problem


# Ends of turns


def test_turn_that_ends_with_another_token_than_a_text_ends_replies(copy: Path, tmp_path: Path) -> None:
    """As in Qwen2.5's base models: the end token is <|endoftext|>, and turns end with <|im_end|>."""
    change(copy / "tokenizer_config.json", eos_token="<|endoftext|>")
    change(copy / "generation_config.json", eos_token_id=0)
    tokenizer, model = chat.load_tokenizer(copy), models.load_decoder(copy, NUMERICS)
    turn_end, text_end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    ids, answered = chat.encode_chat(tokenizer, ANSWERED)
    assert [token for token, flag in zip(ids, answered, strict=True) if flag][-1] == turn_end
    assert chat.end_ids(model, tokenizer)[:2] == (turn_end, text_end)
    assert sampling.has_ended([7, turn_end], chat.end_ids(model, tokenizer))
    models.save(model, tokenizer, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())["eos_token_id"]
    assert set(saved) >= {turn_end, text_end}


def test_every_end_token_of_the_generation_config_ends_a_reply(copy: Path) -> None:
    change(copy / "generation_config.json", eos_token_id=[2, 9, 11])
    model, tokenizer = models.load_decoder(copy, NUMERICS).eval(), chat.load_tokenizer(copy)
    assert set(chat.end_ids(model, tokenizer)) >= {2, 9, 11}
    model.lm_head.weight.data[9] = 50 * model.lm_head.weight.data.abs().mean(0)
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 5.0, "seed": 1, "numerics": NUMERICS}
    replies = sampling.generate_replies(model, tokenizer, [[5, 6, 7]] * 8, **options)
    ended = [reply for reply in replies if len(reply) < 30]
    assert ended
    assert all(reply[-1] in chat.end_ids(model, tokenizer) for reply in ended)
    assert all(token not in chat.end_ids(model, tokenizer) for reply in replies for token in reply[:-1])


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "top_k": 20}, {"early_stopping": True}]
)
def test_sampling_settings_of_a_folder_do_not_stop_its_saving(
    settings: dict[str, Any], copy: Path, tmp_path: Path
) -> None:
    """Transformers raises an error for some of them when it saves a model, after all training."""
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], **settings}))
    models.save(models.load_decoder(copy, NUMERICS), chat.load_tokenizer(copy), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 0]
    assert settings.keys().isdisjoint(saved)


def test_template_without_an_end_of_turn_is_refused_before_training(copy: Path) -> None:
    tokenizer = chat.load_tokenizer(copy)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    with pytest.raises(StageError, match=r"writes no token that ends the assistant's turns.*chat_template"):
        chat.encode_chat(tokenizer, ANSWERED)


# Chat templates


def test_folder_without_a_template_takes_one_by_name(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(StageError, match="no chat template: choose one by name with chat_template"):
        chat.encode_prompt(chat.load_tokenizer(copy), QUESTION)
    plain, chatml = (chat.load_tokenizer(copy, name) for name in ("plain", "chatml"))
    text = plain.decode(chat.encode_prompt(plain, QUESTION))
    assert text.endswith("User: who said hello\nAssistant:")
    assert chatml.decode(chat.encode_prompt(chatml, QUESTION)).endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", templates.NAMED)
def test_named_template_ends_turns_and_locates_answers(name: str, copy: Path) -> None:
    """For a tokenizer that has its control tokens: the answer and the end of the turn are trained on, nothing else."""
    tokenizer = chat.read_tokenizer(copy)
    tokenizer.add_special_tokens({"additional_special_tokens": list(templates.CONTROL_TOKENS[name])})
    tokenizer.save_pretrained(copy)
    loaded = chat.load_tokenizer(copy, name)
    ids, answered = chat.encode_chat(loaded, [*ANSWERED, *ANSWERED])
    trained = loaded.decode([token for token, flag in zip(ids, answered, strict=True) if flag])
    assert trained.split() == ["Rome" + str(templates.turn_end(loaded))] * 2 or trained.count("Rome") == 2
    assert trained.count(str(templates.turn_end(loaded))) == 2
    assert "hello" not in trained


def test_named_template_needs_its_control_tokens(copy: Path) -> None:
    with pytest.raises(
        StageError, match=r"chat_template is llama3, and the tokenizer in .* lacks <\|start_header_id\|>"
    ):
        chat.load_tokenizer(copy, "llama3")
    with pytest.raises(StageError, match="there is no template of that name: expected one of chatml, llama3"):
        chat.load_tokenizer(copy, "chat-ml")


def test_of_several_templates_the_default_or_the_named_one_is_used(copy: Path) -> None:
    tokenizer = chat.read_tokenizer(copy)
    own = str(tokenizer.chat_template)
    tokenizer.chat_template = {"default": own, "tool_use": "{{ 'tools' }}" + own}
    tokenizer.save_pretrained(copy)
    assert chat.load_tokenizer(copy).chat_template == own
    assert str(chat.load_tokenizer(copy, "tool_use").chat_template).startswith("{{ 'tools' }}")


def test_dates_in_a_template_are_fixed(copy: Path) -> None:
    """The same conversation has the same tokens on every day; the saved template says which day."""
    (copy / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + templates.NAMED["chatml"])
    tokenizer = chat.load_tokenizer(copy)
    assert str(tokenizer.chat_template).startswith("{{ '26 Jul 2024' }}")
    (copy / "chat_template.jinja").write_text("{% set f = '%d' %}{{ strftime_now(f) }}" + templates.NAMED["chatml"])
    with pytest.raises(StageError, match="in a format that it computes"):
        chat.load_tokenizer(copy)


def test_class_that_transformers_lacks_is_named(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = write_family("olmo2", tmp_path)
    with pytest.raises(StageError, match="holds a olmo2 model, for which Transformers has no class for Sequence"):
        loading.load(AutoModelForSequenceClassification, folder, NUMERICS)


# Models that differ from the settings


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_soft_caps_are_kept_whatever_attention_is_set(family: str, tmp_path: Path) -> None:
    """The fused kernel has none: Transformers would leave them out."""
    import torch

    folder, ids = write_family(family, tmp_path), torch.arange(5, 60)[None]
    fused = models.load_decoder(folder, NUMERICS.model_copy(update={"attention": "sdpa"})).eval()
    assert fused.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")
    with torch.no_grad():
        expected = models.load_decoder(folder, NUMERICS).eval()(input_ids=ids).logits
        torch.testing.assert_close(fused(input_ids=ids).logits, expected, atol=1e-4, rtol=0)


def test_blocks_of_several_kinds_are_not_split_for_alignment(tmp_path: Path) -> None:
    """Transformers finds a block's kind of attention by its position, which is another one in the upper half."""
    model = models.load_decoder(write_family("gemma2", tmp_path / "mixed"), NUMERICS)
    assert Halves.of(model, 1) is None
    assert Halves.of(models.load_decoder(write_family("llama", tmp_path / "plain"), NUMERICS), 1) is not None


def test_frozen_backbone_refuses_new_weights_below_the_head(tmp_path: Path) -> None:
    """BERT's pooler is new too, and only the head would learn; the mean of the tokens needs no pooler."""
    folder = write_family("bert", tmp_path)
    tokenizer = chat.load_tokenizer(folder)
    with pytest.raises(StageError, match=r"set method\.pooling to mean"):
        FrozenBackbone(head_models.new_scorer(folder, NUMERICS, 1, layers=1), tokenizer, NUMERICS)
    FrozenBackbone(head_models.new_scorer(folder, NUMERICS, 1, layers=1, token_level=True), tokenizer, NUMERICS)
