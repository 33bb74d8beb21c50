"""A model in llama.cpp's GGUF format as a plain Transformers folder: weights de-quantized into safetensors, tokenizer.

Transformers reads the weights (float32; what quantization rounded away is gone). The tokenizer is built here from what
the file says: Transformers 4.57 reads SmolLM2's end token as its start token and leaves out how digits are cut.
Nothing in a GGUF file is run: it holds numbers, text and arrays of them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.stage import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KEY = "tokenizer.ggml"
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's types of tokens that no merge makes
UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError)


def convert(path: Path, target: Path, called: str) -> None:
    """Write the model of a GGUF file as a folder; raise StageError, in which the file is `called` so."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        tokenizer = read_tokenizer(path, called)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except UNREADABLE as error:
        raise StageError(
            f"{called}: expected a causal model in GGUF of an architecture that Transformers reads, found something "
            f"else ({type(error).__name__}: {error}); name another member or archive."
        ) from error
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    model.config._name_or_path = ""  # the file's path on this machine, or its author's words
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)


def read_tokenizer(path: Path, called: str) -> "PreTrainedTokenizerFast":
    """Return the byte-level BPE tokenizer of a GGUF file, with its special tokens and chat template."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(path).fields

    def read(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    kind, cut = read(f"{KEY}.model"), read(f"{KEY}.pre")
    if kind != "gpt2" or cut not in CUTS:
        raise StageError(
            f"{called}: expected a byte-level BPE tokenizer (gpt2) that cuts text as one of {', '.join(CUTS)}, found "
            f"{kind} and {cut}; take another file, or a Transformers folder of the model with its tokenizer.json."
        )
    tokens: list[str] = read(f"{KEY}.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in read(f"{KEY}.merges")]
    built = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    built.pre_tokenizer, built.decoder = CUTS[cut](), decoders.ByteLevel()
    types = read(f"{KEY}.token_type") or [0] * len(tokens)
    for token, sort in zip(tokens, types, strict=True):
        if sort in (CONTROL, USER_DEFINED):
            special = sort == CONTROL
            built.add_special_tokens([AddedToken(token, normalized=False, special=special)])
    numbers = {name: read(f"{KEY}.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    named = {name: tokens[number] for name, number in numbers.items() if number is not None}
    spelt = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{spelt[name]: token for name, token in named.items()},
    )
    tokenizer.chat_template = read("tokenizer.chat_template")
    return tokenizer


def _gpt2() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=False)


def _single_digits() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


CUTS = {"gpt-2": _gpt2, "smollm": _single_digits}  # llama.cpp's names for how text is cut before merging
