"""Continued pretraining from a given model: validates and loads its folder.

The folder has the format of Transformers: `config.json`, weights as safetensors, and the fast tokenizer that the model
was trained with. No code of the folder is run and no pickle is loaded. The folder's files are validated before weights
are loaded.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tasks.common.harness.job import StageError
from tasks.common.modelling import models
from tasks.common.modelling.models import Shape
from tasks.common.settings import Numerics, Settings
from tasks.common.text import chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_RULES = ("normalizer", "pre_tokenizer", "model", "decoder")  # keys of a tokenizer's JSON


class New(Shape):
    """A new model with random weights."""

    name: Literal["new"] = Field(description="Source of the weights")
    path: Literal["data/tokenize/tokenizer"] = Field(description="Tokenizer, which gives the vocabulary")


class From(Settings):
    """Continued training from the weights of a given model, with its own tokenizer."""

    name: Literal["from"] = Field(description="Source of the weights")
    path: str = Field(description="Folder of a Transformers causal model, absolute or in the project", min_length=1)


def open_decoder(
    source: From, path: Path, tokenizer: "PreTrainedTokenizerFast", window: int, numerics: Numerics
) -> "PreTrainedModel":
    """Return the causal model of a folder, in float32; raise StageError, which lists all problems, if it is unusable.

    `tokenizer` is the one that encoded the shards; its special token ids are written into the model's config.
    """
    from transformers import GenerationConfig

    problems = list(_validate_folder(path, tokenizer, window))
    if problems:
        raise StageError(f"model.path: {source.path} cannot be trained on. " + " ".join(problems))
    model = models.load_decoder(path, numerics)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    # The folder's own generation config may set sampling options, which must not apply here.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def _validate_folder(path: Path, tokenizer: "PreTrainedTokenizerFast", window: int) -> Iterator[str]:
    """Yield the problems of a folder: what was found, what was expected and what to do."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"Expected a folder of a Transformers model with a config.json, which could not be read: {error}."
        return
    yield from _validate_config(config)
    yield from _validate_weights(path)
    if not (path / "tokenizer.json").is_file():
        yield (
            "It contains no tokenizer.json, so its tokenizer cannot be compared with that of the shards; load its "
            "tokenizer with AutoTokenizer and save it there."
        )
        return
    differs = tokenizer_difference(tokenizer, chat.load_tokenizer(path))
    if differs:
        yield (
            f"Its tokenizer is not the one that encoded the shards: {differs}. "
            "Set tokenize.tokenizer to {name: from} with this path."
        )
    rows, positions = config.get("vocab_size"), config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(rows, int) and rows < len(tokenizer):
        yield f"Its embedding has {rows} rows, fewer than the {len(tokenizer)} tokens of the tokenizer; use its own."
    for name, length in (("tokenize.context", tokenizer.model_max_length), ("window", window)):
        if isinstance(positions, int) and length > positions:
            yield f"It has {positions} positions, but {name} is {length}; set it to {positions} or less."


def _validate_config(config: dict[str, Any]) -> Iterator[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if config.get("auto_map"):
        yield "It needs its own code (auto_map), which is never run; use a model that Transformers supports natively."
        return
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    expected = CAUSAL.get(str(kind))
    if expected is None or expected not in architectures:
        known = f"; of type {kind}, that is {expected}" if expected else ""
        seen = ", ".join(architectures) or kind
        yield f"Expected a causal language model that Transformers knows{known}, found {seen}."
    if config.get("quantization_config"):
        yield "Its weights are quantized, and training needs unquantized ones; use the original model."


def _validate_weights(path: Path) -> Iterator[str]:
    if (path / WEIGHTS).is_file():
        return
    if (path / INDEX).is_file():
        try:
            index: dict[str, str] = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, LookupError) as error:
            yield f"Its {INDEX} cannot be read ({error})."
            return
        absent = sorted(name for name in set(index.values()) if not (path / name).is_file())
        if absent:
            yield f"Of the shards that {INDEX} lists, {', '.join(absent)} {'are' if absent[1:] else 'is'} missing."
        return
    if (path / "adapter_config.json").is_file():
        yield "It contains only an adapter; merge it into its base model (peft: merge_and_unload) and save the result."
        return
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    found = f"found {', '.join(pickled)}, which is pickled: a pickle runs code" if pickled else "found none"
    yield f"Expected weights in {WEIGHTS}, {found}; save the model with save_pretrained(safe_serialization=True)."


def tokenizer_difference(
    shard_tokenizer: "PreTrainedTokenizerFast", model_tokenizer: "PreTrainedTokenizerFast"
) -> str | None:
    """Return a description of the first difference between two tokenizers that affects ids; None if there is none."""
    vocabularies = shard_tokenizer.get_vocab(), model_tokenizer.get_vocab()
    if vocabularies[0] != vocabularies[1]:
        shard_vocabulary, model_vocabulary = vocabularies
        changed = sorted(
            (
                token
                for token in {**shard_vocabulary, **model_vocabulary}
                if shard_vocabulary.get(token) != model_vocabulary.get(token)
            ),
            key=lambda token: (min(shard_vocabulary.get(token, 2**31), model_vocabulary.get(token, 2**31)), token),
        )
        token = changed[0]
        ids = [f"id {found[token]}" if token in found else "none" for found in vocabularies]
        return f"{len(changed)} tokens have other ids, the first is {token!r} ({ids[0]} in the shards', {ids[1]} here)"
    rules = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (shard_tokenizer, model_tokenizer)]
    for rule in TOKENIZER_RULES:
        if rules[0][rule] != rules[1][rule]:
            return f"the tokens are the same, but the {rule.replace('_', '-')} differs"
    for name in ("bos_token", "eos_token"):
        if getattr(shard_tokenizer, name) != getattr(model_tokenizer, name):
            return f"its {name} is {getattr(model_tokenizer, name)!r} and not {getattr(shard_tokenizer, name)!r}"
    return None
