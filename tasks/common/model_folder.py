"""What a folder with a Transformers model contains, read from its JSON files: kind, context length, adapter, problems.

It loads neither torch nor weights, so that settings can be checked against a folder before any work.
"""

import importlib.util
import json
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ENGINE_GRAPH = "openvino_model.xml"  # of an exported model
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = (  # any of these is a tokenizer
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "vocab.json",
    "vocab.txt", "tekken.json",
)  # fmt: skip
SPECIAL_TOKEN_FILES = ("special_tokens_map.json", "tokenizer_config.json")
# Classes of tokenizers that have only the special tokens that their files name; others have defaults of their own.
PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
DEFAULT_CONTEXT = 1024  # tokens of a model whose files give no context length (BLOOM)
# Position ids of RoBERTa's family begin after the padding id, so its table has more rows than usable positions.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "longformer")
KIND_BY_SUFFIX = {
    "ForCausalLM": "causal", "LMHeadModel": "causal", "ForMaskedLM": "masked",
    "ForSequenceClassification": "classifier", "ForTokenClassification": "classifier",
}  # fmt: skip
# Decoders for which Transformers 5.5 has no class with a classification head (tests/test_model_folder.py compares).
WITHOUT_HEAD = (
    "afmoe", "apertus", "aria_text", "bitnet", "blt", "codegen", "cohere", "cohere2", "cpmant", "cwm", "dbrx", "dots1",
    "emu3", "ernie4_5", "ernie4_5_moe", "exaone_moe", "flex_olmo", "gemma3n_text", "gemma4_text", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa", "gpt_neox_japanese", "granite", "granitemoe", "granitemoeshared", "jais2",
    "llama4_text", "longcat_flash", "minimax_m2", "nanochat", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe",
    "solar_open", "vaultgemma", "xglm", "youtu",
)  # fmt: skip
# Decoders whose feed-forward layers are not gated ones with Llama's three matrices, as pruning and adapters need.
WITHOUT_GATED_LAYERS = (
    "gpt2", "gpt_neo", "gpt_neox", "gpt_bigcode", "gptj", "opt", "falcon", "bloom", "codegen", "biogpt", "xglm", "mpt",
    "phi", "phi3", "phimoe", "glm", "glm4", "starcoder2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe",
    "jetmoe", "dbrx", "gpt_oss", "persimmon", "nemotron",
)  # fmt: skip
WITHOUT_PACKING = ("opt", "falcon")  # they make their own attention mask, which does not separate conversations
# Their state has no positions: left padding, packed rows and a key-value cache would change the results.
RECURRENT = (
    "mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba", "zamba2", "rwkv", "recurrent_gemma",
    "xlstm", "granitemoehybrid", "nemotron_h", "lfm2", "lfm2_moe", "qwen3_next", "plamo2",
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if the file is missing, unreadable or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def kind_of(config: Mapping[str, Any]) -> str | None:
    """Return the kind of model that a config describes: causal, masked or classifier; None for anything else."""
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return next((kind for suffix, kind in KIND_BY_SUFFIX.items() if name.endswith(suffix)), None)


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a model reads, from its config.json; None if it gives none.

    Longrope (Phi-3) changes its angles for all tokens once a row is longer than the original context. A row's result
    would depend on the other rows of its batch, and a key–value cache would hold both kinds of angles, so that only
    the original context is used.
    """
    found = next((config[key] for key in POSITION_KEYS if isinstance(config.get(key), int)), None)
    if found is not None and config.get("model_type") in OFFSET_POSITIONS:
        found -= int(config.get("pad_token_id") or 0) + 1
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, Mapping) and (rope.get("rope_type") or rope.get("type")) in ("longrope", "su", "yarn_longrope"):
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        found = min(found or original, original) if isinstance(original, int) else found
    return found


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a PEFT adapter and no model of its own."""
    return (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file()


def adapter_base(folder: Path) -> Path | None:
    """Return the folder of an adapter's base model: the path that the adapter names, or a folder beside the adapter.

    The adapter's `base_model_name_or_path` is often a name on a hub; then a folder of the same last name is looked for
    beside the adapter, or under `models/`.
    """
    named = str(read_json(folder / ADAPTER).get("base_model_name_or_path") or "")
    last = named.rstrip("/").rpartition("/")[2]
    places = [Path(named), folder / named, folder.parent / last, Path("models") / last] if last else []
    return next((place for place in places if (place / CONFIG).is_file()), None)


def base_of(folder: Path) -> Path:
    """Return the folder that holds a model's config: its own, or that of an adapter's base model."""
    base = adapter_base(folder) if is_adapter(folder) else None
    return folder if base is None else base


def tokenizer_folder(folder: Path) -> Path:
    """Return the folder that holds a model's tokenizer: its own, or that of an adapter's base model."""
    return folder if (folder / "tokenizer_config.json").is_file() else base_of(folder)


def problems(folder: Path) -> Iterator[str]:
    """Yield why a folder cannot be loaded as a Transformers model in full precision, each with what to do."""
    if is_adapter(folder):
        yield from _adapter_problems(folder)
        return
    if not (folder / CONFIG).is_file():
        yield _describe_absent(folder)
        return
    config = read_json(folder / CONFIG)
    if not config:
        yield f"its {CONFIG} is no JSON object: download the folder again"
        return
    yield from _config_problems(config)
    if not (folder / ENGINE_GRAPH).is_file():
        yield from _weight_problems(folder)
    yield from tokenizer_problems(folder)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def special_tokens(folder: Path) -> dict[str, Any]:
    """Return the special tokens that a tokenizer's files name, such as `eos_token`; {} if they name none."""
    entries = {name: value for file in SPECIAL_TOKEN_FILES for name, value in read_json(folder / file).items()}
    return {name: value for name, value in entries.items() if name.endswith("_token") and value}


def export_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a model cannot be served, from its config.json."""
    if config.get("attn_logit_softcapping") is not None:
        yield (
            f"a {config.get('model_type')} model caps its attention's logits (attn_logit_softcapping), which the "
            "serving engine's attention cannot: serve another model, for example Gemma 3"
        )


def head_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a model cannot become a classifier or a reward model, from its config.json."""
    if config.get("model_type") in WITHOUT_HEAD:
        yield (
            f"Transformers has no class with a classification head for a {config['model_type']} model: use another "
            "model, for example an encoder"
        )


def layer_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a model cannot be pruned or get adapters, from its config.json."""
    if config.get("model_type") in WITHOUT_GATED_LAYERS:
        yield (
            f"the feed-forward layers of a {config['model_type']} model are not gated ones with gate_proj, up_proj and "
            "down_proj, which pruning and the method adapter need: use a model with Llama's layers"
        )


def packing_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield why conversations cannot be packed for a model, from its config.json."""
    if config.get("model_type") in WITHOUT_PACKING:
        yield f"a {config['model_type']} model cannot tell packed conversations apart: set task.packing to null"


def _describe_absent(folder: Path) -> str:
    """Return what there is in place of a folder with a config.json, and what to do."""
    if not folder.exists():
        hub = len(folder.parts) == 2 and not folder.parent.exists()
        download = f"; if it is a name on the Hugging Face hub: hf download {folder} --local-dir {folder.name}"
        return f"it does not exist: correct the path{download if hub else ''}"
    if folder.is_file():
        return f"it is a file: name the folder that holds the model with its {CONFIG} and its tokenizer"
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG}")) or sorted(
        path.parent for path in folder.glob(f"snapshots/*/{CONFIG}")
    )
    if below:
        return f"it contains no {CONFIG}, but {below[-1].relative_to(folder)} in it does: name that folder"
    if gguf := sorted(file.name for file in folder.glob("*.gguf")):
        return (
            f"it contains {gguf[0]}, a file for llama.cpp: name a folder with the original model ({CONFIG}, {WEIGHTS})"
        )
    return f"it contains no {CONFIG}, so it is no model of Transformers: name the folder that holds the model"


def tokenizer_problems(folder: Path) -> Iterator[str]:
    """Yield why a folder's tokenizer cannot be used."""
    if not has_tokenizer(folder):
        yield "it has no tokenizer (tokenizer.json): save the model's tokenizer there with save_pretrained"
        return
    plain = read_json(folder / SPECIAL_TOKEN_FILES[1]).get("tokenizer_class") in PLAIN_TOKENIZERS
    if plain and not {"eos_token", "sep_token"} & special_tokens(folder).keys():
        yield (
            "its tokenizer names no end token (eos_token, or sep_token of an encoder): set one in its "
            f"{SPECIAL_TOKEN_FILES[1]}"
        )


def _adapter_problems(folder: Path) -> Iterator[str]:
    settings, base = read_json(folder / ADAPTER), adapter_base(folder)
    if base is None:
        named = settings.get("base_model_name_or_path") or "no base model"
        name = str(named).rstrip("/").rpartition("/")[2]
        yield (
            f"it is a PEFT adapter of {named}, which is no folder here: put that model into {folder.parent / name}, or "
            f"write its path into base_model_name_or_path of {ADAPTER}"
        )
        return
    if not (folder / ADAPTER_WEIGHTS).is_file():
        yield from _missing_weights(folder, ADAPTER_WEIGHTS)
    else:
        yield from _damaged(folder / ADAPTER_WEIGHTS)
    for problem in problems(base):
        yield f"its base model {base} cannot be used: {problem}"


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("auto_map"):
        yield "it needs code of its own (auto_map), which is never run: use a model that Transformers supports itself"
    elif not _is_known_type(str(config.get("model_type"))):
        yield (
            f"its model_type is {config.get('model_type')!r}, which the installed release of Transformers does not "
            "know: use a model that it knows"
        )
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown method")
        yield f"its weights are quantized ({method}), and full precision is needed: use the original model"
    others = [part for part in ("vision_config", "audio_config") if config.get(part)]
    if others:
        yield f"it reads more than text ({others[0]}): use the text model of its family"
    if config.get("is_encoder_decoder"):
        yield f"a {config.get('model_type')} model is an encoder with a decoder: use a decoder or an encoder"
    if config.get("model_type") in RECURRENT:
        yield f"a {config['model_type']} model keeps a recurrent state, which is not supported: use a Transformer"


@cache
def _is_known_type(model_type: str) -> bool:
    """Return whether Transformers has a config class for a model type.

    The name is looked up in the text of its table: importing the table also imports torch, which takes seconds.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return True
    table = Path(spec.submodule_search_locations[0], "models/auto/configuration_auto.py")
    return not table.is_file() or f'("{model_type}", ' in table.read_text(encoding="utf-8")


def _weight_problems(folder: Path) -> Iterator[str]:
    if (folder / WEIGHTS).is_file():
        yield from _damaged(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        names = sorted(set(dict(read_json(folder / INDEX).get("weight_map") or {}).values()))
        if not names:
            yield f"its {INDEX} lists no shards: download the folder again"
        if absent := [name for name in names if not (folder / name).is_file()]:
            yield f"of the shards that {INDEX} lists, {', '.join(absent)} {'are' if absent[1:] else 'is'} missing"
        for name in names:
            yield from _damaged(folder / name)
    else:
        yield from _missing_weights(folder, WEIGHTS)


def _missing_weights(folder: Path, expected: str) -> Iterator[str]:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickled:
        yield (
            f"it has no {expected} but {', '.join(pickled)}, which is pickled, and a pickle runs code: load the model "
            "where you trust it and save it with save_pretrained(safe_serialization=True)"
        )
    else:
        yield f"it has no weights ({expected}): download the folder again"


def _damaged(path: Path) -> Iterator[str]:
    """Report a safetensors file whose size differs from what its header says; a missing one is reported elsewhere."""
    if not path.is_file():
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else {}
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            ends = []
    if not ends or 8 + length + max(ends) != size:
        yield f"its {path.name} is damaged or incomplete ({size} bytes): download it again"
