"""Converts a model in llama.cpp's GGUF format to a Transformers folder with dequantized safetensors and a tokenizer.

Transformers reads the weights as float32. The tokenizer is built here from the metadata of the file, because
Transformers 4.57 takes SmolLM2's end token as its start token and ignores how digits are split. A GGUF file contains
only numbers, strings and arrays of them, so no code of it runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.harness.job import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KEY_PREFIX = "tokenizer.ggml"
CONTROL_TYPE, USER_DEFINED_TYPE = 3, 4  # llama.cpp's types of tokens that are not made by merges
READ_ERRORS = (OSError, ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError)


def convert(path: Path, target: Path, label: str) -> None:
    """Write the model of a GGUF file as a Transformers folder; raise StageError with `label` if it cannot be read."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        tokenizer = read_tokenizer(path, label)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
        )
    except READ_ERRORS as error:
        raise StageError(
            f"{label}: expected a causal model in GGUF of an architecture that Transformers reads, found something "
            f"else ({type(error).__name__}: {error}); name another member or archive."
        ) from error
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    model.config._name_or_path = ""  # otherwise a path of this machine
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)


def read_tokenizer(path: Path, label: str) -> "PreTrainedTokenizerFast":
    """Return the byte-level BPE tokenizer of a GGUF file, with its special tokens and chat template."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(path).fields

    def read(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    kind, pre_tokenizer = read(f"{KEY_PREFIX}.model"), read(f"{KEY_PREFIX}.pre")
    if kind != "gpt2" or pre_tokenizer not in PRE_TOKENIZERS:
        raise StageError(
            f"{label}: expected a byte-level BPE tokenizer (gpt2) with the pre-tokenizer "
            f"{' or '.join(PRE_TOKENIZERS)}, found {kind} and {pre_tokenizer}; use another file, or a Transformers "
            "folder of the model with its tokenizer.json."
        )
    tokens: list[str] = read(f"{KEY_PREFIX}.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in read(f"{KEY_PREFIX}.merges")]
    built = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    built.pre_tokenizer, built.decoder = PRE_TOKENIZERS[pre_tokenizer](), decoders.ByteLevel()
    types = read(f"{KEY_PREFIX}.token_type") or [0] * len(tokens)
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (CONTROL_TYPE, USER_DEFINED_TYPE):
            special = token_type == CONTROL_TYPE
            built.add_special_tokens([AddedToken(token, normalized=False, special=special)])
    ids = {name: read(f"{KEY_PREFIX}.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    special_tokens = {name: tokens[number] for name, number in ids.items() if number is not None}
    arguments = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{arguments[name]: token for name, token in special_tokens.items()},
    )
    tokenizer.chat_template = read("tokenizer.chat_template")
    return tokenizer


def _gpt2() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=False)


def _single_digits() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


PRE_TOKENIZERS = {"gpt-2": _gpt2, "smollm": _single_digits}  # by llama.cpp's names
